"""Attention on CPUs: scaled_dot_product_attention, told at run time what its mask and its heads really are.

A traced model hands attention a mask tensor and key and value heads repeated for every query head. Seen as it is,
the mask is nearly always causal or empty, and the repeated heads are copies: both are twice the work.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sqcompile.kernels import x86

GENERAL, CAUSAL, FULL = 0, 1, 2
# From here our AMX kernel is faster than PyTorch's.
FLASH_QUERIES = 32


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
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kind: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    """softmax(q kᵀ · scale + mask) v.

    Args:
        q: [B, H, Sq, D].
        k, v: [B, G, Sk, D] and [B, G, Sk, Dv]; query head h reads key head h // (H / G).
        mask: additive, broadcastable to [B, H, Sq, Sk], with its `mask_kind`; None with None.
        is_causal, scale: as of scaled_dot_product_attention.

    Returns:
        [B, H, Sq, Dv], laid out as [B, Sq, H, Dv].
    """
    batch, heads, queries, _ = q.shape
    if mask is not None and kind is not None and kind.item() != GENERAL:
        mask, is_causal = None, kind.item() == CAUSAL
    groups = k.shape[1]
    shared = mask is None or mask.dim() < 3 or mask.shape[-3] == 1  # one mask for all heads
    if queries == 1 and groups != heads and shared and not is_causal:
        # decode: the query heads of a group are the queries of one attention, which reads each key once
        out = F.scaled_dot_product_attention(
            q.reshape(batch, groups, heads // groups, -1), k, v, mask, 0.0, scale=scale
        )
        return out.reshape(batch, 1, heads, -1).transpose(1, 2)
    if mask is None and queries >= FLASH_QUERIES and x86.flash_fits(q, k, v, scale):
        return x86.flash(q, k, v, is_causal, scale)
    out = F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=groups != heads)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def attention_fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kind: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[-1])).transpose(1, 2)
