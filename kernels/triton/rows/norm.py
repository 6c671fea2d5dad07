"""(residual +) norm + quantize in one read of the residual stream.

    h = x + residual                                              rounded to the model's dtype
    y = weight · cast(h · rsqrt(mean(h²) + eps))                  RMSNorm as transformers writes it
    y = cast((h - mean h) · rsqrt(var h + eps) · weight + bias)   LayerNorm as torch computes it
    q = round(rotated(y · multiplier) / Δ)

Statistics and arithmetic are float32; `cast` is to the model's dtype. Sums are taken in another order than eager
PyTorch takes them, so y may differ by one rounding and single int8 values by one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sqcompile.kernels.triton.common import (
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


@triton.jit
def _stream(x_ptr, r_ptr, x_base, r_base, cols, K):
    """h = x + residual in the model's dtype, as float32; zero outside."""
    mask = cols < K
    h = tl.load(x_ptr + x_base + cols, mask=mask, other=0.0)
    if r_ptr is not None:
        r = tl.load(r_ptr + r_base + cols, mask=mask, other=0.0)
        h = (h.to(tl.float32) + r.to(tl.float32)).to(x_ptr.dtype.element_ty)
    return h.to(tl.float32)


@triton.jit
def _affine(h, mean, rstd, w_ptr, b_ptr, cols, K, DTYPE: tl.constexpr, RMS: tl.constexpr, ROUND_FIRST: tl.constexpr):
    """y in the dtype of the norm's output, as float32; zero outside."""
    mask = cols < K
    if RMS:
        y = h * rstd
    else:
        y = (h - mean) * rstd
    if ROUND_FIRST:
        y = y.to(DTYPE).to(tl.float32)
    if w_ptr is not None:
        w = tl.load(w_ptr + cols, mask=mask, other=0.0)
        y = y * w.to(tl.float32)
        if not (ROUND_FIRST and w_ptr.dtype.element_ty == tl.float32):  # bf16 · fp32 stays fp32 in PyTorch
            if b_ptr is not None:
                y = y + tl.load(b_ptr + cols, mask=mask, other=0.0).to(tl.float32)
            y = y.to(DTYPE).to(tl.float32)
    elif not ROUND_FIRST:
        y = y.to(DTYPE).to(tl.float32)
    if not RMS and w_ptr is None:  # elsewhere it is zero there already: h, or the weight and the bias, are
        y = tl.where(mask, y, 0.0)
    return y


@triton.jit
def _scaled(y, m_ptr, cols, K, BLOCK: tl.constexpr, ROTATE: tl.constexpr, NORM: tl.constexpr):
    """y · multiplier, rotated, in float32."""
    if m_ptr is not None:
        y = y * tl.load(m_ptr + cols, mask=cols < K, other=0.0)
    return rotate(y, ROTATE, BLOCK, NORM)


