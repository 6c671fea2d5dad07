"""What functionalize makes of writes, as text; the result is the same to the bit."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline
from golden_cases import before_after, difference, graph, untrue

from sqcompile.passes.canonical import functionalize

WRITES = """
    %x: f32[2, 4, 8] = input
    %y: f32[2, 3] = input
    %t = aten.mul(%x, 2.0)
    %row = aten.select(%t, 1, 3)
    %part = aten.slice(%row, 1, 0, 3)
    %w = aten.copy_(%part, %y)
    %z = aten.sum(%t)
    return %z
"""


def test_a_write_to_a_view_is_a_new_value_of_what_it_is_a_view_of():
    gm = graph(WRITES)
    text, after = before_after(functionalize.functionalize, gm)
    assert_expected_inline(
        text,
        """\
before:
%x: f32[2, 4, 8] = input
%y: f32[2, 3] = input
%t: f32[2, 4, 8] = aten.mul(%x, 2)
%row: f32[2, 8] = aten.select(%t, 1, 3)
%part: f32[2, 3] = aten.slice(%row, 1, 0, 3)
%w: f32[2, 3] = aten.copy_(%part, %y)
%z: f32[] = aten.sum(%t)
return %z
after:
%x: f32[2, 4, 8] = input
%y: f32[2, 3] = input
%t: f32[2, 4, 8] = aten.mul(%x, 2)
%row: f32[2, 8] = aten.select(%t, 1, 3)
%slice_scatter_default: f32[2, 8] = aten.slice_scatter(%row, %y, 1, 0, 3)
%select_scatter_default: f32[2, 4, 8] = aten.select_scatter(%t, %slice_scatter_default, 1, 3)
%z: f32[] = aten.sum(%select_scatter_default)
return %z
""",
    )
    assert untrue(functionalize, text) == []
    assert difference(gm, after) == 0


def test_an_operation_in_place_becomes_one_that_is_not_and_old_views_are_made_anew():
    gm = graph("""
        %x: f32[2, 4, 8] = input
        %t = aten.mul(%x, 2.0)
        %row = aten.select(%t, 1, 3)
        %w = aten.add_(%t, 1.0)
        %z = aten.neg(%row)
        return %z
    """)
    text, after = before_after(functionalize.functionalize, gm)
    assert_expected_inline(
        text,
        """\
before:
%x: f32[2, 4, 8] = input
%t: f32[2, 4, 8] = aten.mul(%x, 2)
%row: f32[2, 8] = aten.select(%t, 1, 3)
%w: f32[2, 4, 8] = aten.add_(%t, 1)
%z: f32[2, 8] = aten.neg(%row)
return %z
after:
%x: f32[2, 4, 8] = input
%t: f32[2, 4, 8] = aten.mul(%x, 2)
%add_tensor: f32[2, 4, 8] = aten.add(%t, 1)
%select_int: f32[2, 8] = aten.select(%add_tensor, 1, 3)
%z: f32[2, 8] = aten.neg(%select_int)
return %z
""",
    )
    assert difference(gm, after) == 0


def test_a_write_to_an_input_is_not_the_graphs_own():
    gm = graph("""
        %x: f32[2, 4] = input
        %w = aten.add_(%x, 1.0)
        return %w
    """)
    assert functionalize.functionalize(gm) is False
    assert torch.ops.aten.add_.Tensor in {n.target for n in gm.graph.nodes}
