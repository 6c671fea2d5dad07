"""Attention in float on x86 CPUs with vectors of 512 bits, by a kernel of our own (flash.cpp)."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from sqcompile.kernels.cpu import x86

# From so many queries on `flash` is faster than PyTorch's attention: with AMX, whose tiles are to be filled, and without.
QUERIES_AMX, QUERIES = 32, 8
TILES = 2  # kTiles of flash_products.cpp


def fits(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> bool:
    """Whether `flash` takes these: bfloat16, heads of one size, a multiple of 32 up to 256; a positive scale; one kind of mask."""
    (batch, heads, _, d), groups = q.shape, k.shape[1]
    dense = all(t.dtype == torch.bfloat16 and t.stride(-1) == 1 and t.shape[-1] == d for t in (q, k, v))
    alike = len(k) == batch and k.shape[:3] == v.shape[:3] and groups > 0 and heads % groups == 0
    some = d % 32 == 0 and 0 < d <= 256 and q.numel() > 0 and k.numel() > 0
    masked = mask is None or (not causal and _mask_fits(mask, (*q.shape[:3], k.shape[2])))
    return dense and alike and some and masked and (scale is None or scale > 0) and available()


def _mask_fits(mask: Tensor, shape: tuple[int, ...]) -> bool:
    dense = 2 <= mask.dim() <= 4 and mask.shape[-1] == shape[3] and mask.stride(-1) == 1
    alike = all(size in (1, full) for size, full in zip(mask.shape[::-1], shape[::-1], strict=False))
    return dense and alike and mask.dtype in (torch.bfloat16, torch.float32)


def least_queries() -> int:
    """From how many queries on `flash` is faster than PyTorch's attention."""
    return QUERIES_AMX if x86.amx() else QUERIES


def flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    """softmax(q kᵀ · scale + mask) v for bfloat16 q [B, H, Sq, D], k and v [B, G, Sk, D] (`fits`).

    Args:
        mask: bfloat16 or float32, broadcastable to [B, H, Sq, Sk], but not in its last dimension; None for none.

    Returns:
        bfloat16 [B, H, Sq, D], laid out as [B, Sq, H, D]. With ``causal``, query i attends to keys 0 to i. A query whose mask
        has minus infinity for every key gets zeros, as PyTorch's attention gives it.
    """
    batch, heads, queries, d = q.shape
    groups, keys = k.shape[1], k.shape[2]
    out = torch.empty((batch, queries, heads, d), dtype=torch.bfloat16)
    packed = torch.empty(2 * batch * groups * -(-keys // 32) * 32 * d, dtype=torch.bfloat16)
    by_mask = (0, 0, 0) if mask is None else mask.expand(batch, heads, queries, keys).stride()[:3]
    half = mask is not None and mask.dtype == torch.bfloat16
    sizes = batch, heads, groups, queries, keys, d, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *by_mask, half
    kernels = x86.library()
    assert kernels is not None
    kernels.sqcompile_flash(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), None if mask is None else mask.data_ptr(), out.data_ptr(),
        packed.data_ptr(), (ctypes.c_int64 * len(sizes))(*sizes), d**-0.5 if scale is None else scale, causal,
        products(), torch.get_num_threads(),
    )  # fmt: skip
    return out.transpose(1, 2)


def available() -> bool:
    """Whether this CPU has vectors of 512 bits, and the kernels are built."""
    return products() >= 0


@functools.cache
def products() -> int:
    """By what `flash` multiplies here: one of `Products` in flash_products.cpp; -1 for nothing."""
    if (kernels := x86.library()) is None:
        return -1
    found: int = TILES if x86.amx() else kernels.sqcompile_products()
    return found
