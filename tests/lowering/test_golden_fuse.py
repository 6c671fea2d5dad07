"""What fuse makes of a graph lowered for GPUs, as text; the fused operators' plain versions give the same, to the bit."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline
from golden_cases import before_after, difference, expression, graph, inputs_of, only_after, untrue
from torch import Tensor

from sqcompile.passes.lowering import fuse

GEMM = "sqcompile.int8_gemm(%q, %r, %w, %ws, None, float32, 'none', None, None)"
INT8 = "%q: i8[2, 3, 4] = input\n%r: f32[2, 3, 1] = input"


def weights() -> dict[str, Tensor]:
    w = torch.randint(-127, 128, (4, 4), generator=torch.Generator().manual_seed(2), dtype=torch.int8)
    return {
        "w": w,
        "ws": torch.tensor([0.1, 0.2, 0.3, 0.4]),
        "s": torch.tensor(0.5),
        "inv_s": torch.tensor([2.0, 3, 0.5, 1]),
    }


def row(text: str, returns: str = "%y") -> tuple[str, str]:
    """What a graph returns before and after, each as one expression. They give the same."""
    gm = graph(f"{text}\nreturn {returns}", weights())
    _, after = before_after(fuse.fuse, gm)
    assert difference(gm, after) == 0
    return expression(gm), expression(after)


def table(*rows: tuple[str, str]) -> str:
    return "".join(f"{before}\n    -> {after}\n" for before, after in rows)


def quantized(text: str) -> str:
    return f"{text}\n%t = sqcompile.token_scale(%a)\n%y = sqcompile.quantize(%a, %t)"


def gates() -> str:
    gate, up = "%gate: f32[2, 3, 4] = input", "%up: f32[2, 3, 4] = input"
    return table(
        row(quantized(f"{gate}\n{up}\n%g = aten.silu(%gate)\n%a = aten.mul(%g, %up)")),
        row(quantized(f"{gate}\n%g = aten.gelu(%gate, approximate='tanh')\n%a = aten.mul(%g, %inv_s)")),
        row(quantized(f"{gate}\n%a = aten.mul(%gate, %inv_s)")),
        row(quantized(f"{gate}\n%a = aten.sigmoid(%gate)")),
    )


def gemms() -> str:
    return table(
        row(f"{INT8}\n%x: f32[2, 3, 4] = input\n%g = {GEMM}\n%y = aten.add(%x, %g)"),
    )


CHAIN = f"""
    %x: f32[2, 3, 4] = input
    %q = sqcompile.quantize(%x, %s)
    %r = sqcompile.finite_rows(%x)
    %g = {GEMM}
    %a = aten.relu(%g)
    %d = sqcompile.finite_rows(%a)
    %y = sqcompile.quantize(%a, %s)
    return [%y, %d]
"""


def attention() -> str:
    others = "\n".join(f"%{n}: {t} = input" for n, t in {"x": "f32[1, 2, 3, 16]", "k": "i8[1, 2, 3, 16]",
                       "ks": "f32[1, 2, 3, 1]", "v": "f32[1, 2, 3, 16]"}.items())  # fmt: skip
    call = "%y = sqcompile.int8_attention(%q, %t, %k, %ks, %v, None, None, None, None, 0.25, 0.0, float32)"
    gm = graph(f"{others}\n%t = sqcompile.token_scale(%x)\n%q = sqcompile.quantize(%x, %t)\n{call}\nreturn %y")
    _, after = before_after(fuse.fuse, gm)
    inputs = inputs_of(gm)
    inputs[2] = inputs[2].abs()
    assert difference(gm, after, inputs) <= 1e-6
    return table((expression(gm), expression(after)))


RMS_NORM = """
    %x: bf16[2, 3, 4] = input
    %h = aten.to(%x, float32)
    %square = aten.pow(%h, 2)
    %mean = aten.mean(%square, [-1], True)
    %eps = aten.add(%mean, 1e-06)
    %root = aten.rsqrt(%eps)
    %n = aten.mul(%h, %root)
    %m = aten.to(%n, bfloat16)
    %y = aten.mul(%g, %m)
    %s = sqcompile.token_scale(%y)
    %q = sqcompile.quantize(%y, %s)
    return [%q, %s]
"""


def fused(text: str) -> str:
    gm = graph(text, {"g": torch.tensor([1.0, 2, 0.5, 3]).bfloat16(), **weights()})
    text, after = before_after(fuse.fuse, gm)
    assert difference(gm, after) == 0
    return text


def test_a_norm_and_the_quantization_of_what_it_gives_are_one_operator():
    assert_expected_inline(
        fused(RMS_NORM),
        """\
