"""What insert_qdq makes of linears, as text, and how far the result is from that in float."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline
from golden_cases import ONE_STEP, graph, only_after, planned, quantized, untrue

from sqcompile import Recipe
from sqcompile.passes.rewrite import insert_qdq
from sqcompile.plan.plan import LayerPlan

TWO = """
    %x: f32[2, 3, 32] = input
    %q = aten.linear(%x, %wq, %b)
    %k = aten.linear(%x, %wk)
    return [%q, %k]
"""
TWO_TENSORS = {"wq": [6, 32], "b": [6], "wk": [2, 32]}


def dynamic() -> str:
    gm = graph(TWO, TWO_TENSORS)
    return quantized(gm, planned(gm))


def static() -> str:
    gm = graph(TWO.replace("return [%q, %k]", "return %q").replace("    %k = aten.linear(%x, %wk)\n", ""), TWO_TENSORS)
    layer = LayerPlan("wq", "linear", True, "none", "", input_scale=4 * ONE_STEP)
    return quantized(gm, planned(gm, layers=(layer,), recipe=Recipe(activation="per_tensor_static")))


def test_linears_that_read_one_tensor_share_its_int8_values():
    assert_expected_inline(
        dynamic(),
        """\
before:
%x: f32[2, 3, 32] = input
%q: f32[2, 3, 6] = aten.linear(%x, %wq, %b)
%k: f32[2, 3, 2] = aten.linear(%x, %wk)
return [%q, %k]
after:
%x: f32[2, 3, 32] = input
%token_scale_default: f32[2, 3, 1] = sqcompile.token_scale(%x)
%quantize_default: i8[2, 3, 32] = sqcompile.quantize(%x, %token_scale_default)
%to_dtype: f32[2, 3, 32] = aten.to(%quantize_default, float32)
%to_dtype_1: f32[6, 32] = aten.to(%wq_int8, float32)
%linear_default: f32[2, 3, 6] = aten.linear(%to_dtype, %to_dtype_1)
%dequantize_default: f32[2, 3, 6] = sqcompile.dequantize(%linear_default, %token_scale_default, %wq_scale, %b, float32)
%to_dtype_2: f32[2, 32] = aten.to(%wk_int8, float32)
%linear_default_1: f32[2, 3, 2] = aten.linear(%to_dtype, %to_dtype_2)
%dequantize_default_1: f32[2, 3, 2] = sqcompile.dequantize(%linear_default_1, %token_scale_default, %wk_scale, None, float32)
return [%dequantize_default, %dequantize_default_1]
""",
    )
    assert untrue(insert_qdq, dynamic() + static()) == []


def test_a_static_scale_multiplies_the_weights_scale():
    assert_expected_inline(
        only_after(static()),
        """\
%x: f32[2, 3, 32] = input
%finite_rows_default: f32[2, 3, 1] = sqcompile.finite_rows(%x)
%quantize_default: i8[2, 3, 32] = sqcompile.quantize(%x, %wq_input_scale)
%to_dtype: f32[2, 3, 32] = aten.to(%quantize_default, float32)
%mul_tensor: f32[6] = aten.mul(%wq_scale, %wq_input_scale)
%to_dtype_1: f32[6, 32] = aten.to(%wq_int8, float32)
%linear_default: f32[2, 3, 6] = aten.linear(%to_dtype, %to_dtype_1)
%dequantize_default: f32[2, 3, 6] = sqcompile.dequantize(%linear_default, %finite_rows_default, %mul_tensor, %b, float32)
return %dequantize_default
""",
    )


def test_one_scale_for_the_whole_input_and_one_linear_that_stays_in_float():
    gm = graph(TWO, TWO_TENSORS)
    layers = planned(gm).layers[1:]
    text = quantized(gm, planned(gm, layers=layers, recipe=Recipe(activation="per_tensor")))
    assert_expected_inline(
        only_after(text),
        """\
%x: f32[2, 3, 32] = input
%tensor_scale_default: f32[] = sqcompile.tensor_scale(%x)
%quantize_default: i8[2, 3, 32] = sqcompile.quantize(%x, %tensor_scale_default)
%to_dtype: f32[2, 3, 32] = aten.to(%quantize_default, float32)
%q: f32[2, 3, 6] = aten.linear(%x, %wq, %b)
%to_dtype_1: f32[2, 32] = aten.to(%wk_int8, float32)
%linear_default: f32[2, 3, 2] = aten.linear(%to_dtype, %to_dtype_1)
%dequantize_default: f32[2, 3, 2] = sqcompile.dequantize(%linear_default, %tensor_scale_default, %wk_scale, None, float32)
return [%q, %dequantize_default]
""",
    )


def test_experts_are_quantized_a_matrix_each():
    gm = graph(
        """
        %x: f32[8, 32] = input
        %y = sqcompile.grouped_linear(%x, %w, %offsets)
        return %y
        """,
        {"w": [2, 6, 32], "offsets": torch.tensor([3, 8], dtype=torch.int32)},
    )
    assert_expected_inline(
        only_after(quantized(gm, planned(gm))),
        """\
%x: f32[8, 32] = input
%token_scale_default: f32[8, 1] = sqcompile.token_scale(%x)
%quantize_default: i8[8, 32] = sqcompile.quantize(%x, %token_scale_default)
%to_dtype: f32[8, 32] = aten.to(%quantize_default, float32)
%to_dtype_1: f32[2, 6, 32] = aten.to(%w_int8, float32)
%grouped_linear_default: f32[8, 6] = sqcompile.grouped_linear(%to_dtype, %to_dtype_1, %offsets)
%grouped_dequantize_default: f32[8, 6] = sqcompile.grouped_dequantize(%grouped_linear_default, %token_scale_default, %w_scale, %offsets, float32)
return %grouped_dequantize_default
""",
    )
