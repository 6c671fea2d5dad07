"""Attention of random blocks, with rotary embeddings and masks, each in many spellings."""

from __future__ import annotations

import math
import random

import torch
import torch.nn.functional as F
from random_parts import Norm, Piece, Project, vector
from torch import nn


def rotate_half(x):
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


class Rotary(Piece):
    """Of x [B, H, S, D]; in place of one, often nothing."""

    SPELLINGS = "nothing nothing halves pairs partial written matrices tables"

    def __init__(self, r: random.Random, d: int) -> None:
        super().__init__(r, *(("nothing",) if d % 4 else ()))
        self.register_buffer("frequencies", 0.3 ** torch.arange(0, d, 2).div(d))

    def _angles(self, x, d):
        at = torch.arange(x.shape[2], device=x.device, dtype=x.dtype)
        return at[:, None] * self.frequencies[: d // 2]

    def nothing(self, x):
        return x

    def halves(self, x):
        angles = self._angles(x, x.shape[-1])
        angles = torch.cat((angles, angles), -1)
        return x * angles.cos() + rotate_half(x) * angles.sin()

    def pairs(self, x):
        angles = self._angles(x, x.shape[-1])
        a, b, cos, sin = x[..., ::2], x[..., 1::2], angles.cos(), angles.sin()
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)

    def partial(self, x):
        half = x.shape[-1] // 2
        turned, same = x.split([half, x.shape[-1] - half], -1)
        angles = self._angles(x, half).repeat_interleave(2, -1)
        swapped = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).reshape(turned.shape)
        return torch.cat([turned * angles.cos() + swapped * angles.sin(), same], -1)

    def written(self, x):
        """Into a new tensor, half by half."""
        angles, half = self._angles(x, x.shape[-1]), x.shape[-1] // 2
        y, a, b = torch.empty_like(x), x[..., :half], x[..., half:]
        y[..., :half] = a * angles.cos() - b * angles.sin()
        y[..., half:] = b * angles.cos() + a * angles.sin()
        return y

    def matrices(self, x):
        """Pairs times a matrix each."""
        angles = self._angles(x, x.shape[-1])
        turn = torch.stack((angles.cos(), -angles.sin(), angles.sin(), angles.cos()), -1).unflatten(-1, (2, 2))
        return (turn @ x.unflatten(-1, (-1, 2)).unsqueeze(-1)).squeeze(-1).flatten(-2)

    def tables(self, x):
        """Angles of positions that are a tensor of integers, one row for each sequence."""
        at = torch.arange(x.shape[2], device=x.device).flip(0).expand(x.shape[0], -1)
        angles = torch.einsum("bs,f->bsf", at.float(), self.frequencies.float())
        cos, sin = (t.repeat(1, 1, 2).to(x.dtype).unsqueeze(1) for t in (angles.cos(), angles.sin()))
        return (x * cos) + (rotate_half(x) * sin)


