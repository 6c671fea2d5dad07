"""Attention as people write it by hand: a module each, the number of its free scales, and whether one operator does it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class Attend(nn.Module):
    """Projections to queries, keys and values [B, H, S, D], and back."""

    def __init__(self, width: int = 32, heads: int = 4, groups: int | None = None) -> None:
        super().__init__()
        self.count, self.groups, self.d = heads, groups or heads, width // heads
        self.q, self.o = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = nn.Linear(width, self.groups * self.d), nn.Linear(width, self.groups * self.d)

    def heads(self, x):
        shape = (*x.shape[:2], -1, self.d)
        return tuple(f(x).view(shape).transpose(1, 2) for f in (self.q, self.k, self.v))

    def join(self, y):
        return self.o(y.transpose(1, 2).flatten(2))


class Spelled(Attend):
    def __init__(self, spelling: str, masked: bool = False, width: int = 32, heads: int = 4) -> None:
        super().__init__(width, heads)
        self.spelling = spelling
        if masked:
            self.forward = self.with_mask  # type: ignore[method-assign]

    def forward(self, x):
        return self.attend(x, None)

    def with_mask(self, x, mask):
        return self.attend(x, mask)

    def attend(self, x, mask):
        q, k, v = self.heads(x)
        if self.spelling == "whole":
            return self.join(F.scaled_dot_product_attention(q, k, v, mask))
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.d)
        return self.join((scores if mask is None else scores + mask).softmax(-1) @ v)


class Einsum(Attend):
    def forward(self, x):
        shape = (*x.shape[:2], -1, self.d)
        q, k, v = (f(x).view(shape) for f in (self.q, self.k, self.v))
        p = (torch.einsum("bqhd,bkhd->bhqk", q, k) * self.d**-0.5).softmax(-1)
        return self.o(torch.einsum("bhqk,bkhd->bqhd", p, v).flatten(2))


class Bmm(Attend):
    """Batch and heads merged; the bias of positions added by baddbmm, and a mask by masked_fill."""

    def forward(self, x):
        b, s, _ = x.shape
        q, k, v = (t.reshape(b * self.count, s, self.d) for t in self.heads(x))
        at = torch.arange(s, device=x.device)
        bias = -(at[:, None] - at).abs().float().expand(b * self.count, s, s)
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), beta=0.5, alpha=self.d**-0.5)
        scores = scores.masked_fill(at > at[:, None], float("-inf"))
        y = torch.bmm(scores.softmax(-1), v)
        return self.join(y.view(b, self.count, s, self.d))


class OneHead(Attend):
    """No heads: three dims all the way."""

    def forward(self, x):
        scores = torch.bmm(self.q(x) * 0.2, self.k(x).mT)
        return self.o(torch.bmm(scores.softmax(-1), self.v(x)))


class Capped(Attend):
    """Soft-capped, the scale split over q and k, key heads shared, the softmax in another dtype."""

    def __init__(self) -> None:
        super().__init__(groups=2)

    def forward(self, x):
        q, k, v = self.heads(x)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = torch.matmul(q * self.d**-0.25, (k * self.d**-0.25).permute(0, 1, 3, 2))
        scores = 3.0 * torch.tanh(scores / 3.0)
        at = torch.arange(x.shape[1], device=x.device)
        scores = torch.where(at <= at[:, None], scores, -1e9)
        return self.join(scores.softmax(-1, dtype=torch.float64).to(x.dtype) @ v)


class Grouped(Attend):
    def __init__(self) -> None:
        super().__init__(groups=2)

    def forward(self, x):
        q, k, v = self.heads(x)
        return self.join(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


class Pairs(Attend):
    """A rotary embedding of neighbouring channels, in complex numbers or in pairs."""

    def __init__(self, complex_: bool) -> None:
        super().__init__()
        self.complex = complex_

    def rotate(self, x):
        angle = torch.arange(x.shape[2], device=x.device)[:, None] * 0.3 ** torch.arange(self.d // 2, device=x.device)
        if self.complex:
            turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angle), angle)
            return torch.view_as_real(turned).flatten(-2)
        a, b, cos, sin = x[..., ::2], x[..., 1::2], angle.cos(), angle.sin()
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)

    def forward(self, x):
        q, k, v = self.heads(x)
        return self.join(F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v))


class Normed(Attend):
    """Queries and keys through a norm with a weight for each head's channels."""

    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = nn.LayerNorm(self.d), nn.RMSNorm(self.d)

    def forward(self, x):
        q, k, v = self.heads(x)
        return self.join(F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, scale=1.0))


class Clamped(Attend):
    """Scores that one operator cannot do."""

    def forward(self, x):
        q, k, v = self.heads(x)
        return self.join((q @ k.transpose(-1, -2)).clamp(-4.0, 4.0).softmax(-1) @ v)


class Transposed(Attend):
    """Keys that are made transposed."""

    def forward(self, x):
        q, _, v = self.heads(x)
        k = self.k(x).view(*x.shape[:2], -1, self.d).permute(0, 2, 3, 1)
        return self.join((q @ k / 2.0).softmax(-1) @ v)


HAND_WRITTEN = {
    "whole": lambda: (Spelled("whole"), 32, True),
    "eager": lambda: (Spelled("eager"), 32, True),
    "einsum": lambda: (Einsum(), 32, True),
    "bmm": lambda: (Bmm(), 32, True),
    "one head": lambda: (OneHead(), 32, True),
    "soft-cap": lambda: (Capped(), 16, True),
    "grouped": lambda: (Grouped(), 16, True),
    "rotary pairs": lambda: (Pairs(False), 16, True),
    "rotary complex": lambda: (Pairs(True), 16, True),
    "normed": lambda: (Normed(), 8, True),
    "clamped": lambda: (Clamped(), 32, False),
    "transposed keys": lambda: (Transposed(), 32, True),
}


def inputs_of(model: nn.Module, batch: int = 2, tokens: int = 9) -> tuple[torch.Tensor]:
    return (torch.randn(batch, tokens, model.o.in_features),)
