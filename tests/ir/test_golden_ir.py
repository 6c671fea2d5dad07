"""The graph language itself: text and back, and the two choices of sizes at which analyses run."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from golden_cases import SYMBOLS, graph, untrue

from sqcompile import CaptureError
from sqcompile.passes.ir import sizes, text
from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import value
from sqcompile.passes.ir.text import show

TWO_SIZES = """
    %x: f32[s0, s1, 4] = input
    %mask: b1[s0, s1] = input
    %y = aten.neg(%x)
    return %y
"""


def tried(gm, run=lambda sizes: None):
    """The shape of x at the choices that are tried, of which the last two serve."""
    shapes = []

    def logged(choice):
        x = value(next(iter(gm.graph.nodes)))
        shapes.append([int(s.node.expr.subs(choice)) if isinstance(s, torch.SymInt) else s for s in x.shape])
        return run(choice)

    sizes.at_two_sizes(gm, logged)
    return f"%x: {', then '.join(map(str, shapes))}\n"


def test_what_is_shown_is_read_again_as_it_was():
    written = """\
%x: f32[s0, s1, 4] = input
%n: f32[s0, s1, 4] = aten.layer_norm(%x, [4], %norm.weight)
%size: size = aten.sym_size(%x, 0)
return [%n, %size]"""
    gm = graph(written, {"norm.weight": [4]})
    assert show(gm) == written
    assert untrue(text, written) == []


def test_sizes_are_apart_and_two_for_each_symbol():
    gm = graph(TWO_SIZES)
    assert_expected_inline(
        tried(gm),
        """\
%x: [2, 3, 4], then [3, 5, 4]
""",
    )


def test_sizes_that_do_not_run_are_followed_by_multiples():
    gm = graph(TWO_SIZES)

    def multiple_of_eight(choice):
        if list(choice.values())[1] % 8:
            raise RuntimeError("shape '[8, -1]' is invalid")

    text = tried(gm) + tried(gm, multiple_of_eight)
    assert untrue(sizes, f"{show(gm)}\n{text}") == []
    assert_expected_inline(
        text,
        """\
%x: [2, 3, 4], then [3, 5, 4]
%x: [2, 3, 4], then [16, 24, 4], then [24, 40, 4]
""",
    )


def test_a_graph_that_runs_at_no_other_size_is_an_error():
    gm = graph(TWO_SIZES)

    def never(choice):
        raise RuntimeError("no such size")

    with pytest.raises(CaptureError, match="does not run at other batch or sequence sizes: no such size"):
        tried(gm, never)


def test_what_a_graph_assumes_of_its_sizes():
    gm = graph(TWO_SIZES)
    length = value(next(iter(gm.graph.nodes))).shape[1]
    assert bool(length > 3)  # as a model's code asks
    [condition] = sizes.conditions(gm)
    assert_expected_inline(str(condition.subs(length.node.expr, "s1")), """s1 > 3""")
    assert_expected_inline(
        tried(gm),
        """\
%x: [16, 24, 4], then [24, 40, 4]
""",
    )


def test_sizes_of_a_call_and_others_that_its_graph_serves():
    gm = graph(TWO_SIZES)
    batch, length = value(next(iter(gm.graph.nodes))).shape[:2]
    assert bool(length < 12)
    first, second = sizes.vary([batch, length], about(gm).fake_mode.shape_env)
    assert list(first.values()) == [SYMBOLS["s0"], SYMBOLS["s1"]]
    assert_expected_inline(", ".join(f"s{i} = {n}" for i, n in enumerate(second.values())), """s0 = 10, s1 = 8""")
