"""Pieces of random blocks that mix tokens without attention of their own, or send them to experts."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from random_mlps import Activation, Mlp
from random_parts import Norm, Piece, Project
from torch import nn


class Torch(nn.Module):
    """PyTorch's own attention module."""

    def __init__(self, r: random.Random, c: int) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(c, r.choice((1, 2)), batch_first=True, bias=r.random() < 0.5)

    def forward(self, x, memory=None, padding=None):
        m = x if memory is None else memory
        return self.inner(x, m, m, None if padding is None else ~padding, need_weights=False)[0]


class Tokens(Piece):
    """Mixes tokens of [B, S, C] without attention."""

    SPELLINGS = "shift running_mean depthwise squeeze_excite pooled modulated fourier gated_mean max_pool"

    def __init__(self, r: random.Random, c: int) -> None:
        super().__init__(r)
        self.mix, self.o = nn.Parameter(torch.rand(c)), Project(r, c, c)
        s = self.spelling
        if s == "depthwise":
            self.kernel = nn.Parameter(torch.randn(c, 1, 3) * 0.5)
        if s in ("squeeze_excite", "modulated", "gated_mean"):
            self.inner = nn.Linear(c, 2 * c if s == "modulated" else c)
        if s == "modulated":
            self.norm = Norm(r, c)

    def shift(self, x):
        before = F.pad(x, (0, 0, 1, -1))
        return self.o(x * self.mix + before * (1 - self.mix))

    def running_mean(self, x):
        n = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)
        return self.o(x.cumsum(1) / n[:, None])

    def depthwise(self, x):
        return self.o(F.conv1d(F.pad(x.mT, (2, 0)), self.kernel, groups=x.shape[-1]).mT)

    def squeeze_excite(self, x):
        return self.o(x * torch.sigmoid(self.inner(x.mean(1, keepdim=True))))

    def pooled(self, x):
        return self.o(x + x.mean(dim=1, keepdim=True)) + self.o(x.amax(1, keepdim=True))

    def modulated(self, x):
        """AdaLN: scale and shift of a norm from what stands elsewhere."""
        scale, shift = self.inner(F.silu(x.mean(1))).unsqueeze(1).chunk(2, -1)
        return self.o(self.norm(x) * (1 + scale) + shift)

    def fourier(self, x):
        return self.o(x.roll(1, 1) + x.flip(1))

    def gated_mean(self, x):
        return self.o(self.inner(x).softmax(1) * x)

    def max_pool(self, x):
        return self.o(torch.maximum(x, x.roll(1, 1)))


class Experts(Piece):
    """A mixture of experts over all tokens [B, S, C], by masks."""

    WHOLE = "one_hot_einsum batched scattered_weights"  # the weights of all experts are one parameter
    SPELLINGS = """
        loop loop_where soft one_hot_einsum scattered_weights batched expert_choice masked_in_place
        shared_expert
    """

    def __init__(self, r: random.Random, c: int) -> None:
        super().__init__(r)
        self.n, h = (3, r.choice((8, 16))) if self.spelling in self.WHOLE.split() else (2, 0)
        self.k = r.choice((1, 2))
        self.router = Project(r, c, self.n, "module", "functional", "matmul", "einsum_fd")
        if self.spelling in self.WHOLE.split():
            self.up, self.down = (nn.Parameter(torch.randn(self.n, i, o) / i**0.5) for i, o in ((c, h), (h, c)))
            self.act = Activation(r)
        else:
            self.experts = nn.ModuleList(Mlp(r, c, "module", "matmul") for _ in range(self.n))
        if self.spelling == "shared_expert":
            self.shared, self.shared_gate = Mlp(r, c, "functional"), nn.Linear(c, 1)

    def _top(self, x):
        weights, chosen = self.router(x).softmax(-1).topk(self.k, -1)
        return weights / weights.sum(-1, keepdim=True), chosen

    def loop(self, x):
        weights, chosen = self._top(x)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            share = (weights * (chosen == i)).sum(-1, keepdim=True)
            y = y + share * expert(x)
        return y

    def loop_where(self, x):
        best = self.router(x).argmax(-1, keepdim=True)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            y = torch.where(best == i, expert(x), y)
        return y

    def soft(self, x):
        weights = self.router(x).softmax(-1)
        return torch.stack([e(x) * weights[..., i, None] for i, e in enumerate(self.experts)]).sum(0)

    def one_hot_einsum(self, x):
        weights, chosen = self._top(x)
        share = (F.one_hot(chosen, self.n).to(x.dtype) * weights[..., None]).sum(2)
        y = torch.einsum("besh,ehc->besc", self.act(torch.einsum("bsc,ech->besh", x, self.up)), self.down)
        return torch.einsum("besc,bse->bsc", y, share)

    def scattered_weights(self, x):
        weights, chosen = self._top(x)
        share = torch.zeros(*x.shape[:2], self.n, device=x.device, dtype=x.dtype).scatter(-1, chosen, weights)
        y = self.act(torch.einsum("bsc,ech->ebsh", x, self.up))
        return (torch.einsum("ebsh,ehc->ebsc", y, self.down) * share.permute(2, 0, 1)[..., None]).sum(0)

    def batched(self, x):
        flat = x.reshape(-1, x.shape[-1])
        share = self.router(x).softmax(-1).view(-1, self.n).t()[:, :, None]
        wide = flat.unsqueeze(0).expand(self.n, -1, -1)
        y = torch.bmm(self.act(torch.bmm(wide, self.up)), self.down)
        return (y * share).sum(0).view(x.shape)

    def expert_choice(self, x):
        """Each expert picks its tokens."""
        share = self.router(x).softmax(-1)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            weight, at = share[..., i].topk(1, 1)
            at = at[..., None].expand(-1, -1, x.shape[-1])
            y = y.scatter_add(1, at, expert(x.gather(1, at)) * weight[..., None])
        return y

    def masked_in_place(self, x):
        weights, chosen = self._top(x)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            taken = (chosen == i).any(-1, keepdim=True)
            y += expert(x.masked_fill(~taken, 0.0)).masked_fill_(~taken, 0.0) * weights[..., :1]
        return y

    def shared_expert(self, x):
        share = self.router(x).softmax(-1)
        best = share.max(-1, keepdim=True)
        routed = sum(e(x) * (best.indices == i) * best.values for i, e in enumerate(self.experts))
        return routed + torch.sigmoid(self.shared_gate(x)) * self.shared(x)
