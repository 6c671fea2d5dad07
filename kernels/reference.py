"""Quantization arithmetic in plain PyTorch, on any device: the definition every kernel is compared with.

    Δ = max|X| / 127            q = clamp(round_half_even(X · 1/Δ), -127, 127)
    Y = Δx Δw (X̂ Ŵᵀ)            with the inner product in int32

Symmetric, zero point 0; the divisor is 2^7 - 1 = 127. Scales are float32 whatever the model's dtype.

int8 holds no NaN. What is not finite comes out as NaN all the same, never as a plausible number, by the float32 factor
of its row: a dynamic scale of what is not finite is NaN, so that per tensor all of it comes out as NaN. A static scale is
a constant, by which weights' scales are multiplied beforehand, and the row's factor is `finite_rows`, 1 or NaN. It is
passed on where a static chain stays in int8, whose values are what they are whatever the factor. int8 itself has 0 for NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sqcompile.kernels.qtypes import BY_DTYPE

QMAX = 127  # 2^(8-1) - 1: -128 is never used, so that negation cannot overflow
ABSMAX_FLOOR = 1e-30  # below it a tensor counts as zero; 127 / floor is still finite in float32
UINT8_ZERO_POINT = 128

# float32 holds every integer up to 2^24, so a product of int8 over at most this many terms is exact in any order
_EXACT_TERMS = 2**24 // (127 * 128)


def absmax_scale(absmax: Tensor, q_max: float = QMAX) -> Tensor:
    """The scale Δ of values up to ``absmax``: float32, same shape; NaN for what is not finite.

    Here and below, ``q_max`` is that of the number format (`qtypes`), int8's by default.
    """
    scale = absmax.to(torch.float32).clamp_min(ABSMAX_FLOOR) * (1.0 / q_max)
    return torch.where(scale < math.inf, scale, math.nan)


def finite_rows(x: Tensor) -> Tensor:
    """1 where a row of x [..., K] is finite, else NaN: float32 [..., 1]."""
    return _one_or_nan(x.abs().amax(dim=-1, keepdim=True) < math.inf)


def finite_heads(x: Tensor) -> Tensor:
    """1 where all tokens of a head of x [B, H, S, D] are finite, else NaN: float32 [B, H, 1, 1].

    Of keys and values, which any query may read. One pass over x, and one over a number per token.
    """
    return _one_or_nan(~(~(x.abs().amax(dim=-1, keepdim=True) < math.inf)).any(dim=-2, keepdim=True))


def _one_or_nan(finite: Tensor) -> Tensor:
    return finite.to(torch.float32).masked_fill(~finite, math.nan)


def token_scale(x: Tensor, q_max: float = QMAX) -> Tensor:
    """Per-token scale of x [..., K]: float32 [..., 1]; every dim but the last is a token dim."""
    return absmax_scale(x.abs().amax(dim=-1, keepdim=True), q_max)


def tensor_scale(x: Tensor, q_max: float = QMAX) -> Tensor:
    """Per-tensor scale of x, any shape: float32 []."""
    return absmax_scale(x.abs().amax() if x.numel() else x.new_zeros(()), q_max)


def weight_scale(w: Tensor, per_channel: bool, q_max: float = QMAX) -> Tensor:
    """Scale of w [N, K]: float32 [N, 1], one per output channel (a max over dim -1), or one for all as [1, 1]."""
    per_row = w.abs().amax(dim=-1, keepdim=True)
    return absmax_scale(per_row if per_channel else per_row.amax(dim=0, keepdim=True), q_max)


def quantize(x: Tensor, scale: Tensor, zero_point: int = 0, dtype: torch.dtype = torch.int8) -> Tensor:
    """q = clamp(round_half_even(x · 1/scale), -127, 127) as int8, or as uint8 shifted by a zero point of 128; 0 for NaN.

    In another format, the nearest value that it has of x · 1/scale.

    Args:
        x: any float dtype, any shape.
        scale: float32, broadcasts against x.
        zero_point: 0, or 128 for the uint8 activations of oneDNN; the shift is exact.
        dtype: of the number format (`qtypes`).
    """
    if dtype != torch.int8:
        return BY_DTYPE[dtype].of(x.to(torch.float32) * scale.reciprocal())
    q = torch.round(x.to(torch.float32) * scale.reciprocal())
    q = q.masked_fill(q.isnan(), 0)  # which no processor's conversion agrees on
    low, high = zero_point - QMAX, zero_point + QMAX
    return (q + zero_point).clamp(low, high).to(torch.uint8 if zero_point else torch.int8)


def dequantize(
    acc: Tensor, scale: Tensor, w_scale: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Y = Δx Δw acc + bias: float32 arithmetic, in this order everywhere, so that results agree bit for bit.

    Args:
        acc: the integer product, int32 or the same in float32 [..., N].
        scale: float32 [..., 1] or [], Δx.
        w_scale: float32 [N] or [1], Δw.
        bias: any float dtype [N], or None.
        dtype: dtype of the result.
    """
    return scale_output(acc.to(torch.float32) * w_scale, scale, bias, dtype)


