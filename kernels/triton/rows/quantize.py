"""Quantization of rows: x [..., K] float -> int8 [..., K] and Δ float32, bit for bit `reference.quantize`,

Bound by memory: x is read once (per token, K <= 16384; static) and int8 written. Per tensor takes two kernels, as no
value can be quantized before the last one is seen: partial maxima, then every program reduces those and quantizes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sqcompile.kernels import reference
from sqcompile.kernels.triton.common import (
    INTERPRETED,
    absmax,
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

# programs of the first per-tensor kernel; a few per multiprocessor, and cheap to reduce again; the interpreter has one
_PARTIALS = 8 if INTERPRETED else 512


@triton.jit
def _load(
    x_ptr, m_ptr, rows, cols, stride, M, K,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ROTATE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """x · multiplier, rotated, in float32, [ROWS, BLOCK]; zero outside."""
    mask = (rows < M)[:, None] & (cols < K)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if m_ptr is not None:
        x = x * tl.load(m_ptr + cols, mask=cols < K, other=0.0)[None, :]
    return rotate(x, ROTATE, ROWS * BLOCK, NORM), mask


@triton.jit
def _absmax(
    x_ptr, m_ptr, partial_ptr, M, K, stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ROTATE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """partial[program] = max|x| over the rows of the program, float32."""
    best = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for row in range(tl.program_id(0) * ROWS, M, tl.num_programs(0) * ROWS):
        rows = (row + tl.arange(0, ROWS)).to(tl.int64)
        for k in range(0, K, BLOCK):
            x, _ = _load(x_ptr, m_ptr, rows, k + tl.arange(0, BLOCK), stride, M, K, ROWS, BLOCK, ROTATE, NORM)
            best = larger(best, tl.abs(x))
    tl.store(partial_ptr + tl.program_id(0), absmax(absmax(best, 1), 0))


@triton.jit
def _quantize(
    x_ptr, m_ptr, q_ptr, rows_ptr, scale_ptr, partial_ptr, M, K, stride, partials,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ONE: tl.constexpr, MODE: tl.constexpr, PARTIALS: tl.constexpr,
    ROTATE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """MODE "token" writes a scale per row, "tensor" one from the partial maxima; "static" reads one and says what is finite."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    if MODE == "tensor":
        p = tl.arange(0, PARTIALS)
        scale = scale_of(absmax(tl.load(partial_ptr + p, mask=p < partials, other=0.0), 0))
        tl.store(rows_ptr, scale, mask=tl.program_id(0) == 0)
        inverse = reciprocal(scale)
    elif MODE == "static":
        inverse = reciprocal(tl.load(scale_ptr))
    if ONE:
        cols = tl.arange(0, BLOCK)
        x, mask = _load(x_ptr, m_ptr, rows, cols, stride, M, K, ROWS, BLOCK, ROTATE, NORM)
        if MODE == "token":
            scale = scale_of(absmax(x, 1))
            tl.store(rows_ptr + rows, scale, mask=rows < M)
            inverse = reciprocal(scale)[:, None]
        elif MODE == "static":
            tl.store(rows_ptr + rows, finite_of(absmax(x, 1)), mask=rows < M)
        tl.store(q_ptr + rows[:, None] * K + cols[None, :], to_int8(x, inverse), mask=mask)
    else:
        best = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        if MODE == "token":
            for k in range(0, K, BLOCK):
                x, _ = _load(x_ptr, m_ptr, rows, k + tl.arange(0, BLOCK), stride, M, K, ROWS, BLOCK, ROTATE, NORM)
                best = larger(best, tl.abs(x))
            scale = scale_of(absmax(best, 1))
            tl.store(rows_ptr + rows, scale, mask=rows < M)
            inverse = reciprocal(scale)[:, None]
        for k in range(0, K, BLOCK):
            cols = k + tl.arange(0, BLOCK)
            x, mask = _load(x_ptr, m_ptr, rows, cols, stride, M, K, ROWS, BLOCK, ROTATE, NORM)
            if MODE == "static":
                best = larger(best, tl.abs(x))
            tl.store(q_ptr + rows[:, None] * K + cols[None, :], to_int8(x, inverse), mask=mask)
        if MODE == "static":
            tl.store(rows_ptr + rows, finite_of(absmax(best, 1)), mask=rows < M)


def quantize_rows(
    x: Tensor,
    granularity: str = "token",
    scale: Tensor | None = None,
    multiplier: Tensor | None = None,
    rotation: int = 0,
) -> tuple[Tensor, Tensor]:
    """Quantizes x, times a channel multiplier if there is one.

    Args:
        x: float16, bfloat16 or float32 [..., K]; rows may be strided.
        granularity: "token", one Δ per row, or "tensor", one for all; ignored with a static scale.
        scale: static Δ, float32 of one element, or None.
        multiplier: float32 [K]; x · multiplier is float32 and not rounded to x's dtype.
        rotation: the size of the blocks in which channels are rotated after that (`kernels.rotation`), 0 for none.

    Returns:
        int8 [..., K] contiguous, and factors, float32: Δ [..., 1] per token, [] per tensor; `reference.finite_rows` [..., 1]
        with a static one.
    """
    mode = "static" if scale is not None else granularity
    if mode not in ("token", "tensor", "static"):
        raise ValueError(f"granularity must be token or tensor, not {granularity!r}")
    rows = as_rows(x)
    m, k = rows.shape
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    factors = torch.empty((*x.shape[:-1], 1) if mode != "tensor" else (), dtype=torch.float32, device=x.device)
    if m == 0 or k == 0:
        return q, factors.fill_(1 if mode == "static" else reference.ABSMAX_FLOOR / reference.QMAX)
    block, warps = block_of(k)
    per_program = max(1, 1024 // block)
    programs = triton.cdiv(m, per_program)
    partial, partials = None, 0
    with on(x.device):
        if mode == "tensor":
            partials = _PARTIALS  # however few the rows: their number may be a symbol
            partial = torch.empty(partials, dtype=torch.float32, device=x.device)
            launch(
                launchable(_absmax, x),
                (partials,),
                rows,
                multiplier,
                partial,
                m,
                k,
                rows.stride(0),
                ROWS=per_program,
                BLOCK=min(block, 4096),
                **rotation_of(rotation),
                num_warps=warps,
            )
        launch(
            launchable(_quantize, x), (programs,), rows, multiplier, q, factors, scale, partial, m, k, rows.stride(0), partials,
            ROWS=per_program, BLOCK=block, ONE=block >= k, MODE=mode, PARTIALS=_PARTIALS, **rotation_of(rotation), num_warps=warps,
        )  # fmt: skip
    return q, factors
