"""What linears are lowered to, as text, for three kinds of machines; what is lowered gives the same."""

from __future__ import annotations

import functools

import torch
from expecttest import assert_expected_inline
from golden_cases import HAS_VNNI, before_after, difference, graph, int8, only_after, scales, target_for, untrue

from sqcompile.passes.lowering import lower

LINEARS = """
    %x: f32[2, 3, 32] = input
    %s = sqcompile.token_scale(%x)
    %q = sqcompile.quantize(%x, %s)
    %qf = aten.to(%q, float32)
    %w1f = aten.to(%w1_int8, float32)
    %acc1 = aten.linear(%qf, %w1f)
    %y1 = sqcompile.dequantize(%acc1, %s, %w1_scale, %b1, float32)
    %w2f = aten.to(%w2_int8, float32)
    %acc2 = aten.linear(%qf, %w2f)
    %y2 = sqcompile.dequantize(%acc2, %s, %w2_scale, %b2, float32)
    return [%y1, %y2]
"""


LINEAR_TENSORS = {
    "w1_int8": int8(6, 32), "w1_scale": scales(6), "b1": scales(6),
    "w2_int8": int8(2, 32), "w2_scale": scales(2), "b2": scales(2),
}  # fmt: skip


def lowered_for(machine: str = "reference"):
    return functools.partial(lower.lower, target=target_for(machine))


def linears(machine: str) -> str:
    gm = graph(LINEARS, LINEAR_TENSORS)
    text, after = before_after(lowered_for(machine), gm)
    if machine != "x86" or HAS_VNNI:
        assert difference(gm, after) <= 1e-6
    return text


def test_linears_of_one_input_become_one_linear():
    assert_expected_inline(
        linears("reference"),
        """\
before:
%x: f32[2, 3, 32] = input
%s: f32[2, 3, 1] = sqcompile.token_scale(%x)
%q: i8[2, 3, 32] = sqcompile.quantize(%x, %s)
%qf: f32[2, 3, 32] = aten.to(%q, float32)
%w1f: f32[6, 32] = aten.to(%w1_int8, float32)
%acc1: f32[2, 3, 6] = aten.linear(%qf, %w1f)
%y1: f32[2, 3, 6] = sqcompile.dequantize(%acc1, %s, %w1_scale, %b1, float32)
%w2f: f32[2, 32] = aten.to(%w2_int8, float32)
%acc2: f32[2, 3, 2] = aten.linear(%qf, %w2f)
%y2: f32[2, 3, 2] = sqcompile.dequantize(%acc2, %s, %w2_scale, %b2, float32)
return [%y1, %y2]
after:
%x: f32[2, 3, 32] = input
%s: f32[2, 3, 1] = sqcompile.token_scale(%x)
%q: i8[2, 3, 32] = sqcompile.quantize(%x, %s)
%int8_linear_default: f32[2, 3, 8] = sqcompile.int8_linear(%q, %s, %w1_merged, %w1_columns, %w1_bias, float32)
%slice_tensor: f32[2, 3, 6] = aten.slice(%int8_linear_default, -1, 0, 6)
%slice_tensor_1: f32[2, 3, 2] = aten.slice(%int8_linear_default, -1, 6, 8)
%contiguous_default: f32[2, 3, 6] = aten.contiguous(%slice_tensor)
%contiguous_default_1: f32[2, 3, 2] = aten.contiguous(%slice_tensor_1)
return [%contiguous_default, %contiguous_default_1]
""",
    )


def test_linears_on_a_gpu_are_gemms_that_take_what_comes_after():
    assert_expected_inline(
        only_after(linears("gpu")),
        """\
%x: f32[2, 3, 32] = input
%quantize_rows_default: (i8[2, 3, 32], f32[2, 3, 1]) = sqcompile.quantize_rows(%x, token, None)
%getitem_1: f32[2, 3, 1] = getitem(%quantize_rows_default, 1)
%getitem: i8[2, 3, 32] = getitem(%quantize_rows_default, 0)
%int8_gemm_default: f32[2, 3, 8] = sqcompile.int8_gemm(%getitem, %getitem_1, %w1_merged, %w1_columns, %w1_bias, float32, none, None, None)
%slice_tensor: f32[2, 3, 6] = aten.slice(%int8_gemm_default, -1, 0, 6)
%slice_tensor_1: f32[2, 3, 2] = aten.slice(%int8_gemm_default, -1, 6, 8)
%contiguous_default: f32[2, 3, 6] = aten.contiguous(%slice_tensor)
%contiguous_default_1: f32[2, 3, 2] = aten.contiguous(%slice_tensor_1)
return [%contiguous_default, %contiguous_default_1]
""",
    )


