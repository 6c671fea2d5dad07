"""What insert_qdq makes of attentions, as text, and how far the result is from that in float."""

from __future__ import annotations

from typing import Any

import torch
from expecttest import assert_expected_inline
from golden_cases import ONE_STEP, graph, only_after, planned, quantized, untrue
from torch import Tensor

from sqcompile import Recipe
from sqcompile.passes.attention.chains import find_attentions
from sqcompile.passes.rewrite import insert_qdq_attention
from sqcompile.plan.plan import AttentionPlan

SPELLED = """
    %q: f32[2, 2, 5, 16] = input
    %k: f32[2, 2, 5, 16] = input
    %v: f32[2, 2, 5, 16] = input
    %kt = aten.transpose(%k, -2, -1)
    %s = aten.matmul(%q, %kt)
    %t = aten.mul(%s, 0.25)
    %p = aten.softmax(%t, -1)
    %y = aten.matmul(%p, %v)
    return %y
"""
WHOLE = """
    %q: f32[2, 2, 5, 16] = input
    %k: f32[2, 2, 5, 16] = input
    %v: f32[2, 2, 5, 16] = input
    %y = aten.scaled_dot_product_attention(%q, %k, %v, is_causal=True)
    return %y
"""


def attended(text: str, products: Any, heads: dict[str, Tensor] | None = None, **how: Any) -> str:
    gm = graph(text)
    [a] = find_attentions(gm)
    attention = AttentionPlan(a.name, products, how.pop("smoothing", "none"), "", shape=(2, 2, 16), **how)
    static = "per_tensor_static" if attention.q_scale else "per_token"
    plan = planned(gm, attention=(attention,), heads=heads or {}, recipe=Recipe(attention=products, qk=static))
    return quantized(gm, plan)


def test_the_products_of_an_attention_are_of_int8_values():
    qk_pv = attended(SPELLED, "qk_pv")
    assert_expected_inline(
        qk_pv,
        """\
before:
%q: f32[2, 2, 5, 16] = input
%k: f32[2, 2, 5, 16] = input
%v: f32[2, 2, 5, 16] = input
%kt: f32[2, 2, 16, 5] = aten.transpose(%k, -2, -1)
%s: f32[2, 2, 5, 5] = aten.matmul(%q, %kt)
%t: f32[2, 2, 5, 5] = aten.mul(%s, 0.25)
%p: f32[2, 2, 5, 5] = aten.softmax(%t, -1)
%y: f32[2, 2, 5, 16] = aten.matmul(%p, %v)
return %y
after:
%q: f32[2, 2, 5, 16] = input
%k: f32[2, 2, 5, 16] = input
%v: f32[2, 2, 5, 16] = input
%token_scale_default: f32[2, 2, 5, 1] = sqcompile.token_scale(%q)
%quantize_default: i8[2, 2, 5, 16] = sqcompile.quantize(%q, %token_scale_default)
%token_scale_default_1: f32[2, 2, 5, 1] = sqcompile.token_scale(%k)
%quantize_default_1: i8[2, 2, 5, 16] = sqcompile.quantize(%k, %token_scale_default_1)
%int8_scores_default: f32[2, 2, 5, 5] = sqcompile.int8_scores(%quantize_default, %token_scale_default, %quantize_default_1, %token_scale_default_1, float32)
%t: f32[2, 2, 5, 5] = aten.mul(%int8_scores_default, 0.25)
%scale_over_default: f32[2, 2, 1, 16] = sqcompile.scale_over(%v, [-2])
%quantize_default_2: i8[2, 2, 5, 16] = sqcompile.quantize(%v, %scale_over_default)
%int8_attend_default: f32[2, 2, 5, 16] = sqcompile.int8_attend(%t, %quantize_default_2, %scale_over_default, float32)
return %int8_attend_default
""",
    )
    assert untrue(insert_qdq_attention, qk_pv + attended(SPELLED, "qk") + static_attention()) == []


