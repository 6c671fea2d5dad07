"""Attention of quantized operands, ``torch.ops.sqcompile.int8_attention``: its definition in plain PyTorch.

    S = softcap(Δq Δk (Q̂ K̂ᵀ) · scale)      the inner product in int32, the rest in float32
    O = softmax(S + mask) V                V in float, or V̂ Δv with P quantized, too

The Triton kernel (triton/attention/) serves CUDA; this file is what runs elsewhere and what tests compare with. It
goes through the queries block by block: rows of a softmax do not know of each other, and a block skips the keys behind
the last one that any of its queries sees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sqcompile.kernels.attention_parts import (
    BLOCKED,
    MASK_BLOCK,
    P_BLOCK,
    aligned,
    attend,
    attention_weights,
    int8_attend,
    int8_scores,
    mask_scores,
)
from sqcompile.kernels.reference import finite_rows, quantize, token_scale

# Scores of one block of queries, about 4 MiB in float32: they stay in a CPU's cache, and memory does not grow with queries.
BLOCK_SCORES = 2**20


def int8_attention(
    q: Tensor,
    q_scale: Tensor | None,
    k: Tensor,
    k_scale: Tensor,
    v: Tensor,
    v_scale: Tensor | None,
    mask: Tensor | None,
    blocks: Tensor | None,
    diagonal: int | None,
    scale: float,
    softcap: float,
    dtype: torch.dtype,
) -> Tensor:
    """softmax(Δq Δk (q kᵀ) · scale + mask) v.

    Args:
        q: int8 [B, H, Sq, D]; or float16, bfloat16 or float32, which is quantized first, with q_scale.
        q_scale: float32, broadcasts to [B, H, Sq, 1]: [] per tensor, [H, 1, 1] per head, [B, H, Sq, 1] per token. None:
            a q that is not int8 gets its own scale per token. A query that is not int8 and not finite gives NaN.
        k: int8 [B, G, Sk, D]; query head h reads key head h // (H / G).
        k_scale: float32, broadcasts to [B, G, Sk, 1].
        v: float16, bfloat16 or float32 [B, G, Sk, Dv]; or int8.
        v_scale: of an int8 v, float32, broadcasts to [B, G, 1, Dv]: per channel, per head or one.
        mask: broadcasts to [B, H, Sq, Sk]; bool, False is blocked, or of a floating dtype and added, where -65504 and
            below is blocked, so that minus infinity, any dtype's lowest number and sums of that with a bias are.
        blocks: the mask's `mask_blocks`, which saves reading it where it is all one; the result is the same.
        diagonal: query i sees the keys j <= i + diagonal: 0 is scaled_dot_product_attention's is_causal, Sk - Sq lets
            the last query see every key (decode). None: every key.
        scale: of the scores; not negative.
        softcap: 0 for none.
        dtype: of the result.

    Returns:
        ``dtype`` [B, H, Sq, Dv], laid out as [B, Sq, H, Dv]. A query that sees no key gets zeros. A NaN or infinite
        scale makes NaN of what it reaches.
    """
    if q.dtype != torch.int8:
        finite = finite_rows(q)
        q_scale = token_scale(q) if q_scale is None else q_scale
        q, q_scale = quantize(q, q_scale), q_scale * finite
    assert q_scale is not None
    batch, heads, queries, _ = q.shape
    keys, k = k.shape[2], k.to(torch.float32)  # once for all blocks of queries
    v = v.to(torch.float32) if v_scale is None else v
    out = q.new_empty((batch, queries, heads, v.shape[-1]), dtype=dtype)
    rows = max(1, BLOCK_SCORES // max(1, batch * heads * keys))
    for first in range(0, queries, rows):
        block = slice(first, first + rows)
        masked = None if mask is None else _rows(mask, block)
        last = min(first + rows, queries) - 1
        seen = slice(0, _seen(keys, masked, None if diagonal is None else last + diagonal))
        scores = int8_scores(
            q[..., block, :], _rows(q_scale, block), k[..., seen, :], _rows(k_scale, seen), torch.float32
        )
        scores = scores * scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        if masked is not None and masked.dim() and masked.shape[-1] != 1:
            masked = masked[..., seen]
        scores = mask_scores(scores, masked, None if diagonal is None else first + diagonal)
        if v_scale is None:
            y = attend(attention_weights(scores, torch.float32), v[..., seen, :])
        else:
            y = int8_attend(scores, v[..., seen, :], v_scale, dtype)
        out[:, block] = y.transpose(1, 2)
    return out.transpose(1, 2)


def _rows(x: Tensor, rows: slice) -> Tensor:
    """Some rows of x, which broadcasts to [..., S, N]: x itself where it has one row for all."""
    return x if x.dim() < 2 or x.shape[-2] == 1 else x[..., rows, :]


def _seen(keys: int, mask: Tensor | None, last: int | None) -> int:
    """How many keys from the first on some queries must read: none of them sees a later one.

    Args:
        keys: Sk.
        mask: of these queries, as of `int8_attention`.
        last: the last key that a diagonal leaves them, or None.

    Returns:
        Sk, or a multiple of 128: a sum of weights then adds the same numbers in the same order as one over all keys,
        and zeros, so that a result does not depend on which queries share a block.
    """
    seen = keys if last is None else min(keys, max(0, last + 1))
    if mask is not None and mask.dim() and mask.shape[-1] == keys:
        free = mask if mask.dtype == torch.bool else ~(mask <= BLOCKED)
        free = free.flatten(0, -2).any(0) if mask.dim() > 1 else free
        seen = min(seen, int(free.nonzero().max()) + 1 if free.any() else 0)
    return min(keys, -(-seen // P_BLOCK) * P_BLOCK)


def mask_blocks(mask: Tensor) -> Tensor:
    """Which blocks of a mask are all blocked, all free or mixed: computed on the device, once for all layers.

    Args:
        mask: [..., Sq or 1, Sk], at most four dims, as of `int8_attention`.

    Returns:
        int32 [b, h, ceil(Sq / 128) · (2 + ceil(Sk / 128))], b and h as the mask's (1 where it has none): rows of
        2 + ceil(Sk / 128), one after the other; of a dim of ceil(Sq / 128), a compiler that holds Sq as a symbol would
        ask whether it is 1, and fix the answer. Each row: how many blocks of keys are free (every entry True or 0), how
        many mixed, and their numbers: the free ones from the front and ascending, the mixed ones from the back and
        descending; -1 between. A block that ends past Sk is mixed.
    """
    mask = mask.view((1,) * (4 - mask.dim()) + mask.shape)
    rows, columns = MASK_BLOCK
    queries, keys = mask.shape[-2:]
    blocked, free = (~mask, mask) if mask.dtype == torch.bool else (mask <= BLOCKED, mask == 0)
    padding = (0, -keys % columns, 0, -queries % rows)
    tiles = (-1, rows), (-1, columns)

    def every(x: Tensor, outside: bool) -> Tensor:
        """Whether x holds in all of each block: [b, h, ceil(Sq / 128), ceil(Sk / 128)]."""
        x = torch.nn.functional.pad(x, padding, value=True)
        x[..., keys:] = outside
        return x.unflatten(3, tiles[1]).unflatten(2, tiles[0]).all(dim=5).all(dim=3)

    free, blocked = every(free, False), every(blocked, True)
    mixed = ~free & ~blocked
    number = torch.arange(free.shape[-1], device=mask.device).expand(free.shape)
    front = torch.where(free, number, 2**30).sort(-1).values
    back = torch.where(mixed, number, 2**30).sort(-1).values.flip(-1)
    numbers = torch.where(front < 2**30, front, torch.where(back < 2**30, back, -1))
    return torch.cat([free.sum(-1, keepdim=True), mixed.sum(-1, keepdim=True), numbers], -1).to(torch.int32).flatten(2)


def _int8_attention_triton(q: Tensor, *args: Any) -> Tensor:
    from sqcompile.kernels.triton.attention.int8_attention import int8_attention as kernel

    return kernel(q, *args)


def _mask_blocks_triton(mask: Tensor) -> Tensor:
    from sqcompile.kernels.triton.attention.mask import mask_blocks as kernel

    return kernel(mask)


def _int8_attention_fake(q: Tensor, *args: Any) -> Tensor:
    v, dtype = args[3], args[-1]
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[-1]), dtype=dtype).transpose(1, 2)


def _mask_blocks_fake(mask: Tensor) -> Tensor:
    b, h, queries, keys = (1,) * (4 - mask.dim()) + mask.shape
    rows, columns = MASK_BLOCK
    return mask.new_empty((b, h, -(-queries // rows) * (2 + -(-keys // columns))), dtype=torch.int32)


# schema: (plain PyTorch, Triton, fake), as in fused.py
ATTENTION: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    "int8_attention(Tensor q, Tensor? q_scale, Tensor k, Tensor k_scale, Tensor v, Tensor? v_scale, Tensor? mask, "
    "Tensor? blocks, SymInt? diagonal, float scale, float softcap, ScalarType dtype) -> Tensor": (
        int8_attention, _int8_attention_triton, _int8_attention_fake,
    ),
    "mask_blocks(Tensor mask) -> Tensor": (mask_blocks, _mask_blocks_triton, _mask_blocks_fake),
    "aligned_mask(Tensor mask) -> Tensor": (aligned, aligned, aligned),
}  # fmt: skip