class Attention(Piece):
    """[B, S, C] and, across, [B, M, C] with a bool mask [B, M] -> [B, S, C]."""

    SPELLINGS = """
        sdpa sdpa sdpa_grouped sdpa_scaled sdpa_padded sdpa_narrow matmul einsum bmm baddbmm float32_softmax token_major
        single_key_value softmax_by_hand sigmoid linear with_sink capped
    """
    HEADS = "separate separate fused_chunk fused_view fused_by_head fused_key_value einsum unbound"
    MASKS = "none none causal causal_fill causal_where alibi window"

    def __init__(self, r: random.Random, c: int, across: bool = False) -> None:
        super().__init__(r)
        self.h = r.choice([h for h in (1, 2, 4) if c % h == 0 and (c // h) % 2 == 0])
        self.d, self.across = c // self.h, across
        many = self.spelling in ("sdpa", "sdpa_grouped", "matmul", "sdpa_scaled", "capped")
        self.g = r.choice([g for g in (1, 2, 4) if self.h % g == 0]) if many else self.h
        self.g = 1 if self.spelling == "single_key_value" else self.g
        ways = [
            w
            for w in self.HEADS.split()
            if (self.g == self.h or w == "separate") and (not across or w in ("separate", "fused_key_value", "einsum"))
        ]
        self.way, self.mask = r.choice(ways), "none" if across else r.choice(self.MASKS.split())
        self.repeat = r.choice(("interleave", "expand"))
        d, h, g = self.d, self.h, self.g
        if (self.way.startswith("fused") and self.way != "fused_key_value") or self.way == "unbound":
            self.qkv = Project(r, c, 3 * c)
        elif self.way == "einsum":
            self.wq, self.wk, self.wv = (nn.Parameter(torch.randn(c, h, d) / c**0.5) for _ in range(3))
        else:
            self.q = Project(r, c, c)
            if self.way == "fused_key_value":
                self.kv = Project(r, c, 2 * c)
            else:
                self.k, self.v = Project(r, c, g * d), Project(r, c, g * d)
        self.norms = r.choice(("none", "none", "none", "head", "unit"))
        if self.norms == "head":
            self.q_norm, self.k_norm = Norm(r, d), Norm(r, d)
        self.rotary = Rotary(r, d)
        self.after = r.choice(("none", "none", "none", "gate", "norm", "bias", "scale", "values", "twice"))
        if self.after == "gate":
            self.gate = Project(r, c, c)
        if self.after == "norm":
            self.out_norm = Norm(r, c)
        self.out_by_head = r.random() < 0.15
        if self.out_by_head:
            self.wo = nn.Parameter(torch.randn(h, d, c) / c**0.5)
        else:
            self.o = Project(r, c, c)
        self.slopes = nn.Buffer(2.0 ** -torch.arange(1, h + 1))
        self.sink = vector(h)

    def extra_repr(self) -> str:
        return f"{self.spelling}, {self.way}, mask {self.mask}, {self.h} heads, {self.g} groups, norms {self.norms}, after {self.after}"

    def _heads(self, x, m):
        (b, s, _), h, d = x.shape, self.h, self.d
        if self.way == "separate":
            return tuple(
                f(y).view(b, -1, n, d).transpose(1, 2)
                for f, y, n in ((self.q, x, h), (self.k, m, self.g), (self.v, m, self.g))
            )
        if self.way == "einsum":
            return tuple(torch.einsum("bsd,dhe->bhse", y, w) for y, w in ((x, self.wq), (m, self.wk), (m, self.wv)))
        if self.way == "fused_key_value":
            k, v = self.kv(m).unflatten(-1, (2, h, d)).permute(2, 0, 3, 1, 4)
            return self.q(x).reshape(b, s, h, d).permute(0, 2, 1, 3), k, v
        y = self.qkv(x)
        if self.way == "fused_chunk":
            return tuple(t.reshape(b, s, h, d).transpose(1, 2) for t in y.chunk(3, -1))
        if self.way == "fused_view":
            q, k, v = y.view(b, s, 3, h, d).permute(2, 0, 3, 1, 4)
            return q, k, v
        if self.way == "fused_by_head":
            return y.view(b, s, h, 3 * d).transpose(1, 2).chunk(3, -1)
        return tuple(t.transpose(1, 2) for t in y.view(b, s, h, 3, d).unbind(3))

    def _bias(self, scores):
        """Masks and biases of scores [.., S, M]."""
        s, m = scores.shape[-2:]
        row, column = torch.arange(s, device=scores.device)[:, None], torch.arange(m, device=scores.device)
        if self.mask == "causal":
            return scores + torch.full((s, m), float("-inf"), device=scores.device, dtype=scores.dtype).triu(1)
        if self.mask == "causal_fill":
            return scores.masked_fill(column > row, torch.finfo(scores.dtype).min)
        if self.mask == "causal_where":
            return torch.where(torch.ones(s, m, dtype=torch.bool, device=scores.device).tril(), scores, -1e4)
        if self.mask == "window":
            return scores.masked_fill_((column > row) | (column < row - 4), float("-inf"))
        if self.mask == "alibi" and scores.dim() == 4:
            return scores - self.slopes[:, None, None] * (row - column).abs()
        return scores

    def forward(self, x, memory=None, padding=None):
        memory = x if memory is None else memory
        q, k, v = self._heads(x, memory)
        if self.norms == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.norms == "unit":
            q, k = 3.0 * F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        q, k = self.rotary(q), self.rotary(k)
        if self.g != self.h and self.spelling not in ("sdpa_grouped", "single_key_value"):
            k, v = self._repeated(k), self._repeated(v)
        keep = None if padding is None else padding[:, None, None, :]
        y = getattr(self, self.spelling)(q, k, v, keep)
        if self.after == "scale":
            y = y * self.sink[:, None, None]
        if self.after == "values" and self.g == self.h and not self.across:
            y = y + v
        if self.after == "twice" and self.g == self.h:  # other queries over the same keys and values
            y = torch.add(y, getattr(self, self.spelling)(q.flip(1), k, v, keep), alpha=0.5)
        if self.after == "bias":
            y = y + (v if self.g == self.h else v[:, :1]).mean(-2, keepdim=True)
        if self.out_by_head:
            return torch.einsum("bhse,hed->bsd", y, self.wo)
        y = y.transpose(1, 2).flatten(2)
        if self.after == "gate":
            y = y * torch.sigmoid(self.gate(x))
        if self.after == "norm":
            y = self.out_norm(y)
        return self.o(y)

    def _repeated(self, t):
        b, g, s, d = t.shape
        if self.repeat == "interleave":
            return t.repeat_interleave(self.h // g, 1)
        return t[:, :, None].expand(b, g, self.h // g, s, d).reshape(b, self.h, s, d)

    def _mask_for(self, q, k, keep):
        """attn_mask and is_causal of scaled_dot_product_attention."""
        if keep is not None:
            return keep, False
        if self.mask == "causal":
            return None, True
        if self.mask == "none":
            return None, False
        return self._bias(torch.zeros(1, self.h, q.shape[2], k.shape[2], device=q.device, dtype=q.dtype)), False

    def sdpa(self, q, k, v, keep):
        mask, causal = self._mask_for(q, k, keep)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)

    def sdpa_grouped(self, q, k, v, keep):
        mask, causal = self._mask_for(q, k, keep)
        return F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, enable_gqa=True)

    def sdpa_scaled(self, q, k, v, keep):
        mask, causal = self._mask_for(q, k, keep)
        return F.scaled_dot_product_attention(q * 0.5, k, v, attn_mask=mask, is_causal=causal, scale=0.7)

    def sdpa_padded(self, q, k, v, keep):
        """Heads of a size that a kernel likes."""
        mask, causal = self._mask_for(q, k, keep)
        q, k, v = (F.pad(t, (0, 6)) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=self.d**-0.5)[..., : self.d]

    def sdpa_narrow(self, q, k, v, keep):
        """Fewer channels of keys than of values; the rest of the keys is one for all heads."""
        mask, causal = self._mask_for(q, k, keep)
        half = self.d // 2
        k = torch.cat([k[..., 1:half], k[:, :1, :, :1].expand(-1, self.h, -1, -1)], -1)
        return F.scaled_dot_product_attention(q[..., :half], k, v, mask, is_causal=causal)

    def _weights(self, scores, keep):
        scores = self._bias(scores)
        return (scores if keep is None else scores.masked_fill(~keep, float("-inf"))).softmax(-1)

    def matmul(self, q, k, v, keep):
        return self._weights(q @ k.transpose(-2, -1) / math.sqrt(self.d), keep) @ v

    def einsum(self, q, k, v, keep):
        p = self._weights(torch.einsum("bhqd,bhkd->bhqk", q * self.d**-0.5, k), keep)
        return torch.einsum("bhqk,bhkd->bhqd", p, v)

    def bmm(self, q, k, v, keep):
        q3, k3, v3 = (t.reshape(-1, t.shape[2], self.d) for t in (q, k, v))
        scores = torch.bmm(q3, k3.transpose(1, 2)).mul(self.d**-0.5).view(*q.shape[:3], -1)
        return torch.bmm(self._weights(scores, keep).flatten(0, 1), v3).view(q.shape)

    def baddbmm(self, q, k, v, keep):
        b, h, s, d = q.shape
        q3, k3, v3 = (t.reshape(b * h, -1, d) for t in (q, k, v))
        bias = torch.zeros(b * h, s, k.shape[2], device=q.device, dtype=q.dtype)
        scores = torch.baddbmm(bias, q3, k3.mT, beta=1.0, alpha=1 / math.sqrt(d)).view(b, h, s, -1)
        return torch.bmm(self._weights(scores, keep).view(b * h, s, -1), v3).view(b, h, s, d)

    def float32_softmax(self, q, k, v, keep):
        scores = self._bias(torch.matmul(q, k.mT) * self.d**-0.5)
        scores = scores if keep is None else scores.masked_fill(~keep, torch.finfo(scores.dtype).min)
        return F.softmax(scores, dim=-1, dtype=torch.float64).to(q.dtype) @ v

    def token_major(self, q, k, v, keep):
        """Heads behind tokens, as flash attention takes them."""
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        p = self._weights(torch.einsum("bqhd,bkhd->bhqk", q, k) / self.d**0.5, keep)
        return torch.einsum("bhqk,bkhd->bqhd", p, v).transpose(1, 2)

    def single_key_value(self, q, k, v, keep):
        """One head of keys and values for all, which broadcasts."""
        p = self._weights(torch.einsum("bhqd,bkd->bhqk", q, k.squeeze(1)) * self.d**-0.5, keep)
        return p @ v

    def softmax_by_hand(self, q, k, v, keep):
        scores = self._bias(q @ k.mT * 0.3).clamp(min=-1e4)
        e = (scores - scores.amax(-1, keepdim=True)).exp()
        e = e if keep is None else e * keep
        return (e / e.sum(-1, keepdim=True)) @ v

    def sigmoid(self, q, k, v, keep):
        return torch.sigmoid(self._bias(q @ k.mT * 0.3).clamp(min=-1e4) - 1.0) @ v * 0.5

    def linear(self, q, k, v, keep):
        q, k = F.elu(q) + 1, F.elu(k) + 1
        k = k if keep is None else k * keep.mT
        return (q @ (k.mT @ v)) / (q @ k.sum(-2).unsqueeze(-1) + 1e-4)

    def with_sink(self, q, k, v, keep):
        """A logit more for each head, without a value."""
        scores = self._bias(q @ k.mT * self.d**-0.5)
        scores = scores if keep is None else scores.masked_fill(~keep, -1e4)
        sink = self.sink.view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        return torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ v

    def capped(self, q, k, v, keep):
        scores = 5.0 * torch.tanh(q @ k.mT * self.d**-0.5 / 5.0)
        return self._weights(scores, keep) @ v
