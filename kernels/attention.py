"""Attention in float: scaled_dot_product_attention, told at run time what its mask and its heads really are.

A traced model hands attention a mask tensor and key and value heads repeated for every query head. Seen as it is,
the mask is nearly always causal or empty, and the repeated heads are copies: both are twice the work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sqcompile.kernels.cpu import flash

GENERAL, CAUSAL, FULL = 0, 1, 2


def mask_kind(mask: Tensor) -> Tensor:
    """What a mask says, read from its values: int64 scalar, FULL (attend everywhere), CAUSAL or GENERAL.

    Args:
        mask: [..., Sq, Sk], additive, of a floating dtype. CAUSAL means exactly 0 where ``key <= query`` and minus
            infinity, or the dtype's lowest number, elsewhere, for every batch and head. Such a row has a key to attend
            to, so that both leave nothing of the others. A sliding window or padding is GENERAL, and so is a mask of one
            row: it may stand for any number of queries.
    """
    kind = GENERAL
    as_bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[mask.element_size()]
    bits = mask.view(as_bits).numpy()
    if not bits.any():
        kind = FULL
    elif mask.dim() >= 2 and mask.shape[-2] > 1:
        blocked = mask[(0,) * (mask.dim() - 1)][-1]  # the last key, as the first query sees it
        if blocked <= torch.finfo(mask.dtype).min:
            causal = blocked.repeat(mask.shape[-2:]).triu_(1)
            kind = CAUSAL if (bits == causal.view(as_bits).numpy()).all() else GENERAL
    return torch.tensor(kind)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, about: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    """softmax(q kᵀ · scale + mask) v.

    Args:
        q: [B, H, Sq, D].
        k, v: [B, G, Sk, D] and [B, G, Sk, Dv]; query head h reads key head h // (H / G).
        mask: broadcastable to [B, H, Sq, Sk]; additive, on a GPU also bool. None for none.
        about: what is known of the mask: its `mask_kind`, for CPUs, or its `attention_int8.mask_blocks`, for GPUs.
        is_causal, scale: as of scaled_dot_product_attention.

    Returns:
        [B, H, Sq, Dv], laid out as [B, Sq, H, Dv]. Where an additive mask has numbers of -65504 and below for every key of
        a query, a GPU's result is zeros, as if they were minus infinity.
    """
    batch, heads, queries, d = q.shape
    if mask is not None and about is not None and about.dim() == 0 and about.item() != GENERAL:
        mask, is_causal = None, about.item() == CAUSAL
    groups = k.shape[1]
    shared = mask is None or mask.dim() < 3 or mask.shape[-3] == 1  # one mask for all heads
    if queries == 1 and groups != heads and shared and not is_causal:
        # decode: the query heads of a group are the queries of one attention, which reads each key once
        out = F.scaled_dot_product_attention(q.reshape(batch, groups, heads // groups, d), k, v, mask, 0.0, scale=scale)
        return out.reshape(batch, 1, heads, v.shape[-1]).transpose(1, 2)
    if queries >= flash.least_queries() and flash.fits(q, k, v, mask, is_causal, scale):
        return flash.flash(q, k, v, mask, is_causal, scale)
    out = F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=groups != heads)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _attention_triton(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, about: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    """PyTorch would repeat shared key heads in memory where there is a mask, and not skip what the mask blocks."""
    from sqcompile.kernels.triton.attention.int8_attention import FEW_ROWS, float_attention
    from sqcompile.kernels.triton.gemm.tiles import gpu_of

    group = q.shape[1] // k.shape[1]
    # Where many queries were seen to be faster: on Hopper, but for small heads of their own keys, which are mostly those of
    # encoders, whose masks block little.
    faster = gpu_of(q.device).capability == 90 and (group > 1 or q.shape[3] > 64)
    if q.shape[2] * group > FEW_ROWS and not faster:
        k, v = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v))
        return attention(q, k, v, mask, None, is_causal, scale)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return float_attention(q, k, v, mask, about, 0 if is_causal else None, scale)


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, *more: Any) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[-1])).transpose(1, 2)


# schema: (plain PyTorch, Triton, fake), as in fused.py
ATTENTION: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? about, bool is_causal, float? scale) -> Tensor": (
        attention, _attention_triton, _attention_fake,
    ),
}  # fmt: skip
