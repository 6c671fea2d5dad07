"""Static scales on tokens that calibration did not see."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sqcompile
from sqcompile import Recipe
from sqcompile.kernels.qtypes import FP8, INT8
from sqcompile.passes.planning.feel import Reads
from sqcompile.passes.planning.limits import Spread, choose_way, limit_of
from sqcompile.passes.planning.loss import Transform, of_input
from sqcompile.passes.planning.spikes import spikes
from sqcompile.passes.planning.static_scales import FEW_TOKENS, ONE_TOKEN, margin
from sqcompile.plan.recipe import ALPHAS, AUTO
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
    found = InputStats.empty(x[:0], None)
    for i, part in enumerate(x.chunk(batches)):
        found.update(part, torch.zeros(len(part), dtype=torch.int64), 0, i)
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


class Pooled(nn.Module):
    """A linear for every token, and two for the first one of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.pool, self.head = nn.LayerNorm(16), *(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.pool(torch.relu(self.up(self.norm(x)))[:, 0])))


def test_linears_of_few_tokens_beside_others_of_many_are_named():
    static = Recipe(alpha=0.5, activation="per_tensor_static")
    with pytest.warns(UserWarning, match=r"from 3 calibration tokens \(pool.weight and 1 more\): larger") as caught:
        sqcompile.calibrate(Pooled().eval(), [torch.randn(3, 300, 16)], recipe=static, progress=False)
    assert sum("static scales" in str(w.message) for w in caught) == 1


