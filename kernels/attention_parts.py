"""The pieces of attention in a quantized graph, in plain PyTorch; `attention_int8` is the operator they become.

    S = Δq Δk (Q̂ K̂ᵀ)                   `int8_scores`: the inner product of integers, the rest in float32
    S = softcap · tanh(S / softcap)     the graph's own nodes
    P = softmax(S + mask)               `mask_scores`, `attention_weights`
    O = P V, or P̂ V̂ Δv                  `attend`, `int8_attend`

Query head h reads key head h // (H / G); no head is repeated in memory. A row whose every score is -65504 (float16's
lowest number) or below sees no key, and gets zeros: so are minus infinity, any dtype's lowest number and sums of that
with a bias all one.

P̂ = round(127 · exp(S - max)) with the maximum over each 128 keys: relative to the maximum of the whole row, one large
score, such as that of the first token in most language models, rounds all other weights to zero: cosine 0.95 where this
has 0.9999 (8192 normal scores, one of them 8 larger). The normalizer is the sum of P before rounding: measured on
scores of spread 0.3 to 5 it is as good as the sum of P̂ (relative error 0.016 against 0.024 at worst for values without
a mean, 0.022 against 0.011 with one; per row they differ by a factor only), and a kernel has it for nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sqcompile.kernels.reference import QMAX, absmax_scale

BLOCKED = -65504.0  # float16's lowest number
P_BLOCK = 128  # keys whose weights are quantized relative to one maximum
MASK_BLOCK = (128, 128)  # queries and keys of a block in `attention_int8.mask_blocks`
_ALIGNED = 16  # elements


def aligned(x: Tensor) -> Tensor:
    """A copy of x [..., N] whose rows begin at multiples of 16 elements: of a mask, their addresses take fewer registers."""
    if x.dim() == 0:
        return x.clone()
    width = x.shape[-1]
    return x.new_empty((*x.shape[:-1], -(-width // _ALIGNED) * _ALIGNED))[..., :width].copy_(x)


def scale_over(x: Tensor, dims: list[int]) -> Tensor:
    """Scale of x [B, H, S, D] with one absmax over ``dims``, which stay as 1: float32, per head for (-2, -1)."""
    absmax = x.abs().amax(dim=dims, keepdim=True) if x.numel() else x.new_zeros(_kept(x, dims))
    return absmax_scale(absmax)


def _kept(x: Tensor, dims: list[int]) -> list[int]:
    """Sizes of x with ``dims`` as 1."""
    return [1 if d in dims or d - x.dim() in dims else size for d, size in enumerate(x.shape)]


def _by_group(x: Tensor, y: Tensor) -> Tensor:
    """x [B, H, S, K] times y [B, G, K, N], each head with its group's: [B, H, S, N]."""
    (batch, heads, rows, width), groups = x.shape, y.shape[1]
    if heads == groups:
        return x @ y
    return (x.reshape(batch, groups, heads // groups * rows, width) @ y).reshape(batch, heads, rows, y.shape[-1])


def _per_head(scale: Tensor, heads: int) -> Tensor:
    """A scale that broadcasts to [B, G, ., .] as one that broadcasts to [B, H, ., .]."""
    groups = scale.shape[-3] if scale.dim() >= 3 else 1
    return scale if groups in (1, heads) else scale.repeat_interleave(heads // groups, dim=-3)


def int8_scores(q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Δq Δk (q kᵀ).

    Args:
        q: int8 [B, H, Sq, D].
        q_scale: float32, broadcasts to [B, H, Sq, 1].
        k: int8 [B, G, Sk, D].
        k_scale: float32, broadcasts to [B, G, Sk, 1].
        dtype: of the result.

    Returns:
        ``dtype`` [B, H, Sq, Sk]; the product is exact up to D = 1040, the arithmetic after it is float32.
    """
    acc = _by_group(q.to(torch.float32), k.to(torch.float32).transpose(-1, -2))
    if k_scale.dim() >= 2:
        k_scale = k_scale.transpose(-1, -2)
    return (acc * q_scale * _per_head(k_scale, q.shape[1])).to(dtype)


def mask_scores(scores: Tensor, mask: Tensor | None, diagonal: int | None) -> Tensor:
    """Scores [B, H, Sq, Sk] with minus infinity where a key is blocked, as scaled_dot_product_attention does it.

    Args:
        mask: broadcasts to the scores: bool (False is blocked), or added.
        diagonal: query i sees the keys j <= i + diagonal: 0 is its is_causal. None: every key.
    """
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if diagonal is not None:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(diagonal)
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores


def attention_weights(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """softmax over the last dim in ``dtype``; zeros where a row sees no key."""
    blind = (scores <= BLOCKED).all(dim=-1, keepdim=True)
    return torch.softmax(scores, -1, dtype).masked_fill(blind, 0)


def attend(p: Tensor, v: Tensor) -> Tensor:
    """P V of p [B, H, Sq, Sk] and v [B, G, Sk, Dv], of one dtype: [B, H, Sq, Dv]."""
    return _by_group(p, v)


def int8_attend(scores: Tensor, v: Tensor, v_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """softmax(scores) v with P and V in INT8.

    Args:
        scores: any float dtype [B, H, Sq, Sk], masked.
        v: int8 [B, G, Sk, Dv].
        v_scale: float32, broadcasts to [B, G, 1, Dv].
        dtype: of the result.

    Returns:
        ``dtype`` [B, H, Sq, Dv], zeros for a row that sees no key.
    """
    scores = scores.float()
    if not scores.shape[-1]:
        return scores.new_zeros((*scores.shape[:-1], v.shape[-1]), dtype=dtype)
    scores = scores.masked_fill(scores <= BLOCKED, -torch.inf)
    top = _finite(scores.amax(-1, keepdim=True))
    total = torch.exp(scores - top).sum(-1, keepdim=True)
    out = torch.zeros((), dtype=torch.float32, device=scores.device)
    for part, values in zip(scores.split(P_BLOCK, -1), v.split(P_BLOCK, -2), strict=True):
        near = part.amax(-1, keepdim=True)  # minus infinity where all of the part is blocked, which then counts nothing
        p = torch.round(QMAX * torch.exp(part - _finite(near)))
        out = out + _by_group(p, values.to(torch.float32)) * (torch.exp(near - top) / QMAX)
    v_scale = _per_head(v_scale, scores.shape[1])
    return (out / torch.where(total == 0, 1.0, total) * v_scale).to(dtype)


def int8_attend_whole(scores: Tensor, v: Tensor, v_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`int8_attend` with all blocks of keys at once, filled up with keys that none sees: traced, it serves any number of them."""
    heads, keys = scores.shape[1], scores.shape[-1]
    missing = (keys // P_BLOCK + 2) * P_BLOCK - keys  # never one block: torch.export would take that for all there is
    scores = scores.float()
    scores = F.pad(scores.masked_fill(scores <= BLOCKED, -torch.inf), (0, missing), value=-torch.inf)
    parts = scores.unflatten(-1, (-1, P_BLOCK)).transpose(-2, -3)  # [B, H, blocks, Sq, 128]
    values = F.pad(v.to(torch.float32), (0, 0, 0, missing)).unflatten(-2, (-1, P_BLOCK))  # [B, G, blocks, 128, D]
    near = parts.amax(-1, keepdim=True)
    top = _finite(near.amax(-3, keepdim=True))
    p = torch.round(QMAX * torch.exp(parts - _finite(near)))
    total = torch.exp(parts - top).sum((-3, -1)).unsqueeze(-1)
    products = p @ values.repeat_interleave(heads // v.shape[1], dim=1)
    out = (products * (torch.exp(near - top) / QMAX)).sum(-3)
    return (out / torch.where(total == 0, 1.0, total) * _per_head(v_scale, heads)).to(dtype)


def int8_attend_fake(scores: Tensor, v: Tensor, v_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return scores.new_empty((*scores.shape[:-1], v.shape[-1]), dtype=dtype)


def _finite(top: Tensor) -> Tensor:
    return torch.where(top == -torch.inf, 0.0, top)
