"""Where labels go, as text: the labels of a producer, and the sites and refusals of match."""

from __future__ import annotations

from expecttest import assert_expected_inline
from golden_cases import graph, untrue
from torch import Tensor, fx

from sqcompile.passes.ir.graph import find_linears
from sqcompile.passes.ir.sizes import free_symbols
from sqcompile.passes.ir.text import show
from sqcompile.passes.labels import interpreter, match


def sites(gm: fx.GraphModule) -> str:
    """The result of match: a site with the label of each column of its balance layers, or why a linear has none."""
    found, refusals = match.match(gm)
    lines = []
    for s in found:
        lines.append(f"{s.name}: %{s.producer} / s, {s.reason}, {int(s.free.sum())} of {s.channels} channels")
        lines += [f"    {l.name}[:, j] * s{labels(index)}" for l, index in s.balance]
        lines += [f"    %{node} argument {i} / s{labels(index)}" for node, i, index in s.adds]
    return "\n".join([*lines, *(f"{r.linear.name} refused: {r.reason}" for r in refusals)]) + "\n"


def labels(index: Tensor) -> str:
    return str(index.flatten().tolist()).replace(",", "")


NORM = """
    %x: f32[s0, s1, 4] = input
    %n = aten.layer_norm(%x, [4], %g, %b)
    %q = aten.linear(%n, %wq)
    %k = aten.linear(%n, %wk)
    return [%q, %k]
"""


def test_linears_that_read_a_norm_are_its_balance_layers():
    gm = graph(NORM, {"g": [4], "b": [4], "wq": [6, 4], "wk": [2, 4]})
    text = f"{show(gm)}\n->\n{sites(gm)}"
    assert untrue(match, text) == []
    assert_expected_inline(
        text,
        """\
%x: f32[s0, s1, 4] = input
%n: f32[s0, s1, 4] = aten.layer_norm(%x, [4], %g, %b)
%q: f32[s0, s1, 6] = aten.linear(%n, %wq)
%k: f32[s0, s1, 2] = aten.linear(%n, %wk)
return [%q, %k]
->
g -> wq, wk: %n / s, folded into norm, 4 of 4 channels
    wq[:, j] * s[0 1 2 3]
    wk[:, j] * s[0 1 2 3]
""",
    )


def test_a_norm_whose_output_is_read_by_something_else_is_refused():
    gm = graph(NORM.replace("[%q, %k]", "[%q, %n]"), {"g": [4], "b": [4], "wq": [6, 4], "wk": [2, 4]})
    assert_expected_inline(
        sites(gm),
        """\
wq refused: g is an output of the model
wk refused: g is an output of the model
""",
    )


def test_up_and_down_around_a_relu_and_a_gate():
    gm = graph(
        """
        %x: f32[s0, s1, 4] = input
        %up = aten.linear(%x, %wu)
        %gate = aten.linear(%x, %wg)
        %act = aten.silu(%gate)
        %h = aten.mul(%act, %up)
        %y = aten.linear(%h, %wd)
        %r = aten.relu(%y)
        %z = aten.linear(%r, %wo)
        return %z
        """,
        {"wu": [6, 4], "wg": [6, 4], "wd": [4, 6], "wo": [4, 4]},
    )
    assert_expected_inline(
        sites(gm),
        """\
wu -> wd: %up / s, folded into linear, 6 of 6 channels
    wd[:, j] * s[0 1 2 3 4 5]
wd -> wo: %y / s, folded into linear, 4 of 4 channels
    wo[:, j] * s[0 1 2 3]
wu refused: reads an input of the model
wg refused: reads an input of the model
""",
    )


def test_a_constant_added_on_the_way_is_divided_too():
    gm = graph(
        """
        %x: f32[s0, s1, 4] = input
        %n = aten.mul(%x, %g)
        %m = aten.add(%n, %shift)
        %y = aten.linear(%m, %w)
        return %y
        """,
        {"g": [4], "shift": [4], "w": [6, 4]},
    )
    assert_expected_inline(
        sites(gm),
        """\
g -> w: %n / s, folded into scale, 4 of 4 channels
    w[:, j] * s[0 1 2 3]
    %m argument 1 / s[0 1 2 3]
""",
    )


def test_a_value_head_that_serves_two_query_heads_scales_two_columns():
    gm = graph(
        """
        %x: f32[s0, s1, 4] = input
        %q = aten.linear(%x, %wq)
        %qh = aten.unflatten(%q, -1, [4, 2])
        %qt = aten.transpose(%qh, 1, 2)
        %kv = aten.linear(%x, %wkv)
        %kvh = aten.unflatten(%kv, -1, [4, 2])
        %kvt = aten.transpose(%kvh, 1, 2)
        %k = aten.slice(%kvt, 1, 0, 2)
        %v = aten.slice(%kvt, 1, 2, 4)
        %a = aten.scaled_dot_product_attention(%qt, %k, %v, enable_gqa=True)
        %at = aten.transpose(%a, 1, 2)
        %af = aten.flatten(%at, 2)
        %o = aten.linear(%af, %wo)
        return %o
        """,
        {"wq": [8, 4], "wkv": [8, 4], "wo": [4, 8]},
    )
    assert_expected_inline(
        sites(gm),
        """\
wkv -> wo: %kv / s, folded into linear, 4 of 8 channels
    wo[:, j] * s[4 5 4 5 6 7 6 7]
wq refused: reads an input of the model
wkv refused: reads an input of the model
""",
    )


def test_labels_of_one_producer_at_one_choice_of_sizes():
    gm = graph(
        """
        %x: f32[s0, s1, 4] = input
        %y = aten.linear(%x, %wy)
        %t = aten.flip(%y, [-1])
        %r = aten.relu(%t)
        %z = aten.linear(%r, %wz)
        %c = aten.slice(%r, -1, 0, 1)
        %g = aten.gelu(%c)
        return [%z, %g]
        """,
        {"wy": [4, 4], "wz": [2, 4]},
    )
    flow = interpreter.run_labels(gm, find_linears(gm), dict.fromkeys(free_symbols(gm), 3))["y"]
    text = "\n".join(
        [
            show(gm),
            "->",
            *(f"label of each column of %{node}: {labels(index)}" for node, index in flow.balance),
            *(f"label {label} refused: {reason}" for label, reason in flow.refused.items()),
            *(f"stopped at %{node}: {reason}" for node, reason in flow.stops.items()),
        ]
    )
    assert untrue(interpreter, text) == []
    assert_expected_inline(
        text + "\n",
        """\
%x: f32[s0, s1, 4] = input
%y: f32[s0, s1, 4] = aten.linear(%x, %wy)
%t: f32[s0, s1, 4] = aten.flip(%y, [-1])
%r: f32[s0, s1, 4] = aten.relu(%t)
%z: f32[s0, s1, 2] = aten.linear(%r, %wz)
%c: f32[s0, s1, 1] = aten.slice(%r, -1, 0, 1)
%g: f32[s0, s1, 1] = aten.gelu(%c)
return [%z, %g]
->
label of each column of %z: [3 2 1 0]
label 3 refused: passes gelu, which does not commute with a scale
stopped at %g: passes gelu, which does not commute with a scale
""",
    )
