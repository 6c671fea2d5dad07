"""Static scales on tokens that calibration did not see."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sqcompile
from sqcompile import Recipe
from sqcompile.passes.planning.static_scales import FEW_TOKENS, ONE_TOKEN, margin
from sqcompile.plan.recipe import ALPHAS
from sqcompile.statistics.input_stats import InputStats

WIDTH = 32


class Net(nn.Module):
    """A norm with outliers and one kind of block, of random weights."""

    def __init__(self, kind: str, seed: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.kind, self.norm = kind, nn.LayerNorm(WIDTH)
        self.up, self.gate, self.down = nn.Linear(WIDTH, 128), nn.Linear(WIDTH, 128), nn.Linear(128, WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=g) * 0.2)
            self.norm.weight.add_(1)[::7] *= 10

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        if self.kind == "attention":
            q, k, v = (f(h).view(*x.shape[:2], 2, 16).transpose(1, 2) for f in (self.q, self.k, self.v))
            return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h, g = self.up(h), self.gate(h)
        return self.down({"plain": h, "relu": h.relu(), "gelu": F.gelu(h), "gated": F.silu(g) * h}[self.kind])


def tokens(n: int, seed: int) -> Tensor:
    """[n, 9, K] with rows of different size, and some large values."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 9, WIDTH, generator=g) / torch.rand(n, 9, WIDTH, generator=g).clamp_min(0.05).sqrt()
    return x * torch.exp(0.5 * torch.randn(n, 9, 1, generator=g))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "relu", "gelu", "gated", "attention"])
@torch.no_grad()
def test_smoothing_is_no_worse_than_none_on_tokens_that_were_not_seen(kind):
    """From 36 tokens. The mean of three modules is better, and none is 1 dB worse."""
    gains = []
    for seed in range(3):
        model, seen, unseen = Net(kind, seed).eval(), tokens(4, seed), tokens(64, 100 + seed)
        found = []
        for smooth in (True, False):
            recipe = Recipe(
                ALPHAS, "per_tensor_static", smooth=smooth, attention="qk_pv" if kind == "attention" else "none"
            )
            net = sqcompile.compile(model, [seen], recipe=recipe, backend="eager", progress=False)
            found.append(
                -10 * math.log10(float((net(unseen) - model(unseen)).square().sum() / model(unseen).square().sum()))
            )
        gains.append(found[0] - found[1])
    assert min(gains) > -1 and sum(gains) > 0, gains


def stats(x: Tensor, batches: int = 4) -> InputStats:
    found, generator = InputStats.empty(x[:0], None), torch.Generator().manual_seed(0)
    for part in x.chunk(batches):
        found.update(part, torch.zeros(len(part), dtype=torch.int64), generator)
    return found


def test_the_margin_shrinks_with_the_number_of_tokens():
    x = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0))
    every = [stats(x[:n]) for n in (16, 128, 20_000)]
    few, more, many = (margin(s, torch.ones(2, 64), torch.ones(64)) for s in every)
    assert few > 0.1 and few >= more >= many and many <= 0.05
    assert margin(stats(x[:1], 1), torch.ones(2, 64), torch.ones(64)) == ONE_TOKEN


@pytest.mark.parametrize("n", [2, 7, 40])
def test_the_halves_share_all_tokens(n):
    x = torch.randn(n, 8)
    found = stats(x, batches=min(n, 3))
    assert torch.equal(found.absmax, x.abs().amax(0)) and (found.halves.amax(1) > 0).all()
    for h in (0, 1):
        assert torch.equal(found.halves[h], found.rows[found.half == h].abs().amax(0))
    both = found.merged(stats(2 * x))
    assert torch.equal(both.absmax, 2 * x.abs().amax(0)) and both.count == 2 * n and len(both.half) == len(both.rows)


def test_few_tokens_are_warned_of_once():
    model, static = Net("relu", 0).eval(), Recipe(activation="per_tensor_static")
    with pytest.warns(UserWarning, match="static scales from 36 calibration tokens") as caught:
        sqcompile.calibrate(model, [tokens(4, 0)], recipe=static, progress=False)
    assert sum("static scales" in str(w.message) for w in caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sqcompile.calibrate(model, [tokens(4, 0)], progress=False)  # dynamic
        sqcompile.calibrate(model, [tokens(FEW_TOKENS // 9 + 1, 0)], recipe=static, progress=False)
