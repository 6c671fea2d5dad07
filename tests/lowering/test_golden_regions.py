"""A lowered graph cut into calls of its repeated blocks, and checks in front of tables, as text."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from golden_cases import before_after, difference, graph, only_after, untrue
from torch import fx

from sqcompile import IndexRangeError
from sqcompile.passes.ir.text import show
from sqcompile.passes.lowering import id_ranges, regions

BLOCKS = """
    %x: f32[s0, 4] = input
    %n0 = aten.rms_norm(%x, [4], %g0)
    %y0 = aten.linear(%n0, %w0)
    %h0 = aten.add(%x, %y0)
    %n1 = aten.rms_norm(%h0, [4], %g1)
    %y1 = aten.linear(%n1, %w1)
    %h1 = aten.add(%h0, %y1)
    %n2 = aten.rms_norm(%h1, [4], %g2)
    %y2 = aten.linear(%n2, %w2)
    %h2 = aten.add(%h1, %y2)
    %z = aten.relu(%h2)
    return [%z]
"""
TENSORS = {f"{kind}{i}": shape for i in range(3) for kind, shape in (("g", [4]), ("w", [4, 4]))}


def calls(outer: fx.GraphModule, parts: dict[str, regions.Region]) -> str:
    """The calls of a cut graph, and the code of each kind of region."""
    lines = []
    for n in outer.graph.nodes:
        if n.op == "call_module":
            lines.append(f"%{n.name} = {n.target}({', '.join(f'%{a.name}' for a in n.args)})")
        elif n.op == "call_function":
            lines.append(f"%{n.name} = getitem(%{n.args[0].name}, {n.args[1]})")
    kinds: dict[str | None, list[str]] = {}
    for name, part in parts.items():
        kinds.setdefault(part.key, []).append(name)
    for names in kinds.values():
        constants = len(parts[names[0]].constants)
        lines += ["", f"{', '.join(names)} with {constants} constants each:", show(parts[names[0]].gm)]
    return "\n".join(lines) + "\n"


def test_repeated_blocks_are_one_code_with_constants_of_their_own():
    gm = graph(BLOCKS, TENSORS)
    outer, parts = regions.cut(gm, regions.find_repeats(gm))
    text = calls(outer, parts)
    assert_expected_inline(
        text,
        """\
%region_0 = region_0(%x)
%getitem = getitem(%region_0, 0)
%region_1 = region_1(%getitem)
%getitem_1 = getitem(%region_1, 0)
%region_2 = region_2(%getitem_1)
%getitem_2 = getitem(%region_2, 0)
%region_3 = region_3(%getitem_2)
%getitem_3 = getitem(%region_3, 0)

region_0, region_1, region_2 with 2 constants each:
%input_0: f32[s0, 4] = input
%constant_0: f32[4] = input
%constant_1: f32[4, 4] = input
%n0: f32[s0, 4] = aten.rms_norm(%input_0, [4], %constant_0)
%y0: f32[s0, 4] = aten.linear(%n0, %constant_1)
%h0: f32[s0, 4] = aten.add(%input_0, %y0)
return [%h0]

region_3 with 0 constants each:
%input_0: f32[s0, 4] = input
%z: f32[s0, 4] = aten.relu(%input_0)
return [%z]
""",
    )
    assert untrue(regions, f"{show(gm)}\n{text}") == []
    assert difference(gm, outer) == 0


def test_a_block_that_does_something_else_is_no_repetition():
    gm = graph(BLOCKS.replace("%y1 = aten.linear(%n1, %w1)", "%u1 = aten.gelu(%n1)\n    %y1 = aten.neg(%u1)"), TENSORS)
    assert regions.find_repeats(gm) == []


TABLE = """
    %ids: i64[s0, s1] = input
    %y = aten.embedding(%embed.weight, %ids)
    return %y
"""


def test_ids_are_checked_in_front_of_a_table():
    gm = graph(TABLE, {"embed.weight": [8, 4]})
    text, after = before_after(id_ranges.check_ids, gm)
    assert_expected_inline(
        text,
        """\
before:
%ids: i64[s0, s1] = input
%y: f32[s0, s1, 4] = aten.embedding(%embed.weight, %ids)
return %y
after:
%ids: i64[s0, s1] = input
%checked_ids_default: i64[s0, s1] = sqcompile.checked_ids(%ids, 0, 8, ids indexes embed.weight)
%y: f32[s0, s1, 4] = aten.embedding(%embed.weight, %checked_ids_default)
return %y
""",
    )
    assert untrue(id_ranges, text) == []
    assert difference(gm, after) == 0
    with pytest.raises(IndexRangeError, match="takes 0 to 7, and is 8"):
        after(torch.full((5, 7), 8))


def test_positions_counted_from_a_mask_are_checked_where_they_are_read():
    gm = graph(
        """
        %mask: i64[s0, s1] = input
        %count = aten.cumsum(%mask, 1)
        %at = aten.sub(%count, 1)
        %y = aten.index(%places, [%at])
        return %y
        """,
        {"places": [64, 4]},
    )
    text, after = before_after(id_ranges.check_ids, gm)
    assert_expected_inline(
        only_after(text),
        """\
%mask: i64[s0, s1] = input
%count: i64[s0, s1] = aten.cumsum(%mask, 1)
%at: i64[s0, s1] = aten.sub(%count, 1)
%checked_ids_default: i64[s0, s1] = sqcompile.checked_ids(%at, -64, 64, what is computed from mask indexes places)
%y: f32[s0, s1, 4] = aten.index(%places, [%checked_ids_default])
return %y
""",
    )
    assert difference(gm, after) == 0


def test_what_a_model_chooses_by_its_activations_is_not_checked():
    gm = graph(
        """
        %x: f32[s0, 8] = input
        %i = aten.argmax(%x, -1)
        %y = aten.embedding(%w, %i)
        return %y
        """,
        {"w": [8, 4]},
    )
    text, _ = before_after(id_ranges.check_ids, gm)
    before, after = text.removeprefix("before:\n").split("after:\n")
    assert before == after
