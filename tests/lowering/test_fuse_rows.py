"""From linear to linear on x86 CPUs: what fuse_rows makes of graphs, as text, and of models, as numbers."""

from __future__ import annotations

import collections

import pytest
import torch
from conftest import ALL_INT8, relative_error, tiny_lm, token_batches
from expecttest import assert_expected_inline
from golden_cases import HAS_VNNI, before_after, graph, only_after, untrue
from torch import nn
from torch.nn import functional as F

import sqcompile
from sqcompile.passes.lowering import fuse_rows

TENSORS = {
    "w": torch.zeros(64, 32, dtype=torch.int8), "ws": [64], "sum": torch.zeros(64, dtype=torch.int32), "bias": [64], "g": [64],
    "b": [64], "s": torch.tensor(0.5),
}  # fmt: skip
LINEAR = """
    %q0: u8[2, 3, 32] = input
    %s0: f32[2, 3, 1] = input
    %x: f32[2, 3, 64] = input
    %y = sqcompile.int8_linear_packed(%q0, %s0, %w, %ws, %sum, %bias, float32)
"""
QUANTIZED = "    %s1 = sqcompile.token_scale(%n)\n    %q = sqcompile.quantize(%n, %s1, 128)\n"


def fused(text: str) -> str:
    return before_after(fuse_rows.fuse_rows, graph(LINEAR + text, TENSORS))[0]


def norms() -> str:
    text = "    %h = aten.add(%x, %y)\n    %n = aten.layer_norm(%h, [64], %g, %b, 1e-05)\n"
    return fused(text + QUANTIZED + "    return [%q, %s1, %h]")


def gates() -> str:
    parts = "    %a = aten.slice(%y, -1, 0, 32)\n    %u = aten.slice(%y, -1, 32, 64)\n    %t = aten.silu(%a)\n"
    return fused(parts + "    %n = aten.mul(%t, %u)\n" + QUANTIZED + "    return [%q, %s1]")


def test_a_residual_and_a_norm():
    assert_expected_inline(
        only_after(norms()),
        """\
%q0: u8[2, 3, 32] = input
%s0: f32[2, 3, 1] = input
%x: f32[2, 3, 64] = input
%matmul_u8s8_default: f32[2, 3, 64] = sqcompile.matmul_u8s8(%q0, %w, %ws, %sum, float32)
%linear_norm_quantize_default: (u8[2, 3, 64], f32[2, 3, 1], f32[2, 3, 64], f32[0]) = sqcompile.linear_norm_quantize(%matmul_u8s8_default, %s0, %bias, %x, %g, %b, 1e-05, False, False, None, 0, None, 128, True, False)
%getitem_2: f32[2, 3, 1] = getitem(%linear_norm_quantize_default, 1)
%getitem_1: u8[2, 3, 64] = getitem(%linear_norm_quantize_default, 0)
%getitem: f32[2, 3, 64] = getitem(%linear_norm_quantize_default, 2)
return [%getitem_1, %getitem_2, %getitem]
""",
    )


def test_a_gated_pair():
    assert_expected_inline(
        only_after(gates()),
        """\
%q0: u8[2, 3, 32] = input
%s0: f32[2, 3, 1] = input
%x: f32[2, 3, 64] = input
%matmul_u8s8_default: f32[2, 3, 64] = sqcompile.matmul_u8s8(%q0, %w, %ws, %sum, float32)
%linear_act_quantize_default: (u8[2, 3, 32], f32[2, 3, 1]) = sqcompile.linear_act_quantize(%matmul_u8s8_default, %s0, %bias, 0, 32, 32, silu, None, 0, None, 128)
%getitem_1: f32[2, 3, 1] = getitem(%linear_act_quantize_default, 1)
%getitem: u8[2, 3, 32] = getitem(%linear_act_quantize_default, 0)
return [%getitem, %getitem_1]
""",
    )


@pytest.mark.parametrize(
    "text",
    [
        # the linear, or the activation, is read by something else, too
        "%a = aten.relu(%y)\n%n = aten.mul(%a, %x)\n%s1 = sqcompile.token_scale(%n)\n%q = sqcompile.quantize(%n, %s1, 128)\nreturn [%q, %s1, %y]",
        "%n = aten.relu(%y)\n%s1 = sqcompile.token_scale(%n)\n%q = sqcompile.quantize(%n, %s1, 128)\nreturn [%q, %s1, %n]",
        # columns that do not lie beside each other, or not in the middle
        "%a = aten.slice(%y, -1, 0, 64, 2)\n%n = aten.relu(%a)\n" + QUANTIZED + "return [%q, %s1]",
        # one scale for all rows, that depends on them
        "%n = aten.relu(%y)\n%s1 = sqcompile.tensor_scale(%n)\n%q = sqcompile.quantize(%n, %s1, 128)\nreturn [%q, %s1]",
    ],
)
def test_what_is_left_to_the_compiler(text):
    after = only_after(fused(text))
    assert "int8_linear_packed" in after and "linear_act_quantize(%matmul" not in after


def test_columns_from_the_end():
    text = "%a = aten.slice(%y, 2, -32, 9999)\n%n = aten.relu(%a)\n" + QUANTIZED + "return [%q, %s1]"
    assert "linear_act_quantize(%matmul_u8s8_default, %s0, %bias, 32, -1, 32, relu" in only_after(fused(text))