def dequantize_tokens(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """q · Δ of stored tokens: q int8 [..., K], scale float32 [..., 1]; ``dtype`` [..., K], rounded once."""
    return (q.to(torch.float32) * scale).to(dtype)


def int8_matmul(q: Tensor, w: Tensor) -> Tensor:
    """q [..., K] int8 times w [N, K] int8, accumulated in int32: [..., N], exact."""
    acc = None
    for k in range(0, q.shape[-1], _EXACT_TERMS):
        part = q[..., k : k + _EXACT_TERMS].to(torch.float32) @ w[:, k : k + _EXACT_TERMS].to(torch.float32).t()
        acc = part.to(torch.int32) if acc is None else acc + part.to(torch.int32)
    assert acc is not None
    return acc


def int8_linear(
    q: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Y = Δx Δw (q wᵀ) + bias.

    Args:
        q: int8 [..., K], or uint8 with zero point 128.
        scale: float32 [..., 1] or [], Δx.
        w: int8 [N, K].
        w_scale: float32 [N], Δw.
        bias: any float dtype [N], or None.
        dtype: dtype of the result.

    Returns:
        ``dtype`` [..., N]; the arithmetic after int32 is float32.
    """
    if q.dtype == torch.uint8:
        q = (q.to(torch.int16) - UINT8_ZERO_POINT).to(torch.int8)
    return dequantize(int8_matmul(q, w), scale, w_scale, bias, dtype)


def fp8_linear(q: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`int8_linear` for float8_e4m3fn q [..., K] and w [N, K], with sums in float32."""
    return dequantize(q.to(torch.float32) @ w.to(torch.float32).t(), scale, w_scale, bias, dtype)


def expert_rows(offsets: Tensor) -> list[slice]:
    """The rows of each expert, from where they end: int32 [E], not decreasing."""
    ends = offsets.tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def grouped_linear(
    x: Tensor, w: Tensor, offsets: Tensor, linear: Callable[[Tensor, Tensor], Tensor] = lambda x, w: x @ w.t()
) -> Tensor:
    """Each row of x times the matrix of its expert.

    Args:
        x: any float dtype [T, K], rows sorted by expert.
        w: same dtype [E, N, K].
        offsets: int32 [E], where the rows of each expert end; an expert without rows repeats the end before it.
        linear: the product of some rows and a matrix.

    Returns:
        x's dtype [T, N]; rows past the last offset are zeros.
    """
    out = x.new_zeros(x.shape[0], w.shape[1])
    for rows, matrix in zip(expert_rows(offsets), w, strict=True):
        out[rows] = linear(x[rows], matrix)
    return out


def grouped_dequantize(acc: Tensor, scale: Tensor, w_scale: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """`dequantize` of acc [T, N] with the scales w_scale, float32 [E, N] or [E, 1], of each row's expert."""
    row = torch.arange(acc.shape[0], device=acc.device, dtype=offsets.dtype)
    expert = torch.searchsorted(offsets, row, right=True).clamp_max(w_scale.shape[0] - 1)
    return dequantize(acc, scale, w_scale[expert], None, dtype)


def int8_grouped_linear(
    q: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor, offsets: Tensor, dtype: torch.dtype
) -> Tensor:
    """`int8_linear` of each row with the matrix of its expert: q int8 [T, K], w int8 [E, N, K], w_scale float32 [E, N]."""
    acc = torch.zeros(q.shape[0], w.shape[1], dtype=torch.int32, device=q.device)
    for rows, matrix in zip(expert_rows(offsets), w, strict=True):
        acc[rows] = int8_matmul(q[rows], matrix)
    return grouped_dequantize(acc, scale, w_scale, offsets, dtype)


def scale_output(y: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The epilogue after Δw: y · Δx + bias in float32, cast to dtype."""
    y = y.to(torch.float32) * scale
    return (y if bias is None else y + bias).to(dtype)
