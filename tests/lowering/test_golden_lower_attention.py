"""What attentions are lowered to, as text, for three kinds of machines; what is lowered gives the same."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline
from golden_cases import before_after, difference, graph, int8, only_after, scales, target_for, untrue

from sqcompile.passes.lowering import float_attention, int8_attention

SHARED = """
    %q: TYPE[2, 4, 5, 16] = input
    %k: TYPE[2, 2, 5, 16] = input
    %v: TYPE[2, 2, 5, 16] = input
    %mask: b1[2, 1, 5, 5] = input
    %k5 = aten.unsqueeze(%k, 2)
    %kw = aten.expand(%k5, [2, 2, 2, 5, 16])
    %k4 = aten.reshape(%kw, [2, 4, 5, 16])
    %v5 = aten.unsqueeze(%v, 2)
    %vw = aten.expand(%v5, [2, 2, 2, 5, 16])
    %v4 = aten.reshape(%vw, [2, 4, 5, 16])
    %y = aten.scaled_dot_product_attention(%q, %k4, %v4, %mask)
    return %y
"""


def shared(machine: str, text: str = SHARED) -> str:
    """On a GPU, for which meta stands, in half precision; its numbers are those of the tests that run there."""
    target = target_for(machine)
    if machine == "gpu":
        return before_after(
            lambda gm: float_attention.lower_attention(gm, lambda device: target),
            graph(text.replace("TYPE", "bf16"), device="meta"),
        )[0]
    gm = graph(text.replace("TYPE", "f32"))
    text, after = before_after(lambda gm: float_attention.lower_attention(gm, lambda device: target), gm)
    inputs = [torch.randn(2, heads, 5, 16, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2)]
    inputs.append(torch.ones(2, 1, 5, 5, dtype=torch.bool).tril())
    assert difference(gm, after, inputs[: len(gm.graph.find_nodes(op="placeholder"))]) <= 1e-5
    return text


def test_attention_on_a_cpu_reads_shared_heads_once_and_stores_its_mask():
    assert_expected_inline(
        shared("reference"),
        """\
before:
%q: f32[2, 4, 5, 16] = input
%k: f32[2, 2, 5, 16] = input
%v: f32[2, 2, 5, 16] = input
%mask: b1[2, 1, 5, 5] = input
%k5: f32[2, 2, 1, 5, 16] = aten.unsqueeze(%k, 2)
%kw: f32[2, 2, 2, 5, 16] = aten.expand(%k5, [2, 2, 2, 5, 16])
%k4: f32[2, 4, 5, 16] = aten.reshape(%kw, [2, 4, 5, 16])
%v5: f32[2, 2, 1, 5, 16] = aten.unsqueeze(%v, 2)
%vw: f32[2, 2, 2, 5, 16] = aten.expand(%v5, [2, 2, 2, 5, 16])
%v4: f32[2, 4, 5, 16] = aten.reshape(%vw, [2, 4, 5, 16])
%y: f32[2, 4, 5, 16] = aten.scaled_dot_product_attention(%q, %k4, %v4, %mask)
return %y
after:
%q: f32[2, 4, 5, 16] = input
%k: f32[2, 2, 5, 16] = input
%v: f32[2, 2, 5, 16] = input
%mask: b1[2, 1, 5, 5] = input
%scalar_tensor_default: f32[] = aten.scalar_tensor(0, dtype=float32)
%scalar_tensor_default_1: f32[] = aten.scalar_tensor(-inf, dtype=float32)
%where_self: f32[2, 1, 5, 5] = aten.where(%mask, %scalar_tensor_default, %scalar_tensor_default_1)
%stored_default: f32[2, 1, 5, 5] = sqcompile.stored(%where_self)
%mask_kind_default: i64[] = sqcompile.mask_kind(%stored_default)
%attention_default: f32[2, 4, 5, 16] = sqcompile.attention(%q, %k, %v, %stored_default, %mask_kind_default, False, None)
return %attention_default
""",
    )
    both = shared("reference") + shared("gpu")
    assert untrue(float_attention, both) == []


def test_attention_on_a_gpu_has_a_list_of_its_masks_blocks():
    assert_expected_inline(
        only_after(shared("gpu")),
        """\
%q: bf16[2, 4, 5, 16] = input
%k: bf16[2, 2, 5, 16] = input
%v: bf16[2, 2, 5, 16] = input
%mask: b1[2, 1, 5, 5] = input
%aligned_mask_default: b1[2, 1, 5, 5] = sqcompile.aligned_mask(%mask)
%mask_blocks_default: i32[2, 1, 3] = sqcompile.mask_blocks(%aligned_mask_default)
%attention_default: bf16[2, 4, 5, 16] = sqcompile.attention(%q, %k, %v, %aligned_mask_default, %mask_blocks_default, False, None)
return %attention_default
""",
    )


def test_attention_on_a_gpu_without_a_mask_is_pytorchs_own_with_heads_unrepeated():
    text = SHARED.replace("    %mask: b1[2, 1, 5, 5] = input\n", "").replace("%v4, %mask", "%v4")
    assert_expected_inline(
        only_after(shared("gpu", text)),
        """\