before:
%x: bf16[2, 3, 4] = input
%h: f32[2, 3, 4] = aten.to(%x, float32)
%square: f32[2, 3, 4] = aten.pow(%h, 2)
%mean: f32[2, 3, 1] = aten.mean(%square, [-1], True)
%eps: f32[2, 3, 1] = aten.add(%mean, 1e-06)
%root: f32[2, 3, 1] = aten.rsqrt(%eps)
%n: f32[2, 3, 4] = aten.mul(%h, %root)
%m: bf16[2, 3, 4] = aten.to(%n, bfloat16)
%y: bf16[2, 3, 4] = aten.mul(%g, %m)
%s: f32[2, 3, 1] = sqcompile.token_scale(%y)
%q: i8[2, 3, 4] = sqcompile.quantize(%y, %s)
return [%q, %s]
after:
%x: bf16[2, 3, 4] = input
%norm_quantize_default: (i8[2, 3, 4], f32[2, 3, 1], bf16[0]) = sqcompile.norm_quantize(%x, %g, None, 1e-06, True, True, None, None, False)
%getitem_1: f32[2, 3, 1] = getitem(%norm_quantize_default, 1)
%getitem: i8[2, 3, 4] = getitem(%norm_quantize_default, 0)
return [%getitem, %getitem_1]
""",
    )


def test_a_norm_that_is_read_by_something_later_too_keeps_its_output():
    text = fused(RMS_NORM.replace("    return [%q, %s]", "    %z = aten.neg(%y)\n    return [%q, %s, %z]"))
    assert_expected_inline(
        only_after(text),
        """\
%x: bf16[2, 3, 4] = input
%norm_quantize_default: (i8[2, 3, 4], f32[2, 3, 1], bf16[2, 3, 4]) = sqcompile.norm_quantize(%x, %g, None, 1e-06, True, True, None, None, True)
%getitem_2: f32[2, 3, 1] = getitem(%norm_quantize_default, 1)
%getitem_1: i8[2, 3, 4] = getitem(%norm_quantize_default, 0)
%getitem: bf16[2, 3, 4] = getitem(%norm_quantize_default, 2)
%z: bf16[2, 3, 4] = aten.neg(%getitem)
return [%getitem_1, %getitem_2, %z]
""",
    )


def test_activations_and_multipliers_meet_the_quantization():
    assert_expected_inline(
        gates(),
        """\
sqcompile.quantize(mul(silu(%gate), %up), sqcompile.token_scale(mul(silu(%gate), %up)))
    -> getitem(sqcompile.act_quantize(%gate, %up, silu, None, None), 0)
sqcompile.quantize(mul(gelu(%gate, approximate=tanh), %inv_s), sqcompile.token_scale(mul(gelu(%gate, approximate=tanh), %inv_s)))
    -> getitem(sqcompile.act_quantize(%gate, None, gelu_tanh, None, %inv_s), 0)
sqcompile.quantize(mul(%gate, %inv_s), sqcompile.token_scale(mul(%gate, %inv_s)))
    -> getitem(sqcompile.quantize_rows(%gate, token, %inv_s), 0)
sqcompile.quantize(sigmoid(%gate), sqcompile.token_scale(sigmoid(%gate)))
    -> getitem(sqcompile.quantize_rows(sigmoid(%gate), token, None), 0)
""",
    )


def test_a_gemm_takes_a_residual():
    assert_expected_inline(
        gemms(),
        """\
add(%x, sqcompile.int8_gemm(%q, %r, %w, %ws, None, float32, none, None, None))
    -> sqcompile.int8_gemm(%q, %r, %w, %ws, None, float32, none, %x, None)
""",
    )


def test_static_scales_go_from_gemm_to_gemm_in_int8():
    assert_expected_inline(
        only_after(fused(CHAIN)),
        """\
%x: f32[2, 3, 4] = input
%q: i8[2, 3, 4] = sqcompile.quantize(%x, %s)
%r: f32[2, 3, 1] = sqcompile.finite_rows(%x)
%int8_gemm_default: i8[2, 3, 4] = sqcompile.int8_gemm(%q, %r, %w, %ws, None, float32, relu, None, %s)
return [%int8_gemm_default, %r]
""",
    )


def test_queries_are_quantized_by_the_attention():
    assert_expected_inline(
        attention(),
        """\
sqcompile.int8_attention(sqcompile.quantize(%x, sqcompile.token_scale(%x)), sqcompile.token_scale(%x), %k, %ks, %v, None, None, None, None, 0.25, 0, float32)
    -> sqcompile.int8_attention(%x, None, %k, %ks, %v, None, None, None, None, 0.25, 0, float32)
""",
    )


def test_the_examples_in_the_docstring_of_fuse():
    assert untrue(fuse, fused(RMS_NORM) + fused(CHAIN) + gates() + gemms() + attention()) == []


def test_a_gemm_whose_result_is_read_twice_adds_no_residual():
    before, after = row(f"{INT8}\n%x: f32[2, 3, 4] = input\n%g = {GEMM}\n%y = aten.add(%x, %g)", "[%y, %g]")
    assert before == after


def test_tokens_are_quantized_before_they_are_reshaped():
    before, after = row(quantized("%x: f32[2, 3, 4] = input\n%z = aten.silu(%x)\n%a = aten.reshape(%z, [6, 4])"))
    assert_expected_inline(
        f"{before}\n    -> {after}\n",
        """\
sqcompile.quantize(reshape(silu(%x), [6, 4]), sqcompile.token_scale(reshape(silu(%x), [6, 4])))
    -> reshape(getitem(sqcompile.act_quantize(%x, None, silu, None, None), 0), [6, 4])
""",
    )