def test_a_part_of_a_norm_that_something_else_reads():
    """The sum stays, as it would be computed twice otherwise."""
    text = "%h = aten.add(%x, %y)\n%p = aten.pow(%h, 2)\n%m = aten.mean(%p, [-1], True)\n%e = aten.add(%m, 1e-06)\n"
    text += "%r = aten.rsqrt(%e)\n%c = aten.mul(%h, %r)\n%n = aten.mul(%g, %c)\n" + QUANTIZED + "return [%q, %s1, %c]"
    after = only_after(fused(text))
    assert "int8_linear_packed" in after and "sqcompile.linear_norm_quantize(%h, None, None, None" in after


def test_a_sum_that_is_read_before_the_norm_stays():
    text = "%h = aten.add(%x, %y)\n%early = aten.relu(%h)\n%n = aten.layer_norm(%h, [64], %g, %b, 1e-05)\n"
    after = only_after(fused(text + QUANTIZED + "return [%q, %s1, %early]"))
    assert "int8_linear_packed" in after and "sqcompile.linear_norm_quantize(%h, None, None, None" in after


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("static", [True, False])
def test_a_norm_in_other_dims(rotated, static):
    """As GPT-2's linears read it."""
    text = "%h = aten.add(%x, %y)\n%n = aten.layer_norm(%h, [64], %g, %b, 1e-05)\n%v = aten.reshape(%n, [-1, 64])\n"
    text += "%r = sqcompile.rotate(%v, 32)\n" if rotated else ""
    v = "%r" if rotated else "%v"
    q, rows = f"%q = sqcompile.quantize({v}, {'%s' if static else '%s1'}, 128)\n", f"%s1 = sqcompile.token_scale({v})\n"
    text += q + rows.replace("token_scale", "finite_rows") if static else rows + q
    text += "return [%q, %s1, %h]"
    after = only_after(fused(text))
    rest = f"{32 if rotated else 0}, {'%s' if static else None}, 128, True, False"
    assert (
        f"linear_norm_quantize(%matmul_u8s8_default, %s0, %bias, %x, %g, %b, 1e-05, False, False, None, {rest}" in after
    )
    assert "sqcompile.rotate(" not in after and "sqcompile.quantize(" not in after
    assert after.count("aten.reshape") == 2 and "u8[6, 64]" in after and "f32[6, 1]" in after


def test_a_rotation_that_something_else_reads_stays_where_it_is():
    text = "%n = aten.layer_norm(%x, [64], %g, %b, 1e-05)\n%v = aten.reshape(%n, [-1, 64])\n%r = sqcompile.rotate(%v, 32)\n"
    text += "%s1 = sqcompile.token_scale(%r)\n%q = sqcompile.quantize(%r, %s1, 128)\nreturn [%q, %s1, %r, %y]"
    after = only_after(fused(text))
    assert "sqcompile.rotate(%v, 32)" in after and "sqcompile.quantize(%r, %s1, 128)" in after


def test_the_example_in_the_docstring():
    assert untrue(fuse_rows, norms() + gates()) == []


def operators(net) -> collections.Counter[str]:
    return collections.Counter(
        str(n.target).split(".")[1] for n in net.lowered.graph.nodes if "sqcompile" in str(n.target)
    )


def both(model, batches, x, recipe=ALL_INT8):
    """A model for this CPU, and how far its output is from that of the reference."""
    want = sqcompile.compile(model, batches, recipe=recipe, backend="eager", progress=False, target="reference")
    net = sqcompile.compile(model, plan=want.plan, backend="eager", target="x86-vnni")
    with torch.no_grad():
        y, z = (n(x) if torch.is_tensor(n(x)) else n(x)[0] for n in (net, want))
    return net, relative_error(y, z)


needs_vnni = pytest.mark.skipif(not HAS_VNNI, reason="packs weights with oneDNN's layout of this CPU")


@needs_vnni
@pytest.mark.parametrize("recipe", [ALL_INT8, "O3"], ids=["default", "O3"])
@pytest.mark.parametrize(
    ("family", "norms", "acts"),
    # of two layers: the norms, and the outputs of attention and of the MLP's activation. GPT-2 has its linears in other dims.
    [("llama", 4, 4), ("opt", 4, 4), ("gpt_neox", 4, 4), ("gpt2", 4, 2)],
)
def test_decoders(family, norms, acts, recipe):
    net, error = both(tiny_lm(family), token_batches(), torch.randint(3, 96, (2, 9)), recipe)
    found = operators(net)
    assert error < 1e-4, found
    assert (found["linear_norm_quantize"], found["linear_act_quantize"]) == (norms, acts), found


@needs_vnni
def test_channels_that_do_not_fill_a_vector_are_left_to_the_compiler():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24)).eval()
    net, error = both(model, [torch.randn(4, 24)], torch.randn(5, 24))
    assert error < 1e-5 and not operators(net).keys() & {"linear_norm_quantize", "linear_act_quantize"}


class Twice(nn.Module):
    """A norm that two linears with smoothings of their own read, and a sum that goes on."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(3))
        self.a, self.b, self.c = nn.Linear(32, 48), nn.Linear(48, 32), nn.Linear(32, 32)

    def forward(self, x):
        x = x + self.b(F.gelu(self.a(self.norms[0](x)), approximate="tanh"))
        y = self.norms[1](x)
        return self.norms[2](x + self.c(y)) + y


@needs_vnni
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_and_norms_that_others_read(dtype):
    torch.manual_seed(0)
    net, error = both(Twice().eval().to(dtype), [torch.randn(4, 6, 32).to(dtype)], torch.randn(3, 7, 32).to(dtype))
    assert error < (1e-5 if dtype == torch.float32 else 1e-2)
    kept = [n.args[-2:] for n in net.lowered.graph.nodes if "linear_norm_quantize" in str(n.target)]
    assert kept == [(False, False), (True, True)]
