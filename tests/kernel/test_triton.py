"""The Triton kernels that quantize rows, against the reference: see triton_cases.py for where they run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from triton_cases import (
    ACTIVATIONS,
    DEVICE,
    DTYPES,
    INTERPRETED,
    PARTS,
    int8,
    kernels,
    long,
    nearly,
    run_in_the_interpreter,
    same,
    tensor,
)

from sqcompile.kernels import reference


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
@pytest.mark.parametrize("part", PARTS)
def test_these_kernels_in_the_interpreter(part):
    run_in_the_interpreter(__file__, part)


# quantize ------------------------------------------------------------------------------------------------------------


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 64), (2, 3, 129), (17, 1031), (2, 16384), (2, 16411), (0, 8)])
@pytest.mark.parametrize("mode", ["token", "tensor", "static"])
def test_quantize_equals_the_reference(shape, mode, dtype):
    from sqcompile.kernels.triton.rows.quantize import quantize_rows

    x = tensor(*shape, dtype=dtype)
    static = torch.tensor(0.03, device=DEVICE) if mode == "static" else None
    if static is None:
        scale = reference.token_scale(x) if mode == "token" else reference.tensor_scale(x)
    else:
        scale = static
    q, s = quantize_rows(x, mode if static is None else "token", static)
    same(s, scale if static is None else reference.finite_rows(x))
    same(q, reference.quantize(x, scale))
    assert q.is_contiguous() and q.shape == x.shape


@kernels
@pytest.mark.parametrize("mode", ["token", "tensor"])
def test_a_multiplier_is_applied_in_float32(mode):
    from sqcompile.kernels.triton.rows.quantize import quantize_rows

    x, m = tensor(9, 257, dtype=torch.bfloat16), tensor(257, seed=1).abs()
    y = x.float() * m
    scale = reference.token_scale(y) if mode == "token" else reference.tensor_scale(y)
    q, s = quantize_rows(x, mode, multiplier=m)
    same(s, scale)
    same(q, reference.quantize(y, scale))


@kernels
@pytest.mark.parametrize("view", ["rows", "columns", "batch", "expanded"])
def test_quantize_takes_any_strides(view):
    from sqcompile.kernels.triton.rows.quantize import quantize_rows

    x = tensor(6, 10, 64)
    x = {
        "rows": x[:, 0, :],
        "columns": x[0].t(),
        "batch": x.transpose(0, 1)[..., :33],
        "expanded": x[:1, :1].expand(4, 3, 64),
    }[view]
    q, s = quantize_rows(x)
    same(s, reference.token_scale(x))
    same(q, reference.quantize(x, s))


@kernels
def test_rounding_is_half_to_even_and_saturates_at_127():
    from sqcompile.kernels.triton.rows.quantize import quantize_rows

    values = torch.cat([torch.arange(-130, 131) + 0.5, torch.tensor([-1e30, -127.4, 126.5, 127.5, 127.6, 1e30, -0.0])])
    x = values[None].to(DEVICE)
    q, _ = quantize_rows(x, scale=torch.ones((), device=DEVICE))
    same(q, values.round().clamp(-127, 127).to(torch.int8)[None].to(DEVICE))
    assert int(q.min()) == -127 and int(q.max()) == 127


@kernels
def test_zero_rows_quantize_to_zero():
    from sqcompile.kernels.triton.rows.quantize import quantize_rows

    x = tensor(3, 40)
    x[1] = 0
    q, s = quantize_rows(x)
    assert not q[1].any() and q[0].any() and bool((s > 0).all())
    q, _ = quantize_rows(torch.zeros(4, 40, device=DEVICE), "tensor")
    assert not q.any()


@kernels
@pytest.mark.parametrize("bad", [float("nan"), long(float("inf")), float("-inf")])
@pytest.mark.parametrize("k", [40, long(16400)])
def test_rows_that_are_not_finite_come_out_as_nan(bad, k):
    from sqcompile.kernels.triton.gemm.int8_gemm import int8_gemm
    from sqcompile.kernels.triton.rows.act import act_quantize
    from sqcompile.kernels.triton.rows.norm import norm_quantize
    from sqcompile.kernels.triton.rows.quantize import quantize_rows

    x, w = tensor(3, k), int8(5, k)
    x[1, k // 2] = bad
    static = torch.tensor(0.1, device=DEVICE)
    quantized = []
    for scale in (None, static):
        quantized += [quantize_rows(x, scale=scale), norm_quantize(x, None, 1e-5, scale=scale)[1:3]]
        quantized.append(norm_quantize(x, torch.ones(k, device=DEVICE), 1e-5, kind="layer", scale=scale)[1:3])
        if bad != float("-inf"):  # of which silu is 0 or NaN, and relu 0
            quantized.append(act_quantize(x, x, scale=scale))
    for q, s in quantized:
        assert s.isnan().flatten().tolist() == [False, True, False]
        y = int8_gemm(q, w, s, torch.ones(5, device=DEVICE), dtype=torch.float32)
        assert bool(y[1].isnan().all()) and bool(y[0].isfinite().all()) and bool(y[2].isfinite().all())
    q, s = quantize_rows(x, "tensor")
    assert bool((q * s).isnan().all())
    same(quantize_rows(x, scale=static)[0], reference.quantize(x, static))


# norm and activation -------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, w: Tensor | None, eps: float, round_first: bool) -> Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    if w is None:
        return h.to(x.dtype)
    return w * h.to(x.dtype) if round_first else (h * w.float()).to(x.dtype)


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [64, 1003, 16500])
@pytest.mark.parametrize("kind", ["rms", "rms rounded once", "rms float32 weight", "layer", "layer without bias"])
def test_norm(kind, k, dtype):
    from sqcompile.kernels.triton.rows.norm import norm_quantize

    if k > 16384 and dtype == torch.float16:
        pytest.skip("one wide case is enough")
    x, r = tensor(2, 3, k, dtype=dtype), tensor(2, 3, k, dtype=dtype, seed=1)
    w = tensor(k, dtype=torch.float32 if "float32" in kind else dtype, seed=2)
    b = tensor(k, dtype=dtype, seed=3) if kind == "layer" else None
    h = x + r
    if kind.startswith("rms"):
        y = rms_norm(h, w, 1e-5, "once" not in kind)
        q, s = norm_quantize(x, w, 1e-5, residual=r, round_first="once" not in kind)[1:3]
    else:
        y = F.layer_norm(h.float(), (k,), w.float(), None if b is None else b.float(), 1e-5).to(dtype)
        q, s = norm_quantize(x, w, 1e-5, kind="layer", bias=b, residual=r)[1:3]
    nearly(q, s, y, reference.token_scale(y))


@kernels
@pytest.mark.parametrize("k", [96, 16390])
def test_norm_returns_the_residual_stream_and_its_output(k):
    from sqcompile.kernels.triton.rows.norm import norm_quantize

    x, r, m = tensor(4, k, dtype=torch.bfloat16), tensor(4, k, dtype=torch.bfloat16, seed=1), tensor(k, seed=2).abs()
    w, static = tensor(k, dtype=torch.bfloat16, seed=3), torch.tensor(0.5, device=DEVICE)
    h, q, s, y = norm_quantize(x, w, 1e-5, residual=r, scale=static, multiplier=m, keep=True)
    same(h, x + r)
    same(s, torch.ones_like(s))
    assert s.shape == (*q.shape[:-1], 1) and y is not None
    torch.testing.assert_close(y, rms_norm(x + r, w, 1e-5, True), rtol=2e-2, atol=1e-6)
    same(q, reference.quantize(y.float() * m, static))
    h, _, _, y = norm_quantize(x, w, 1e-5)
    assert h is x and y is None


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("k", [77, 16400])
def test_activation_of_the_halves_of_a_merged_gemm(activation, k, dtype):
    from sqcompile.kernels.triton.rows.act import act_quantize

    both = tensor(2, 3, 2 * k, dtype=dtype, spread=0.3)
    gate, up = both.chunk(2, -1)
    y = ACTIVATIONS[activation](gate.float()).to(dtype) * up
    q, s = act_quantize(gate, up, activation)
    nearly(q, s, y, reference.token_scale(y))
    if k < 100:
        y = ACTIVATIONS[activation](gate.float()).to(dtype)
        m, static = tensor(k, seed=4).abs(), torch.tensor(0.01, device=DEVICE)
        q, s = act_quantize(gate, None, activation, scale=static, multiplier=m)
        same(s, torch.ones(*q.shape[:-1], 1, device=DEVICE))
        difference = (q.int() - reference.quantize(y.float() * m, static).int()).abs()
        assert int(difference.max()) <= 1 or dtype != torch.float32
        assert float((difference > 0).float().mean()) < 2e-2
