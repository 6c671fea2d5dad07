"""A small model for the tests of the backend, its plan, and ways to call it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import sqcompile
from sqcompile.backend import smoothquant
from sqcompile.backend.session import sessions_of


class MLP(nn.Module):
    def __init__(self, broken=False):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 96), nn.Linear(96, 64)
        self.broken = broken

    def forward(self, x, scale=None):
        h = self.norm(x)
        if self.broken:
            torch._dynamo.graph_break()
        y = self.down(F.relu(self.up(h)))
        return x + (y if scale is None else y * scale)


def outliers(n=4):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 2, 8, 64, generator=generator)
    x[..., 5] *= 30
    return list(x)


def mlp(broken=False):
    torch.manual_seed(0)
    model = MLP(broken).eval()
    with torch.no_grad():
        model.norm.weight[5] = 20
    return model


def compiled(model, /, **options):
    return torch.compile(model, backend=smoothquant, options={"compiler": "eager", **options})


def planned(model, batches=None, **kwargs):
    reference = sqcompile.compile(model, batches or outliers(), backend="eager", progress=False, **kwargs)
    return reference.plan, reference


def sessions(model):
    return sessions_of(model)


def session(model):
    return sessions(model)[0]


@torch.no_grad()
def call(model, *args, **kwargs):
    return model(*args, **kwargs)
