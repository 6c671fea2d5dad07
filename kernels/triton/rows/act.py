"""act(gate) · up + quantize in one read of both.

    y = cast(cast(act(gate)) · up),  q = round(rotated(y · multiplier) / Δ)

`cast` is to the model's dtype, after the activation and after the product, as eager PyTorch rounds; the arithmetic
between is float32. gate and up may be the halves of one [M, 2N] tensor, as a merged GEMM leaves them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sqcompile.kernels.triton.common import (
    absmax,
    activate,
    as_rows,
    block_of,
    finite_of,
    larger,
    launchable,
    on,
    reciprocal,
    rotate,
    rotation_of,
    scale_of,
    to_int8,
)
from sqcompile.kernels.triton.launching import launch


@triton.jit
def _value(
    g_ptr, u_ptr, m_ptr, g_base, u_base, cols, K,
    ACT: tl.constexpr, BLOCK: tl.constexpr, ROTATE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """y · multiplier, rotated, in float32; zero outside."""
    mask = cols < K
    dtype: tl.constexpr = g_ptr.dtype.element_ty
    y = activate(tl.load(g_ptr + g_base + cols, mask=mask, other=0.0).to(tl.float32), ACT)
    if u_ptr is not None:
        u = tl.load(u_ptr + u_base + cols, mask=mask, other=0.0).to(tl.float32)
        y = y.to(dtype).to(tl.float32) * u
    y = y.to(dtype).to(tl.float32)
    if m_ptr is not None:
        y = y * tl.load(m_ptr + cols, mask=mask, other=0.0)
    return rotate(y, ROTATE, BLOCK, NORM)


@triton.jit
def _act_quantize(
    g_ptr, u_ptr, m_ptr, q_ptr, rows_ptr, scale_ptr, K, g_stride, u_stride,
    BLOCK: tl.constexpr, ONE: tl.constexpr, ACT: tl.constexpr, ROTATE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """One program per row; rows that do not fit (ONE is false) are computed twice, the second time from L2."""
    row = tl.program_id(0).to(tl.int64)
    g_base = row * g_stride
    u_base = row * u_stride
    if ONE:
        cols = tl.arange(0, BLOCK)
        y = _value(g_ptr, u_ptr, m_ptr, g_base, u_base, cols, K, ACT, BLOCK, ROTATE, NORM)
        largest = absmax(y, 0)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr)
            tl.store(rows_ptr + row, finite_of(largest))
        else:
            scale = scale_of(largest)
            tl.store(rows_ptr + row, scale)
        tl.store(q_ptr + row * K + cols, to_int8(y, reciprocal(scale)), mask=cols < K)
    else:
        best = tl.zeros((BLOCK,), dtype=tl.float32)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr)
        else:
            for k in range(0, K, BLOCK):
                y = _value(g_ptr, u_ptr, m_ptr, g_base, u_base, k + tl.arange(0, BLOCK), K, ACT, BLOCK, ROTATE, NORM)
                best = larger(best, tl.abs(y))
            scale = scale_of(absmax(best, 0))
            tl.store(rows_ptr + row, scale)
        inverse = reciprocal(scale)
        for k in range(0, K, BLOCK):
            cols = k + tl.arange(0, BLOCK)
            y = _value(g_ptr, u_ptr, m_ptr, g_base, u_base, cols, K, ACT, BLOCK, ROTATE, NORM)
            if scale_ptr is not None:
                best = larger(best, tl.abs(y))
            tl.store(q_ptr + row * K + cols, to_int8(y, inverse), mask=cols < K)
        if scale_ptr is not None:
            tl.store(rows_ptr + row, finite_of(absmax(best, 0)))


def act_quantize(
    gate: Tensor,
    up: Tensor | None = None,
    activation: str = "silu",
    *,
    scale: Tensor | None = None,
    multiplier: Tensor | None = None,
    rotation: int = 0,
) -> tuple[Tensor, Tensor]:
    """Activation, product and quantization.

    Args:
        gate: float16, bfloat16 or float32 [..., K]; rows may be strided.
        up: of gate's dtype and shape, or None for the activation alone.
        activation: "none", "relu", "silu", "gelu" (erf) or "gelu_tanh".
        scale: static Δ, float32 of one element, or None for one per token.
        multiplier: float32 [K], applied in float32 before quantization.
        rotation: the size of the blocks in which channels are rotated after that (`kernels.rotation`), 0 for none.

    Returns:
        int8 [..., K] contiguous, and the rows' factors, float32 [..., 1]: Δ, or `reference.finite_rows` with a static one.
    """
    g = as_rows(gate)
    u = None if up is None else as_rows(up)
    m, k = g.shape
    q = torch.empty(gate.shape, dtype=torch.int8, device=gate.device)
    factors = torch.empty((*gate.shape[:-1], 1), dtype=torch.float32, device=gate.device)
    if m:
        block, warps = block_of(k)
        with on(gate.device):
            launch(
                launchable(_act_quantize, gate),
                (m,),
                g, u, multiplier, q, factors, scale, k, g.stride(0), 0 if u is None else u.stride(0),
                BLOCK=block, ONE=block >= k, ACT=activation, **rotation_of(rotation), num_warps=warps,
            )  # fmt: skip
    return q, factors
