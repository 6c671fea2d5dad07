"""Rows that hold a NaN or an infinity come out as NaN in every recipe and by every implementation; the others as they are."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from torch import Tensor, nn

import sqcompile
from sqcompile import Recipe
from sqcompile.kernels.ops import sqcompile_ops

STATIC = Recipe(activation="per_tensor_static")
RECIPES = {
    "default": Recipe(),
    "O1": Recipe(weight="per_tensor"),
    "O2": Recipe(weight="per_tensor", activation="per_tensor"),
    "O3": Recipe(weight="per_tensor", activation="per_tensor_static"),
    "unsmoothed": Recipe(activation="per_tensor_static", smooth=False),
}


class Block(nn.Module):
    """Linears of every kind: after a norm, after another linear and relu, gated, after gelu; rows do not meet."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.gate, self.down = (
            nn.LayerNorm(32),
            nn.Linear(32, 64),
            nn.Linear(32, 64),
            nn.Linear(64, 32),
        )
        self.first, self.second, self.third = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.down(F.silu(self.gate(h)) * self.up(h))
        x = x + self.second(F.relu(self.first(F.layer_norm(x, (32,)))))
        return self.third(F.gelu(x))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(*x.shape[:2], 2, 16).transpose(1, 2) for f in (self.q, self.k, self.v))
        return x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def inputs(n: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 16, 32, generator=generator) for _ in range(n)]


def spoilt(x: Tensor, bad: float) -> Tensor:
    x = x.clone()
    x[1, 3, 5], x[7, 15, 31] = bad, bad
    return x


def check(run, model: nn.Module, recipe: Recipe, bad: float) -> None:
    x = inputs(3)[2]
    y = run(spoilt(x, bad))
    rows = torch.zeros(8, 16, dtype=torch.bool)
    rows[1, 3] = rows[7, 15] = True
    assert y[rows].isnan().all()
    if recipe.activation == "per_tensor":
        return  # one scale for all
    assert relative_error(y[~rows], model(x)[~rows]) < 0.1
    assert torch.allclose(y[~rows], run(x)[~rows], atol=1e-5)


TARGETS = {"of this machine": None, "reference": "reference", "for GPUs": "cuda-sm90"}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kernels", ["of this machine", "reference", "for GPUs"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@torch.no_grad()
def test_rows_that_are_not_finite_come_out_as_nan(recipe, kernels, bad):
    torch.manual_seed(0)
    model = Block().eval()
    net = sqcompile.compile(model, inputs(2), recipe=recipe, backend="eager", progress=False, target=TARGETS[kernels])
    assert all(l.quantized for l in net.report.layers)
    check(net, model, recipe, bad)
    if kernels == "reference":
        check(net.stages["quantized"], model, recipe, bad)
    if kernels == "for GPUs" and recipe.activation == "per_tensor_static":  # with a chain that stays in int8
        gemms = net.lowered.graph.find_nodes(op="call_function", target=sqcompile_ops.int8_gemm.default)
        assert any(g.args[8] is not None for g in gemms)


@pytest.mark.parametrize("stage", [pytest.param("lowered", marks=pytest.mark.slow), "quantized"])
@torch.no_grad()
def test_inductor_keeps_them(stage):
    torch.manual_seed(0)
    model = Block().eval()
    net = sqcompile.compile(model, inputs(2), recipe=STATIC, backend="eager", progress=False)
    if stage == "lowered":
        run = sqcompile.compile(model, plan=net.plan)
    else:
        run = torch.compile(net.stages["quantized"])
    for bad in (math.nan, math.inf):
        check(run, model, STATIC, bad)


@pytest.mark.slow
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kernels", ["of this machine", "for GPUs"])
@pytest.mark.parametrize("qk", ["per_token", "per_head", "per_tensor", "per_tensor_static"])
@torch.no_grad()
def test_attention_that_reads_them_comes_out_as_nan(qk, kernels, bad):
    """Every query of such a sequence reads the key; other sequences do not, but for one scale for all."""
    torch.manual_seed(0)
    model = Attention().eval()
    recipe = Recipe(activation="per_tensor_static", attention="qk_pv", qk=qk)
    net = sqcompile.compile(model, inputs(2), recipe=recipe, backend="eager", progress=False, target=TARGETS[kernels])
    assert [a.quantized for a in net.report.attention] == ["qk_pv"]
    x = inputs(3)[2]
    for run in (net, net.stages["quantized"]):
        y = run(spoilt(x, bad))
        assert y[1].isnan().all() and y[7].isnan().all()
        others = [0, 2, 3, 4, 5, 6]
        assert y[others].isnan().all() if qk == "per_tensor" else torch.allclose(y[others], run(x)[others], atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@torch.no_grad()
def test_values_alone_that_are_not_finite_make_nan_of_their_head(bad):
    class Values(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x, v):
            q, k = (f(x).view(*x.shape[:2], 2, 16).transpose(1, 2) for f in (self.q, self.k))
            return F.scaled_dot_product_attention(q, k, v)

    torch.manual_seed(0)
    x, v = torch.randn(4, 150, 32), torch.randn(4, 2, 150, 16)
    recipe = Recipe(activation="per_tensor_static", attention="qk_pv")
    net = sqcompile.compile(Values().eval(), [(x, v)], recipe=recipe, backend="eager", progress=False)
    assert net.report.attention[0].quantized == "qk_pv"
    v[2, 1, 140, 3] = bad
    y = net(x, v)
    assert y[2, 1].isnan().all() and y[2, 0].isfinite().all() and y[[0, 1, 3]].isfinite().all()


@torch.no_grad()
def test_experts_pass_them_on():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(2, 32, 32, dtype=torch.bfloat16) / 6)

        def forward(self, x, offsets):
            return F.grouped_mm(x, self.w.transpose(1, 2), offs=offsets)

    torch.manual_seed(0)
    model, x, offsets = Experts().eval(), torch.randn(64, 32).bfloat16(), torch.tensor([30, 64], dtype=torch.int32)
    net = sqcompile.compile(model, [(x, offsets)], recipe=STATIC, backend="eager", progress=False)
    x[40, 3] = math.inf
    y = net(x, offsets)
    assert y[40].isnan().all() and y[:40].isfinite().all() and y[41:].isfinite().all()
