"""Pieces of random blocks: norms and projections, each in one of many spellings.

A piece draws its spelling from ``r``, a `random.Random`, when it is made; its forward then only looks it up. A spelling
is a method of the piece, and `print` of a random model says what was drawn.
"""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Piece(nn.Module):
    """Draws one of its SPELLINGS, methods that do the same or the like in other words."""

    SPELLINGS: str = ""

    def __init__(self, r: random.Random, *spellings: str) -> None:
        super().__init__()
        self.spelling = r.choice(spellings or self.SPELLINGS.split())

    def forward(self, *args: Tensor) -> Any:
        return getattr(self, self.spelling)(*args)

    def extra_repr(self) -> str:
        return self.spelling


def matrix(n: int, k: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(n, k) / k**0.5)


def vector(n: int, mean: float = 0.0) -> nn.Parameter:
    return nn.Parameter(mean + 0.3 * torch.randn(n))


def scale_vector(r: random.Random, n: int, mean: float = 1.0, outliers: bool = True) -> nn.Parameter:
    """A norm's weight; in most norms a few channels are outliers."""
    g = vector(n, mean)
    if outliers and r.random() < 0.6:
        with torch.no_grad():
            for _ in range(r.randint(1, 2)):
                g[r.randrange(n)] = r.choice((-1, 1)) * r.uniform(8, 40)
    return g


