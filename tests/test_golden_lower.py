"""What linears and attentions are lowered to, as text, for three kinds of machines; what is lowered gives the same."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline
from golden_cases import HAS_VNNI, before_after, difference, graph, lowering_for, untrue
from torch import Tensor

from sqcompile.passes.lowering import float_attention, int8_attention, lower

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


def int8(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(2), dtype=torch.int8)


def scales(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3)) + 0.1


LINEAR_TENSORS = {
    "w1_int8": int8(6, 32), "w1_scale": scales(6), "b1": scales(6),
    "w2_int8": int8(2, 32), "w2_scale": scales(2), "b2": scales(2),
}  # fmt: skip


def linears(machine: str, monkeypatch) -> str:
    lowering_for(machine, monkeypatch)
    gm = graph(LINEARS, LINEAR_TENSORS)
    text, after = before_after(lower.lower, gm)
    if machine != "x86" or HAS_VNNI:
        assert difference(gm, after) <= 1e-6
    return text


def test_linears_of_one_input_become_one_linear(monkeypatch):
    assert_expected_inline(
        linears("reference", monkeypatch),
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


def test_linears_on_a_gpu_are_gemms_that_take_what_comes_after(monkeypatch):
    assert_expected_inline(
        linears("gpu", monkeypatch).partition("after:\n")[2],
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


def test_linears_on_x86_are_of_uint8_and_packed(monkeypatch):
    assert_expected_inline(
        linears("x86", monkeypatch).partition("after:\n")[2],
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


def test_the_example_in_the_docstring_of_lower(monkeypatch):
    assert untrue(lower, "".join(linears(m, monkeypatch) for m in ("reference", "gpu", "x86"))) == []


def test_a_norms_folded_weight_becomes_a_tensor(monkeypatch):
    lowering_for("reference", monkeypatch)
    gm = graph(
        """
        %x: f32[2, 3, 4] = input
        %g2 = aten.div(%g, %s)
        %n = aten.layer_norm(%x, [4], %g2)
        return %n
        """,
        {"g": [4], "s": scales(4)},
    )
    text, after = before_after(lower.lower, gm)
    assert_expected_inline(
        text.partition("after:\n")[2],
        """\
%x: f32[2, 3, 4] = input
%n: f32[2, 3, 4] = aten.layer_norm(%x, [4], %constant_g2)
return %n
""",
    )
    assert difference(gm, after) == 0


def test_a_static_scale_goes_into_the_columns(monkeypatch):
    lowering_for("reference", monkeypatch)
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
    text, after = before_after(lower.lower, gm)
    assert_expected_inline(
        text.partition("after:\n")[2],
        """\
%x: f32[2, 3, 32] = input
%r: f32[2, 3, 1] = sqcompile.finite_rows(%x)
%q: i8[2, 3, 32] = sqcompile.quantize(%x, %delta)
%int8_linear_default: f32[2, 3, 6] = sqcompile.int8_linear(%q, %r, %w1_merged, %w1_columns, None, float32)
return %int8_linear_default
""",
    )
    assert difference(gm, after) <= 1e-6


def test_experts_are_lowered_together(monkeypatch):
    lowering_for("reference", monkeypatch)
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
    text, after = before_after(lower.lower, gm)
    assert_expected_inline(
        text.partition("after:\n")[2],
        """\
%x: f32[8, 32] = input
%quantize_rows_default: (i8[8, 32], f32[8, 1]) = sqcompile.quantize_rows(%x, token, None)
%getitem_1: f32[8, 1] = getitem(%quantize_rows_default, 1)
%getitem: i8[8, 32] = getitem(%quantize_rows_default, 0)
%int8_grouped_linear_default: f32[8, 6] = sqcompile.int8_grouped_linear(%getitem, %getitem_1, %w_all, %w_columns, %offsets, float32)
return %int8_grouped_linear_default
""",
    )
    assert difference(gm, after) <= 1e-6


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


def shared(machine: str, monkeypatch, text: str = SHARED) -> str:
    """On a GPU, for which meta stands, in half precision; its numbers are those of the tests that run there."""
    lowering_for(machine, monkeypatch)
    if machine == "gpu":
        return before_after(float_attention.lower_attention, graph(text.replace("TYPE", "bf16"), device="meta"))[0]
    gm = graph(text.replace("TYPE", "f32"))
    text, after = before_after(float_attention.lower_attention, gm)
    inputs = [torch.randn(2, heads, 5, 16, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2)]
    inputs.append(torch.ones(2, 1, 5, 5, dtype=torch.bool).tril())
    assert difference(gm, after, inputs[: len(gm.graph.find_nodes(op="placeholder"))]) <= 1e-5
    return text


def test_attention_on_a_cpu_reads_shared_heads_once_and_stores_its_mask(monkeypatch):
    assert_expected_inline(
        shared("reference", monkeypatch),
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
    both = shared("reference", monkeypatch) + shared("gpu", monkeypatch)
    assert untrue(float_attention, both) == []


def test_attention_on_a_gpu_has_a_list_of_its_masks_blocks(monkeypatch):
    assert_expected_inline(
        shared("gpu", monkeypatch).partition("after:\n")[2],
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


def test_attention_on_a_gpu_without_a_mask_is_pytorchs_own_with_heads_unrepeated(monkeypatch):
    text = SHARED.replace("    %mask: b1[2, 1, 5, 5] = input\n", "").replace("%v4, %mask", "%v4")
    assert_expected_inline(
        shared("gpu", monkeypatch, text).partition("after:\n")[2],
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


def lowered_int8(machine: str, monkeypatch, text: str = INT8) -> str:
    lowering_for(machine, monkeypatch)
    gm = graph(text)
    text, after = before_after(int8_attention.lower_int8_attention, gm)
    inputs = [int8(2, 2, 5, 16), scales(2, 2, 5, 1) / 127, int8(2, 2, 5, 16), scales(2, 2, 5, 1) / 127]
    inputs += [torch.linspace(-1, 1, 320).reshape(2, 2, 5, 16), scales(2, 1, 5, 5)]
    assert difference(gm, after, inputs) <= 1e-5
    return text


def test_scores_scale_mask_softmax_and_values_become_one_operator(monkeypatch):
    assert_expected_inline(
        lowered_int8("reference", monkeypatch),
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
    assert untrue(int8_attention, lowered_int8("reference", monkeypatch)) == []


def test_on_a_gpu_the_mask_has_a_list_of_its_blocks(monkeypatch):
    assert_expected_inline(
        lowered_int8("gpu", monkeypatch).partition("after:\n")[2],
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


def test_scores_that_anything_else_happens_to_stay(monkeypatch):
    text = lowered_int8("reference", monkeypatch, INT8.replace("aten.mul(%s, 0.25)", "aten.sigmoid(%s)"))
    before, after = text.removeprefix("before:\n").split("after:\n")
    assert before == after
