"""Rotation of channels in blocks by orthonormal Hadamard matrices, beside smoothing (QuaRot, arXiv 2404.00456).

    Y = X Wᵀ = (X H)(W H)ᵀ,   H = diag(H_b, H_b, ...),   H_b = H_bᵀ,   H_b H_b = I

H_b is Sylvester's matrix of b rows over sqrt(b). A row's outlier is spread over its block, so that the scale of the row is
smaller, and with it the error of all other channels. W H is made when a model is compiled; X H is computed where X is
quantized: log2(b) additions for each value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sqcompile.kernels import reference

BLOCKS = (16, 32, 64, 128)


def blocks_of(k: int) -> tuple[int, ...]:
    """The sizes of blocks that K channels can be rotated in."""
    return tuple(b for b in BLOCKS if k % b == 0)


def rotate(x: Tensor, block: int) -> Tensor:
    """x H in float32; of float64, in float64.

    Args:
        x: any float dtype [..., K].
        block: the size of the blocks, a power of two that divides K.

    Returns:
        [..., K], contiguous. The sums are taken in pairs: channels 1 apart first, then 2, 4, ... apart.
    """
    y = x.to(wide(x.dtype))
    step = 1
    while step < block:
        a, b = y.unflatten(-1, (-1, 2, step)).unbind(-2)
        y = torch.stack((a + b, a - b), -2).flatten(-3)
        step *= 2
    return y.mul(block**-0.5).contiguous()


def rotate_quantize(x: Tensor, block: int, scale: Tensor | None, zero_point: int) -> tuple[Tensor, Tensor]:
    """The quantized rows of `rotate`.

    Args:
        x: any float dtype [..., K].
        block: the size of the blocks.
        scale: static Δ, float32 of one element, or None for one per token.
        zero_point: 0 for int8, 128 for uint8.

    Returns:
        int8 or uint8 [..., K], and the rows' factors, float32 [..., 1]: Δ, or `reference.finite_rows` with a static one.
    """
    y = rotate(x, block)
    rows = reference.token_scale(y) if scale is None else reference.finite_rows(y)
    return reference.quantize(y, rows if scale is None else scale, zero_point), rows


def wide(dtype: torch.dtype) -> torch.dtype:
    """In which dtype values of another are rotated."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rotate_fake(x: Tensor, block: int) -> Tensor:
    return x.new_empty(x.shape, dtype=wide(x.dtype))


def rotate_quantize_fake(x: Tensor, block: int, scale: Tensor | None, zero_point: int) -> tuple[Tensor, Tensor]:
    q = x.new_empty(x.shape, dtype=torch.uint8 if zero_point else torch.int8)
    return q, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