def test_linears_on_x86_are_of_uint8_and_packed():
    assert_expected_inline(
        only_after(linears("x86")),
        """\
%x: f32[2, 3, 32] = input
%s: f32[2, 3, 1] = sqcompile.token_scale(%x)
%quantize_default: u8[2, 3, 32] = sqcompile.quantize(%x, %s, 128)
%int8_linear_packed_default: f32[2, 3, 8] = sqcompile.int8_linear_packed(%quantize_default, %s, %w1_packed, %w1_columns, %w1_sum, %w1_bias, float32)
%slice_tensor: f32[2, 3, 6] = aten.slice(%int8_linear_packed_default, -1, 0, 6)
%slice_tensor_1: f32[2, 3, 2] = aten.slice(%int8_linear_packed_default, -1, 6, 8)
%contiguous_default: f32[2, 3, 6] = aten.contiguous(%slice_tensor)
%contiguous_default_1: f32[2, 3, 2] = aten.contiguous(%slice_tensor_1)
return [%contiguous_default, %contiguous_default_1]
""",
    )


def test_the_example_in_the_docstring_of_lower():
    assert untrue(lower, "".join(linears(m) for m in ("reference", "gpu", "x86"))) == []


def test_a_norms_folded_weight_becomes_a_tensor():
    gm = graph(
        """
        %x: f32[2, 3, 4] = input
        %g2 = aten.div(%g, %s)
        %n = aten.layer_norm(%x, [4], %g2)
        return %n
        """,
        {"g": [4], "s": scales(4)},
    )
    text, after = before_after(lowered_for(), gm)
    assert_expected_inline(
        only_after(text),
        """\
%x: f32[2, 3, 4] = input
%n: f32[2, 3, 4] = aten.layer_norm(%x, [4], %constant_g2)
return %n
""",
    )
    assert difference(gm, after) == 0


def test_a_static_scale_goes_into_the_columns():
    gm = graph(
        """
        %x: f32[2, 3, 32] = input
        %r = sqcompile.finite_rows(%x)
        %q = sqcompile.quantize(%x, %delta)
        %qf = aten.to(%q, float32)
        %columns = aten.mul(%w1_scale, %delta)
        %w1f = aten.to(%w1_int8, float32)
        %acc = aten.linear(%qf, %w1f)
        %y = sqcompile.dequantize(%acc, %r, %columns, None, float32)
        return %y
        """,
        {**LINEAR_TENSORS, "delta": torch.tensor(0.03)},
    )
    text, after = before_after(lowered_for(), gm)
    assert_expected_inline(
        only_after(text),
        """\
%x: f32[2, 3, 32] = input
%r: f32[2, 3, 1] = sqcompile.finite_rows(%x)
%q: i8[2, 3, 32] = sqcompile.quantize(%x, %delta)
%int8_linear_default: f32[2, 3, 6] = sqcompile.int8_linear(%q, %r, %w1_merged, %w1_columns, None, float32)
return %int8_linear_default
""",
    )
    assert difference(gm, after) <= 1e-6


def test_experts_are_lowered_together():
    gm = graph(
        """
        %x: f32[8, 32] = input
        %s = sqcompile.token_scale(%x)
        %q = sqcompile.quantize(%x, %s)
        %qf = aten.to(%q, float32)
        %wf = aten.to(%w_int8, float32)
        %acc = sqcompile.grouped_linear(%qf, %wf, %offsets)
        %y = sqcompile.grouped_dequantize(%acc, %s, %w_scale, %offsets, float32)
        return %y
        """,
        {"w_int8": int8(2, 6, 32), "w_scale": scales(2, 6), "offsets": torch.tensor([3, 8], dtype=torch.int32)},
    )
    text, after = before_after(lowered_for(), gm)
    assert_expected_inline(
        only_after(text),
        """\
%x: f32[8, 32] = input
%s: f32[8, 1] = sqcompile.token_scale(%x)
%q: i8[8, 32] = sqcompile.quantize(%x, %s)
%int8_grouped_linear_default: f32[8, 6] = sqcompile.int8_grouped_linear(%q, %s, %w_all, %w_columns, %offsets, float32)
return %int8_grouped_linear_default
""",
    )
    assert difference(gm, after) <= 1e-6
