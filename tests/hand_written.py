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


class Merged(Attend):
    """Batch and heads merged in one operator's operands, and in its mask: padding, and a slope for each head."""

    def forward(self, x):
        b, s, _ = x.shape
        q, k, v = (t.reshape(b * self.count, s, self.d) for t in self.heads(x))
        at = torch.arange(s, device=x.device)
        slopes = torch.arange(1.0, 1.0 + self.count, device=x.device)[:, None, None] * at
        padding = torch.where(at > torch.arange(b, device=x.device)[:, None] + 2, float("-inf"), 0.0)
        mask = (slopes + padding[:, None, None]).reshape(b * self.count, 1, s)
        return self.join(F.scaled_dot_product_attention(q, k, v, mask).view(b, self.count, s, self.d))


class ScaledKeys(Attend):
    """Batch and heads merged, but where padding is masked; the scale divides the keys, as in DeBERTa."""

    def forward(self, x):
        b, s, _ = x.shape
        q, k, v = (t.reshape(b * self.count, s, self.d) for t in self.heads(x))
        scores = torch.bmm(q, k.transpose(-1, -2) / math.sqrt(self.d)).view(b, self.count, s, s)
        padding = torch.arange(s, device=x.device) > torch.arange(b, device=x.device)[:, None] + 2
        scores = scores.masked_fill(padding[:, None, None], torch.finfo(x.dtype).min)
        y = torch.bmm(scores.softmax(-1).view(b * self.count, s, s), v)
        return self.join(y.view(b, self.count, s, self.d))


class Windows(Attend):
    """Every second sequence has another mask, added where the windows of an image have a dim of their own, as in Swin."""

    def forward(self, x):
        q, k, v = self.heads(x)
        scores = q @ k.transpose(-1, -2) * self.d**-0.5
        at = torch.arange(x.shape[1], device=x.device)
        mask = (torch.stack([at <= at[:, None], at >= at[:, None]]).float() - 1) * 100
        windows = scores.view(-1, 2, *scores.shape[1:]) + mask[None, :, None]
        return self.join(windows.view(scores.shape).softmax(-1) @ v)


class Biased(Attend):
    """The first channel of each key is its bias, too."""

    def forward(self, x):
        q, k, v = self.heads(x)
        return self.join(F.scaled_dot_product_attention(q, k, v, k[..., :1].transpose(-1, -2)))


class HeldNumbers(Attend):
    """Numbers that are tensors: a buffer divides the scores, a parameter is their temperature, as GPT-Neo blocks keys."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("root", torch.tensor(self.d).sqrt())
        self.temperature = nn.Parameter(torch.full((1,), 0.7))

    def forward(self, x):
        q, k, v = self.heads(x)
        scores = q @ k.transpose(-1, -2) / self.root * self.temperature.exp()
        at = torch.arange(x.shape[1], device=x.device)
        lowest = torch.tensor(torch.finfo(x.dtype).min, dtype=x.dtype, device=x.device)
        return self.join(torch.where(at <= at[:, None], scores, lowest).softmax(-1) @ v)


class Alike(Attend):
    """Tokens of one kind score 1 more: a bool tensor is added, no key is blocked."""

    def forward(self, x):
        q, k, v = self.heads(x)
        kind = x[..., 0] > 0
        alike = kind[:, None, :, None] == kind[:, None, None]
        return self.join((q @ k.transpose(-1, -2) * 0.3 + alike).softmax(-1) @ v)


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
    "scaled keys": lambda: (ScaledKeys(), 32, True),
    "merged": lambda: (Merged(), 32, True),
    "biased": lambda: (Biased(), 28, True),
    "held numbers": lambda: (HeldNumbers(), 32, True),
    "windows": lambda: (Windows(), 32, False),
    "alike": lambda: (Alike(), 32, False),
}


def inputs_of(model: nn.Module, batch: int = 2, tokens: int = 9) -> tuple[torch.Tensor]:
    return (torch.randn(batch, tokens, model.o.in_features),)