class Spiky(nn.Module):
    """Residual blocks over embeddings, of which the first token of a sequence gets one that is many times the others'."""

    def __init__(self, times: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.times, self.embed = times, nn.Embedding(100, 64)
        self.up, self.down, self.head = nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(64, 100)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        first = torch.arange(ids.shape[1], device=ids.device)[:, None] == 0
        x = torch.where(first, self.times * x, x)
        return self.head(x + self.down(F.gelu(self.up(x))))


def ids(seed: int) -> Tensor:
    return torch.randint(0, 100, (8, 64), generator=torch.Generator().manual_seed(seed))


SPIKE = Recipe(alpha="auto", rotate="auto", activation="per_tensor_static")


def divergence(model: nn.Module, plan: sqcompile.Plan, where: slice = slice(1, None)) -> float:
    """KL from the float model on tokens that were not seen, of those at some positions."""
    compiled = sqcompile.compile(model, plan=plan, backend="eager", progress=False)
    with torch.no_grad():
        p, q = (m(ids(9))[:, where].log_softmax(-1) for m in (model, compiled))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("alpha", ["auto", (0.3, 0.7)])
def test_where_a_first_token_spikes_an_input_stays_dynamic(alpha, tmp_path):
    """A token of 50 times the others would leave them three bits: static scales cost at least ten times as much."""
    model, batches = Spiky(50.0).eval(), [ids(s) for s in range(6)]
    recipe = dataclasses.replace(SPIKE, alpha=alpha)
    plans = {
        spikes: sqcompile.calibrate(model, batches, recipe=dataclasses.replace(recipe, spikes=spikes), progress=False)
        for spikes in ("dynamic", "static")
    }
    up = plans["dynamic"].layers[0]
    assert up.activation == "per_token" and up.input_scale is None
    assert re.search(
        r"a scale for each token at run time, as 48 of 3072 calibration tokens reach \d\dx the others", up.reason
    )
    static = plans["static"].layers[0]
    assert static.activation is None and static.input_scale and "48 of 3072 calibration tokens reach" in static.reason
    assert divergence(model, plans["dynamic"]) < 0.1 * divergence(model, plans["static"])
    plans["dynamic"].save(tmp_path / "plan")
    assert sqcompile.Plan.load(tmp_path / "plan") == plans["dynamic"]
    layers = (dataclasses.replace(up, activation=None), *plans["dynamic"].layers[1:])
    with pytest.raises(sqcompile.PlanError, match="needs an input_scale"):
        dataclasses.replace(plans["dynamic"], layers=layers).check()


def test_without_spikes_every_input_is_static():
    plan = sqcompile.calibrate(Spiky(1.0).eval(), [ids(s) for s in range(6)], recipe=SPIKE, progress=False)
    assert all(l.input_scale and "Δ from" in l.reason for l in plan.layers if l.quantized)
    assert not any("the others" in l.reason for l in plan.layers)


class Loud(nn.Module):
    """Residual blocks over embeddings. The sizes of one's tokens spread, with no few beyond the others, and it gives most."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(100, 64), nn.Linear(64, 100)
        self.size = nn.Parameter(torch.exp2(4 * torch.rand(100, 1)))
        self.ups = nn.ModuleList(nn.Linear(64, 128) for _ in range(6))
        self.downs = nn.ModuleList(nn.Linear(128, 64) for _ in range(6))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for i, (up, down) in enumerate(zip(self.ups, self.downs, strict=True)):
            read = x * self.size[ids] if i == 2 else x
            x = x + down(F.gelu(up(read))) * (8.0 / self.size[ids] if i == 2 else 1.0)
        return self.head(x)


def test_the_input_that_costs_most_stays_dynamic():
    """Its tokens differ too much for one scale, and are too many for spikes; the report says why, and the outputs gain."""
    model, batches = Loud().eval(), [ids(s) for s in range(6)]
    plans = {
        spikes: sqcompile.calibrate(model, batches, recipe=dataclasses.replace(SPIKE, spikes=spikes), progress=False)
        for spikes in ("dynamic", "static")
    }
    dynamic = {l.name: l.reason for l in plans["dynamic"].layers if l.activation == "per_token"}
    assert dynamic and dynamic.keys() <= {"ups.2.weight", "downs.2.weight"}
    why = "; a scale for each token at run time, as one scale for all of them would cost the outputs most here"
    assert all(why in reason for reason in dynamic.values())
    assert not any(l.activation for l in plans["static"].layers)
    assert divergence(model, plans["dynamic"]) < 0.6 * divergence(model, plans["static"])


def test_spikes_are_counted():
    x = torch.rand(1000, 16, generator=torch.Generator().manual_seed(0)) + 1
    assert spikes(stats(x)) is None
    x[[3, 500, 900]] *= 40
    assert re.fullmatch(r"3 of 1000 calibration tokens reach \d\dx the others", str(spikes(stats(x))))
    y = torch.cat([x, torch.zeros(3000, 16)])
    assert str(spikes(stats(y))).startswith("3 of 4000 calibration tokens reach ")  # zeros are no size to compare with
    x[:100] *= 40
    assert spikes(stats(x)) is None  # one in ten is no exception
    one = torch.ones(1000, 16)
    one[7] *= 64
    both = stats(one[:500], 2).merged(stats(one[500:], 2))
    assert spikes(both) == spikes(stats(one)) and str(spikes(both)).startswith("1 of 1000 calibration tokens reaches")


def reads_of(x: Tensor, gradients: Tensor) -> Reads:
    half = (torch.arange(len(x)) >= len(x) // 2).long()
    return Reads(x, gradients, torch.full((len(x),), 1 / len(x)), half)


def test_a_histogram_tells_what_every_limit_costs():
    g = torch.Generator().manual_seed(0)
    x, slope = torch.randn(400, 64, generator=g), torch.randn(400, 64, generator=g)
    reads = reads_of(x, slope)
    for qtype in (INT8, FP8):
        spread = Spread.of(x, slope, reads.weights)
        limits = torch.tensor([0.5, 1.0, 2.0, 3.0, 5.0, 9.0])
        got = spread.loss(spread.losses(qtype), limits)
        for limit, cost in zip(limits, got, strict=True):
            want = of_input(reads, Transform(), limit / qtype.q_max, qtype)[0]
            assert float(cost) == pytest.approx(want, rel=0.05), (qtype.name, limit)
    assert spread.percentile(99.0) == pytest.approx(float(x.abs().flatten().quantile(0.99)), rel=0.05)


def test_clipping_is_weighed_by_gradients():
    """A channel with outliers is clipped where nothing feels it, and not where it is felt as the others are."""
    g = torch.Generator().manual_seed(0)
    x, slope = torch.randn(640, 64, generator=g), torch.ones(640, 64)
    x[::8, 0] *= 60
    found = {}
    for size in (1.0, 1e-4):
        slope[:, 0] = size
        reads, of = reads_of(x, slope), stats(x, 1)
        way = choose_way(reads, of, None, None, INT8)
        found[size] = limit_of(way, reads, of, None, None, INT8)[1]
    assert found[1.0] > 0.5 and found[1e-4] < 0.1, found


def test_of_ways_that_cost_the_same_the_one_that_clips_least_is_taken():
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    reads, of = reads_of(x, torch.zeros(256, 64)), stats(x, 1)
    way = choose_way(reads, of, None, None, INT8)
    assert limit_of(way, reads, of, None, None, INT8)[1] >= 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "relu", "gelu", "gated"])
@torch.no_grad()
def test_limits_of_few_tokens_hold_on_others(kind):
    """Limits by the loss, from 36 tokens: no module is 1 dB worse than by the linears' own errors, for the mean token."""
    gains = []
    for seed in range(3):
        model, seen, unseen = Net(kind, seed).eval(), tokens(4, seed), tokens(64, 100 + seed)
        found = []
        for alpha in ("auto", AUTO):
            net = sqcompile.compile(
                model, [seen], recipe=Recipe(alpha, "per_tensor_static"), backend="eager", progress=False
            )
            noise, signal = ((y.square().sum(-1)) for y in (net(unseen) - model(unseen), model(unseen)))
            found.append(-10 * math.log10(float((noise / signal).mean())))
        gains.append(found[0] - found[1])
    assert min(gains) > -1, gains
