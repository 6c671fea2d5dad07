"""A model of which some linears cost far more than others, and what a plan of it loses."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sqcompile
from sqcompile import Plan


class LM(nn.Module):
    """Two linears that read a norm, one that reads their product, in each block; block 1 has tokens with huge values."""

    def __init__(self, logits: bool = True, random: bool = False, sharpness: float = 4.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out, self.logits, self.random = nn.Embedding(50, 32), nn.Linear(32, 50), logits, random
        self.sharpness = sharpness
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(3))
        self.gate, self.up, self.down = (
            nn.ModuleList(nn.Linear(*sizes) for _ in range(3)) for sizes in ((32, 64), (32, 64), (64, 32))
        )
        self.register_buffer("spikes", torch.ones(3, 64))
        self.spikes[1, ::8] = 300.0

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for norm, gate, up, down, spikes in zip(self.norms, self.gate, self.up, self.down, self.spikes, strict=True):
            h = norm(x)
            x = x + down(torch.sin(F.silu(gate(h)) * up(h) * 3) * spikes) / spikes.mean()
        if self.random:
            x = x + torch.rand_like(x) * 1e-3
        return self.out(x) * self.sharpness if self.logits else x


def batches(seeds: range = range(4)) -> list[Tensor]:
    return [torch.randint(0, 50, (4, 24), generator=torch.Generator().manual_seed(s)) for s in seeds]


@torch.no_grad()
def lost(model: nn.Module, plan: Plan) -> float:
    """exp(KL) - 1 of the quantized stage on the calibration calls, in percent."""
    net = sqcompile.compile(model, plan=plan, backend="eager", progress=False)
    kl = 0.0
    for ids in batches():
        p, q = (m(ids).double().log_softmax(-1) for m in (model, net.stages["quantized"]))
        kl += float((p.exp() * (p - q)).sum(-1).mean()) / len(batches())
    return 100 * math.expm1(kl)