def test_values_stay_in_float_where_only_scores_are_quantized():
    assert_expected_inline(
        only_after(attended(SPELLED, "qk")),
        """\
%q: f32[2, 2, 5, 16] = input
%k: f32[2, 2, 5, 16] = input
%v: f32[2, 2, 5, 16] = input
%token_scale_default: f32[2, 2, 5, 1] = sqcompile.token_scale(%q)
%quantize_default: i8[2, 2, 5, 16] = sqcompile.quantize(%q, %token_scale_default)
%token_scale_default_1: f32[2, 2, 5, 1] = sqcompile.token_scale(%k)
%quantize_default_1: i8[2, 2, 5, 16] = sqcompile.quantize(%k, %token_scale_default_1)
%int8_scores_default: f32[2, 2, 5, 5] = sqcompile.int8_scores(%quantize_default, %token_scale_default, %quantize_default_1, %token_scale_default_1, float32)
%t: f32[2, 2, 5, 5] = aten.mul(%int8_scores_default, 0.25)
%attention_weights_default: f32[2, 2, 5, 5] = sqcompile.attention_weights(%t, float32)
%attend_default: f32[2, 2, 5, 16] = sqcompile.attend(%attention_weights_default, %v)
return %attend_default
""",
    )


def static_attention() -> str:
    heads = {"p/value_scale": torch.full((2, 16), 4 * ONE_STEP)}
    return attended(SPELLED, "qk_pv", heads, q_scale=4 * ONE_STEP, k_scale=4 * ONE_STEP)


def test_static_scales_of_an_attention():
    assert_expected_inline(
        only_after(static_attention()),
        """\
%q: f32[2, 2, 5, 16] = input
%k: f32[2, 2, 5, 16] = input
%v: f32[2, 2, 5, 16] = input
%quantize_default: i8[2, 2, 5, 16] = sqcompile.quantize(%q, %p.query_scale)
%finite_rows_default: f32[2, 2, 5, 1] = sqcompile.finite_rows(%q)
%mul_tensor: f32[2, 2, 5, 1] = aten.mul(%finite_rows_default, %p.query_scale)
%quantize_default_1: i8[2, 2, 5, 16] = sqcompile.quantize(%k, %p.key_scale)
%finite_heads_default: f32[2, 2, 1, 1] = sqcompile.finite_heads(%k)
%mul_tensor_1: f32[2, 2, 1, 1] = aten.mul(%finite_heads_default, %p.key_scale)
%int8_scores_default: f32[2, 2, 5, 5] = sqcompile.int8_scores(%quantize_default, %mul_tensor, %quantize_default_1, %mul_tensor_1, float32)
%t: f32[2, 2, 5, 5] = aten.mul(%int8_scores_default, 0.25)
%quantize_default_2: i8[2, 2, 5, 16] = sqcompile.quantize(%v, %p.value_scale)
%finite_heads_default_1: f32[2, 2, 1, 1] = sqcompile.finite_heads(%v)
%mul_tensor_2: f32[2, 2, 1, 16] = aten.mul(%finite_heads_default_1, %p.value_scale)
%int8_attend_default: f32[2, 2, 5, 16] = sqcompile.int8_attend(%t, %quantize_default_2, %mul_tensor_2, float32)
return %int8_attend_default
""",
    )


def test_an_attention_in_one_operator_is_spelled_out_and_multiplied_by_its_scale():
    heads = {"y/query_by": torch.full((2, 16), 2.0), "y/key_by": torch.full((2, 16), 0.5)}
    text = attended(WHOLE, "qk", heads, smoothing="multiplied")
    assert_expected_inline(
        only_after(text),
        """\
%q: f32[2, 2, 5, 16] = input
%k: f32[2, 2, 5, 16] = input
%v: f32[2, 2, 5, 16] = input
%mul_tensor: f32[2, 2, 5, 16] = aten.mul(%q, %y.query_by)
%mul_tensor_1: f32[2, 2, 5, 16] = aten.mul(%k, %y.key_by)
%token_scale_default: f32[2, 2, 5, 1] = sqcompile.token_scale(%mul_tensor)
%quantize_default: i8[2, 2, 5, 16] = sqcompile.quantize(%mul_tensor, %token_scale_default)
%token_scale_default_1: f32[2, 2, 5, 1] = sqcompile.token_scale(%mul_tensor_1)
%quantize_default_1: i8[2, 2, 5, 16] = sqcompile.quantize(%mul_tensor_1, %token_scale_default_1)
%int8_scores_default: f32[2, 2, 5, 5] = sqcompile.int8_scores(%quantize_default, %token_scale_default, %quantize_default_1, %token_scale_default_1, float32)
%mul_tensor_2: f32[2, 2, 5, 5] = aten.mul(%int8_scores_default, 0.25)
%mask_scores_default: f32[2, 2, 5, 5] = sqcompile.mask_scores(%mul_tensor_2, None, 0)
%attention_weights_default: f32[2, 2, 5, 5] = sqcompile.attention_weights(%mask_scores_default, float32)
%attend_default: f32[2, 2, 5, 16] = sqcompile.attend(%attention_weights_default, %v)
return %attend_default
""",
    )
