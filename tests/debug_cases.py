"""Small models for bisect, and a quiet bisection of one that must stay as it was."""

from __future__ import annotations

import torch
from random_checks import check_untouched, state
from torch import nn

import sqcompile


class Layer(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16)
        self.act = act

    def forward(self, x):
        return x + self.b(self.act(self.a(self.norm(x))))


class Net(nn.Module):
    """Layers with a site "norm -> a" each, and "a -> b" where the activation lets scales pass."""

    def __init__(self, *acts):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(act) for act in acts)
        self.eval()

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))


class Attending(nn.Module):
    def __init__(self, *attentions):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.layers = nn.LayerNorm(32), nn.ModuleList(attentions)
        self.eval()

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(self.norm(x))
        return x


TOKENS = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))


def bisect(model, inputs=X, **kwargs):
    """A quiet bisection, in which the model stays as it was."""
    before = state(model)
    found = sqcompile.debug.bisect(model, inputs, progress=False, **kwargs)
    check_untouched(model, before)
    return found


def wrong(found):
    return [e.label for e in (*found.folds, *found.lowering) if e.wrong]


def passes(ctx, n, out, flow, operands):
    """A rule that lets scales pass whatever the operation is."""
    return next(iter(operands.values()))