@triton.jit
def _norm_quantize(
    x_ptr, r_ptr, w_ptr, b_ptr, m_ptr, h_ptr, y_ptr, q_ptr, rows_ptr, scale_ptr, K, x_stride, r_stride, eps,
    BLOCK: tl.constexpr, RMS: tl.constexpr, ROUND_FIRST: tl.constexpr, ROTATE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """One program per row, the whole row in registers."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < K
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    h = _stream(x_ptr, r_ptr, row * x_stride, row * r_stride, cols, K)
    if h_ptr is not None:
        tl.store(h_ptr + row * K + cols, h.to(dtype), mask=mask)
    mean = 0.0
    if RMS:
        var = tl.sum(h * h, 0) / K
    else:
        mean = tl.sum(h, 0) / K
        d = tl.where(mask, h - mean, 0.0)
        var = tl.sum(d * d, 0) / K
    y = _affine(h, mean, tl.rsqrt(var + eps), w_ptr, b_ptr, cols, K, dtype, RMS, ROUND_FIRST)
    if y_ptr is not None:
        tl.store(y_ptr + row * K + cols, y.to(dtype), mask=mask)
    y = _scaled(y, m_ptr, cols, K, BLOCK, ROTATE, NORM)
    largest = absmax(y, 0)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
        tl.store(rows_ptr + row, finite_of(largest))
    else:
        scale = scale_of(largest)
        tl.store(rows_ptr + row, scale)
    tl.store(q_ptr + row * K + cols, to_int8(y, reciprocal(scale)), mask=mask)


@triton.jit
def _norm_quantize_wide(
    x_ptr, r_ptr, w_ptr, b_ptr, m_ptr, h_ptr, y_ptr, q_ptr, rows_ptr, scale_ptr, K, x_stride, r_stride, eps,
    BLOCK: tl.constexpr, RMS: tl.constexpr, ROUND_FIRST: tl.constexpr, ROTATE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """The same for rows that do not fit: each pass reads x and the residual again, from L2 for all but the first."""
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x_base = row * x_stride
    r_base = row * r_stride
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in range(0, K, BLOCK):
        cols = k + tl.arange(0, BLOCK)
        h = _stream(x_ptr, r_ptr, x_base, r_base, cols, K)
        if h_ptr is not None:
            tl.store(h_ptr + row * K + cols, h.to(dtype), mask=cols < K)
        if RMS:
            total += h * h
        else:
            total += h
    mean = 0.0
    var = tl.sum(total, 0) / K
    if not RMS:
        mean = var
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for k in range(0, K, BLOCK):
            cols = k + tl.arange(0, BLOCK)
            d = tl.where(cols < K, _stream(x_ptr, r_ptr, x_base, r_base, cols, K) - mean, 0.0)
            total += d * d
        var = tl.sum(total, 0) / K
    rstd = tl.rsqrt(var + eps)
    best = tl.zeros((BLOCK,), dtype=tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    else:
        for k in range(0, K, BLOCK):
            cols = k + tl.arange(0, BLOCK)
            h = _stream(x_ptr, r_ptr, x_base, r_base, cols, K)
            y = _affine(h, mean, rstd, w_ptr, b_ptr, cols, K, dtype, RMS, ROUND_FIRST)
            y = _scaled(y, m_ptr, cols, K, BLOCK, ROTATE, NORM)
            best = larger(best, tl.abs(y))
        scale = scale_of(absmax(best, 0))
        tl.store(rows_ptr + row, scale)
    inverse = reciprocal(scale)
    for k in range(0, K, BLOCK):
        cols = k + tl.arange(0, BLOCK)
        h = _stream(x_ptr, r_ptr, x_base, r_base, cols, K)
        y = _affine(h, mean, rstd, w_ptr, b_ptr, cols, K, dtype, RMS, ROUND_FIRST)
        if y_ptr is not None:
            tl.store(y_ptr + row * K + cols, y.to(dtype), mask=cols < K)
        y = _scaled(y, m_ptr, cols, K, BLOCK, ROTATE, NORM)
        if scale_ptr is not None:
            best = larger(best, tl.abs(y))
        tl.store(q_ptr + row * K + cols, to_int8(y, inverse), mask=cols < K)
    if scale_ptr is not None:
        tl.store(rows_ptr + row, finite_of(absmax(best, 0)))


def norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    kind: str = "rms",
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    round_first: bool = True,
    scale: Tensor | None = None,
    multiplier: Tensor | None = None,
    keep: bool = False,
    rotation: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Norm of x, or of x + residual, quantized per token or with a static scale.

    Args:
        x: float16, bfloat16 or float32 [..., K], the model's dtype.
        weight: any float dtype [K], or None.
        eps: added to the mean square or the variance.
        kind: "rms" or "layer".
        bias: any float dtype [K], LayerNorm only.
        residual: of x's dtype and shape, or None.
        round_first: RMSNorm only: round to the model's dtype before the weight, as transformers' LlamaRMSNorm does,
            and not only after it, as `torch.nn.functional.rms_norm` and Gemma do.
        scale: static Δ, float32 of one element, or None for one per token.
        multiplier: float32 [K], applied to the norm's output in float32 before quantization.
        rotation: the size of the blocks in which channels are rotated after that (`kernels.rotation`), 0 for none.
        keep: return the norm's output too, for readers that are not quantized (a router, a post-norm residual).

    Returns:
        x + residual (x itself without a residual), int8 [..., K], the rows' factors float32 [..., 1] (Δ, or
        `reference.finite_rows` with a static one), and the norm's output in x's dtype [..., K] or None.
    """
    if kind not in ("rms", "layer"):
        raise ValueError(f"kind must be rms or layer, not {kind!r}")
    if bias is not None and (kind == "rms" or weight is None):
        raise ValueError("a bias needs a LayerNorm with a weight")
    rows = as_rows(x)
    m, k = rows.shape
    more = None if residual is None else as_rows(residual)
    h = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if keep else None
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    factors = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    if m:
        block, warps = block_of(k)
        kernel = _norm_quantize if block >= k else _norm_quantize_wide
        with on(x.device):
            launch(
                launchable(kernel, x),
                (m,),
                rows, more, weight, bias, multiplier, h, y, q, factors, scale, k, rows.stride(0),
                0 if more is None else more.stride(0), eps,
                BLOCK=block, RMS=kind == "rms", ROUND_FIRST=kind == "rms" and round_first, **rotation_of(rotation),
                num_warps=warps,
            )  # fmt: skip
    return (x if h is None else h), q, factors, y