%q: bf16[2, 4, 5, 16] = input
%k: bf16[2, 2, 5, 16] = input
%v: bf16[2, 2, 5, 16] = input
%scaled_dot_product_attention_default: bf16[2, 4, 5, 16] = aten.scaled_dot_product_attention(%q, %k, %v, is_causal=False, scale=None, enable_gqa=True)
return %scaled_dot_product_attention_default
""",
    )


INT8 = """
    %qi: i8[2, 2, 5, 16] = input
    %qs: f32[2, 2, 5, 1] = input
    %ki: i8[2, 2, 5, 16] = input
    %ks: f32[2, 2, 5, 1] = input
    %v: f32[2, 2, 5, 16] = input
    %mask: f32[2, 1, 5, 5] = input
    %s = sqcompile.int8_scores(%qi, %qs, %ki, %ks, float32)
    %t = aten.mul(%s, 0.25)
    %u = aten.add(%t, %mask)
    %p = sqcompile.attention_weights(%u, float32)
    %y = sqcompile.attend(%p, %v)
    return %y
"""


def lowered_int8(machine: str, text: str = INT8) -> str:
    target = target_for(machine)
    gm = graph(text)
    text, after = before_after(lambda gm: int8_attention.lower_int8_attention(gm, lambda device: target), gm)
    inputs = [int8(2, 2, 5, 16), scales(2, 2, 5, 1) / 127, int8(2, 2, 5, 16), scales(2, 2, 5, 1) / 127]
    inputs += [torch.linspace(-1, 1, 320).reshape(2, 2, 5, 16), scales(2, 1, 5, 5)]
    assert difference(gm, after, inputs) <= 1e-5
    return text


def test_scores_scale_mask_softmax_and_values_become_one_operator():
    assert_expected_inline(
        lowered_int8("reference"),
        """\
before:
%qi: i8[2, 2, 5, 16] = input
%qs: f32[2, 2, 5, 1] = input
%ki: i8[2, 2, 5, 16] = input
%ks: f32[2, 2, 5, 1] = input
%v: f32[2, 2, 5, 16] = input
%mask: f32[2, 1, 5, 5] = input
%s: f32[2, 2, 5, 5] = sqcompile.int8_scores(%qi, %qs, %ki, %ks, float32)
%t: f32[2, 2, 5, 5] = aten.mul(%s, 0.25)
%u: f32[2, 2, 5, 5] = aten.add(%t, %mask)
%p: f32[2, 2, 5, 5] = sqcompile.attention_weights(%u, float32)
%y: f32[2, 2, 5, 16] = sqcompile.attend(%p, %v)
return %y
after:
%qi: i8[2, 2, 5, 16] = input
%qs: f32[2, 2, 5, 1] = input
%ki: i8[2, 2, 5, 16] = input
%ks: f32[2, 2, 5, 1] = input
%v: f32[2, 2, 5, 16] = input
%mask: f32[2, 1, 5, 5] = input
%int8_attention_default: f32[2, 2, 5, 16] = sqcompile.int8_attention(%qi, %qs, %ki, %ks, %v, None, %mask, None, None, 0.25, 0, float32)
return %int8_attention_default
""",
    )
    assert untrue(int8_attention, lowered_int8("reference")) == []


def test_on_a_gpu_the_mask_has_a_list_of_its_blocks():
    assert_expected_inline(
        only_after(lowered_int8("gpu")),
        """\
%qi: i8[2, 2, 5, 16] = input
%qs: f32[2, 2, 5, 1] = input
%ki: i8[2, 2, 5, 16] = input
%ks: f32[2, 2, 5, 1] = input
%v: f32[2, 2, 5, 16] = input
%mask: f32[2, 1, 5, 5] = input
%aligned_mask_default: f32[2, 1, 5, 5] = sqcompile.aligned_mask(%mask)
%mask_blocks_default: i32[2, 1, 3] = sqcompile.mask_blocks(%aligned_mask_default)
%int8_attention_default: f32[2, 2, 5, 16] = sqcompile.int8_attention(%qi, %qs, %ki, %ks, %v, None, %aligned_mask_default, %mask_blocks_default, None, 0.25, 0, float32)
return %int8_attention_default
""",
    )


def test_scores_that_anything_else_happens_to_stay():
    text = lowered_int8("reference", INT8.replace("aten.mul(%s, 0.25)", "aten.sigmoid(%s)"))
    before, after = text.removeprefix("before:\n").split("after:\n")
    assert before == after