class Norm(Piece):
    """Over the last dim of [..., C]."""

    SPELLINGS = """
        layer_norm layer_norm_without_bias layer_norm_without_weight without_weight_then_scale rms_norm
        rms_norm_without_weight module rms_by_hand one_plus in_float32 weight_first in_float64
        layer_norm_by_hand var_mean unit_length group_norm instance shifted_and_scaled
    """

    def __init__(self, r: random.Random, c: int, outliers: bool = True) -> None:
        super().__init__(r)
        self.c, self.eps = c, r.choice((1e-5, 1e-6))
        self.g, self.b = scale_vector(r, c, 0.0 if self.spelling == "one_plus" else 1.0, outliers), vector(c)
        if self.spelling == "module":
            self.inner = r.choice((nn.LayerNorm, nn.RMSNorm))(c)
            with torch.no_grad():
                self.inner.weight.copy_(self.g)

    def layer_norm(self, x):
        return F.layer_norm(x, (self.c,), self.g, self.b, self.eps)

    def layer_norm_without_bias(self, x):
        return F.layer_norm(x, (self.c,), self.g)

    def layer_norm_without_weight(self, x):
        return F.layer_norm(x, (self.c,))

    def without_weight_then_scale(self, x):
        return F.layer_norm(x, (self.c,)) * self.g + self.b

    def rms_norm(self, x):
        return F.rms_norm(x, (self.c,), self.g, self.eps)

    def rms_norm_without_weight(self, x):
        return F.rms_norm(x, (self.c,))

    def module(self, x):
        return self.inner(x)

    def _unit(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def rms_by_hand(self, x):
        return self._unit(x) * self.g

    def one_plus(self, x):
        return (self._unit(x.float()) * (1.0 + self.g.float())).type_as(x)

    def in_float32(self, x):
        return self.g * self._unit(x.to(torch.float32)).to(x.dtype)

    def weight_first(self, x):
        return x / (x.square().mean(dim=-1, keepdim=True) + self.eps).sqrt() * self.g

    def in_float64(self, x):
        return (self._unit(x.double()) * self.g.double()).to(x.dtype)

    def layer_norm_by_hand(self, x):
        mean = x.mean(-1, keepdim=True)
        return (x - mean) / ((x - mean) ** 2).mean(-1, keepdim=True).add(self.eps).sqrt() * self.g + self.b

    def var_mean(self, x):
        var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        return torch.addcmul(self.b, (x - mean) * (var + self.eps).rsqrt(), self.g)

    def unit_length(self, x):
        return F.normalize(x, dim=-1) * self.g * self.c**0.5

    def group_norm(self, x):
        flat = x.reshape(-1, self.c)
        return F.group_norm(flat, 1, self.g, self.b, self.eps).view(x.shape)

    def instance(self, x):
        """Over pairs of channels, and then scaled."""
        return F.layer_norm(x.unflatten(-1, (-1, 2)), (2,), eps=0.1).flatten(-2) * self.g

    def shifted_and_scaled(self, x):
        return (self._unit(x) + self.b) * self.g


class Project(Piece):
    """A linear [..., K] -> [..., N] of a tensor [B, S, K]."""

    SPELLINGS = """
        module module module functional rows matmul matmul_t columns_plus addmm mm einsum_fd einsum_df
        einsum_turned einsum_one einsum_broadcast conv1d conv1d_module conv2d conv1d_as_linear baddbmm
        low_rank adapted normed summed four_dims time_major bmm parts inner double tensordot
    """

    def __init__(self, r: random.Random, k: int, n: int, *spellings: str) -> None:
        super().__init__(r, *spellings)
        self.k, self.n, bias = k, n, r.random() < 0.5
        s = self.spelling
        self.b = vector(n) if bias or s in ("addmm", "columns_plus", "baddbmm") else None
        if s == "module":
            self.fc = nn.Linear(k, n, bias=bias)
            self.b = None
        elif s in ("conv1d_module", "conv2d"):
            self.fc = (nn.Conv1d if s == "conv1d_module" else nn.Conv2d)(k, n, 1, bias=bias)
            self.b = None
        elif s == "rows":
            self.w = matrix(2 * n, k)
        elif s in (
            "matmul",
            "addmm",
            "mm",
            "columns_plus",
            "einsum_df",
            "baddbmm",
            "bmm",
            "conv1d_as_linear",
            "inner",
            "tensordot",
        ):
            self.w = nn.Parameter(matrix(n, k).t().contiguous())
        elif s == "low_rank":
            self.low, self.w = matrix(max(1, min(k, n) // 2), k), matrix(n, max(1, min(k, n) // 2))
        else:
            self.w = matrix(n, k)
        if s == "adapted":
            self.a_low, self.b_low = matrix(2, k), nn.Parameter(torch.randn(n, 2) * 0.2)
        if s == "normed":
            self.g = vector(n, 1.0)

    def _biased(self, y):
        return y if self.b is None else y + self.b

    def module(self, x):
        return self.fc(x)

    def functional(self, x):
        return F.linear(x, self.w, self.b)

    def rows(self, x):
        return F.linear(x, self.w[self.n :], self.b)

    def matmul(self, x):
        return self._biased(x @ self.w)

    def matmul_t(self, x):
        return self._biased(torch.matmul(x, self.w.mT))

    def columns_plus(self, x):
        return self.b + torch.matmul(x, self.w)

    def addmm(self, x):
        return torch.addmm(self.b, x.reshape(-1, self.k), self.w).view(*x.shape[:-1], self.n)

    def mm(self, x):
        return self._biased(torch.mm(x.flatten(0, -2), self.w).unflatten(0, x.shape[:-1]))

    def einsum_fd(self, x):
        return self._biased(torch.einsum("...d,fd->...f", x, self.w))

    def einsum_df(self, x):
        return self._biased(torch.einsum("df,bsd->bsf", self.w, x))

    def einsum_turned(self, x):
        return self._biased(torch.einsum("bsd,fd->sfb", x, self.w).permute(2, 0, 1))

    def einsum_one(self, x):
        return self._biased(torch.einsum("bsod,ofd->bsof", x.unsqueeze(2), self.w.unsqueeze(0)).squeeze(2))

    def einsum_broadcast(self, x):
        """A letter that is one in the weight and two in the data."""
        twice = x.unsqueeze(2).expand(-1, -1, 2, -1)
        return self._biased(torch.einsum("bsod,ofd->bsof", twice, self.w.unsqueeze(0)).mean(2))

    def conv1d(self, x):
        return F.conv1d(x.transpose(1, 2), self.w.unsqueeze(-1), self.b).transpose(1, 2)

    def conv1d_module(self, x):
        return self.fc(x.mT).mT

    def conv2d(self, x):
        return self.fc(x.permute(0, 2, 1).unsqueeze(-1)).squeeze(-1).permute(0, 2, 1)

    def conv1d_as_linear(self, x):
        return F.conv1d(x.movedim(-1, 1), self.w.t().unsqueeze(-1), self.b).movedim(1, -1)

    def baddbmm(self, x):
        return torch.baddbmm(self.b, x, self.w.expand(x.shape[0], -1, -1))

    def low_rank(self, x):
        return F.linear(F.linear(x, self.low), self.w, self.b)

    def adapted(self, x):
        return F.linear(x, self.w, self.b) + 2.0 * F.linear(F.linear(x, self.a_low), self.b_low)

    def normed(self, x):
        return F.linear(x, self.g[:, None] * self.w / self.w.norm(dim=1, keepdim=True), self.b)

    def summed(self, x):
        return F.linear(x, self.w + self.w.roll(1, 0), self.b)

    def four_dims(self, x):
        return F.linear(x.unsqueeze(1), self.w, self.b).squeeze(1)

    def time_major(self, x):
        return F.linear(x.transpose(0, 1).contiguous(), self.w, self.b).transpose(0, 1)

    def bmm(self, x):
        return self._biased(torch.bmm(x, self.w.unsqueeze(0).expand(x.size(0), self.k, self.n)))

    def parts(self, x):
        """Columns by halves, summed: tensor parallelism."""
        half = self.k // 2
        return self._biased(F.linear(x[..., :half], self.w[:, :half]) + F.linear(x[..., half:], self.w[:, half:]))

    def inner(self, x):
        """As a sum of products."""
        return self._biased((x.unsqueeze(-1) * self.w).sum(-2))

    def double(self, x):
        return F.linear(x.double(), self.w.double(), None if self.b is None else self.b.double()).to(x.dtype)

    def tensordot(self, x):
        return self._biased(torch.tensordot(x, self.w, 1))
