"""Random programs of layout operations, norms and linears: the first generator of random modules."""

from __future__ import annotations

import random
from typing import ClassVar

import torch
import torch.nn.functional as F
from conftest import fold_everything, relative_error
from torch import nn


class Random(nn.Module):
    """A random program over [B, S, 32] tensors: what a seed says, in the vocabulary of transformer blocks.

    In half of the modules an operation's second operand comes from anywhere, in the others from what the last producer
    made: there labels meet themselves, and meet every kind of operation before a linear can absorb them.
    """

    D = 32

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.rng = random.Random(seed)
        g = torch.Generator().manual_seed(seed)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(self.D, self.D, generator=g) / self.D**0.5) for _ in range(3)
        )
        self.wide = nn.Parameter(torch.randn(2 * self.D, self.D, generator=g) / self.D**0.5)
        self.vectors = nn.ParameterList(nn.Parameter(1 + 0.3 * torch.randn(self.D, generator=g)) for _ in range(3))
        self.steps = [self.rng.choice(list(self.OPS)) for _ in range(self.rng.randint(4, 12))]
        self.picks = [[self.rng.random() for _ in range(4)] for _ in self.steps]
        self.near = self.rng.random() < 0.5

    def forward(self, x):
        values, last = [x], 0  # last: index of the last producer's output
        for step, (a, b, c, d) in zip(self.steps, self.picks, strict=True):
            # mostly the newest value, so that chains grow
            first = values[-1] if a < 0.7 else values[int(b * len(values))]
            since = last if self.near else 0
            second = values[since + int(c * (len(values) - since))]
            values.append(self.OPS[step](self, first, second, d))
            if step in ("linear", "norm", "scale", "fused"):
                last = len(values) - 1
        y = F.linear(values[-1], self.weights[0]) if self.near else values[-1]
        return y + values[len(values) // 2] if self.picks[0][3] < 0.5 else y

    def w(self, r):
        return self.weights[int(r * 3)]

    def _linear(self, x, y, r):
        return F.linear(x, self.w(r), self.vectors[int(r * 7) % 3] if r < 0.5 else None)

    def _fused(self, x, y, r):
        gate, up = F.linear(x, self.wide).chunk(2, -1)
        return F.silu(gate) * up if r < 0.7 else gate + up

    def _norm(self, x, y, r):
        v = self.vectors[int(r * 3)]
        return F.layer_norm(x, (self.D,), v, self.vectors[0]) if r < 0.4 else F.rms_norm(x, (self.D,), v)

    def _heads(self, x, y, r):
        b, s, _ = x.shape
        q, k, v = (t.view(b, s, 4, 8).transpose(1, 2) for t in (x, y, F.linear(y, self.w(r))))
        if r < 0.5:
            k, v = (t[:, ::2].repeat_interleave(2, 1) for t in (k, v))
        if r < 0.8:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=r < 0.3)
        else:
            mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return mixed.transpose(1, 2).reshape(b, s, self.D)

    def _values(self, x, y, r):
        """Attention over x as values alone: its labels pass."""
        b, s, _ = x.shape
        q, v = torch.ones(b, 4, s, 8, dtype=x.dtype), x.view(b, s, 4, 8).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, v).transpose(1, 2).reshape(b, s, self.D)

    def _shuffle(self, x, y, r):
        b, s, _ = x.shape
        if r < 0.3:
            return torch.cat([x[..., 16:], x[..., :16]], -1)
        if r < 0.5:
            return torch.cat([x[..., :16], y[..., 16:]], -1)
        if r < 0.7:
            return x.view(b, s, 4, 8).transpose(2, 3).reshape(b, s, self.D)
        left, right = x.chunk(2, -1)
        return torch.cat([left, left], -1) if r < 0.85 else torch.stack([left, right], -1).flatten(-2)

    def _rotate(self, x, y, r):
        return x * self.vectors[0] + torch.cat([-x[..., 16:], x[..., :16]], -1) * self.vectors[1]

    OPS: ClassVar = {
        "linear": _linear,
        "fused": _fused,
        "norm": _norm,
        "attention": _heads,
        "values": _values,
        "shuffle": _shuffle,
        "rotate": _rotate,
        "relu": lambda self, x, y, r: torch.relu(x),
        "gate": lambda self, x, y, r: F.silu(y) * x,
        "product": lambda self, x, y, r: x * y if r < 0.7 else x / (1 + y * y),
        "gelu": lambda self, x, y, r: F.gelu(x) if r < 0.7 else torch.tanh(x),
        "silu": lambda self, x, y, r: F.silu(x) if r < 0.7 else torch.sigmoid(x),
        "residual": lambda self, x, y, r: x + y,
        "sub": lambda self, x, y, r: x - y,
        "scale": lambda self, x, y, r: x * self.vectors[int(r * 3)],
        "shift": lambda self, x, y, r: x + (self.vectors[int(r * 3)] if r < 0.8 else 1.0),
        "half": lambda self, x, y, r: 0.5 * x if r < 0.5 else x / 2,
        "double linear": lambda self, x, y, r: F.linear(torch.relu(F.linear(x, self.w(r))), self.w(1 - r)),
        "mlp": lambda self, x, y, r: F.linear(F.silu(F.linear(x, self.w(r))) * F.linear(x, self.w(1 - r)), self.w(r)),
        "mean": lambda self, x, y, r: x + y.mean(1, keepdim=True) if r < 0.5 else x * x.mean(-1, keepdim=True),
        "max": lambda self, x, y, r: torch.maximum(x, y) if r < 0.5 else x.clamp(min=0.0 if r < 0.8 else -0.5),
    }


def wrong_fold(seed: int) -> float | None:
    """How wrong a random module's fold is in float64; None where it has nothing to fold."""
    torch.manual_seed(0)
    model, x = Random(seed).double().eval(), torch.randn(2, 3, 32, dtype=torch.float64)
    if not any(s in ("linear", "fused", "attention", "double linear", "mlp") for s in model.steps):
        return None
    folded, _, _ = fold_everything(model, x, seed=seed)
    with torch.no_grad():
        want = model(x)
    # of seed 26412 all is subtracted from itself, and what is left is rounding
    if not bool(want.isfinite().all()) or float(want.norm()) < 1e-10:
        return None
    return relative_error(folded(x), want)
