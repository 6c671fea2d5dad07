"""Weights with outliers that take the whole range of their scales: found, said, and left in float."""

from __future__ import annotations

import pytest
import torch
from conftest import relative_error
from torch import Tensor, nn

import sqcompile
from sqcompile import NothingToQuantizeError, Recipe
from sqcompile.passes.planning import weight_outliers


class Block(nn.Module):
    """Two linears; channels 5 and 9 of the first one's input are 1 for every token, and its bias takes out what they give.

    So large weights of these channels change nothing in float.
    """

    def __init__(self, kind: str, by: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 96), nn.Linear(96, 64)
        with torch.no_grad():
            self.norm.weight[[5, 9]], self.norm.bias[[5, 9]] = 0.0, 1.0
            largest = float(self.up.weight.abs().max())
            rows = {"values": range(0, 96, 8), "columns": range(96), "none": ()}[kind]
            for n in rows:
                for j in (5, 9) if kind == "columns" else (5,):
                    self.up.weight[n, j] = by * largest
                    self.up.bias[n] -= by * largest

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def batches(seeds: range = range(4)) -> list[Tensor]:
    return [torch.randn(4, 40, 64, generator=torch.Generator().manual_seed(s)) for s in seeds]


def compiled(model: nn.Module, recipe: str | Recipe) -> sqcompile.CompiledModel:
    return sqcompile.compile(model, batches(), recipe=recipe, backend="eager", progress=False)


def up_of(net: sqcompile.CompiledModel) -> sqcompile.LayerPlan:
    return next(l for l in net.plan.layers if l.name == "up.weight")


@pytest.mark.parametrize("kind", ["values", "columns"])
@pytest.mark.parametrize(
    "recipe",
    [Recipe("auto", rotate="auto"), "O1", Recipe(smooth=False), Recipe(smooth=False, rotate=64)],
    ids=["auto", "per tensor", "plain", "rotated"],
)
def test_planted_outliers_are_found_and_said(kind, recipe, monkeypatch):
    model, x = Block(kind, 3000.0).eval(), batches(range(9, 10))[0]
    net = compiled(model, recipe)
    layer = up_of(net)
    assert not layer.quantized and layer.reason.startswith("its weight has outliers, up to ")
    assert "dB of the other values in INT8" in layer.reason and layer.reason in str(net.report)
    assert ("one scale for all of it" in layer.reason) == (recipe == "O1")
    assert next(l for l in net.plan.layers if l.name == "down.weight").quantized
    with torch.no_grad():
        inside = model(x) - x  # without the residual
        good = relative_error(net(x) - x, inside)
        monkeypatch.setattr(weight_outliers, "lost", lambda *_: None)
        unaware = compiled(model, recipe)
        assert up_of(unaware).quantized
        bad = relative_error(unaware(x) - x, inside)
    assert good < 0.02 and bad > 5 * good
    assert up_of(unaware).sqnr_db > 30  # which does not say it: what the outliers give is most of the output


@pytest.mark.parametrize("kind", ["values", "columns"])
def test_outliers_that_meet_constants_are_quantized_where_these_are_taken_off(kind):
    model, x = Block(kind, 3000.0).eval(), batches(range(9, 10))[0]
    net = compiled(model, "default")
    assert up_of(net).quantized and "up.weight" in net.plan.shifts
    with torch.no_grad():
        assert relative_error(net(x) - x, model(x) - x) < 0.02


@pytest.mark.parametrize("recipe", ["default", "O1", "O3", "fp8", Recipe(alpha="auto", rotate="auto")], ids=str)
def test_ordinary_weights_are_not(recipe):
    for model in (Block("none", 0.0).eval(), Block("values", 4.0).eval()):
        assert up_of(compiled(model, recipe)).quantized


def test_pruned_weights_are_not():
    model = Block("none", 0.0).eval()
    with torch.no_grad():
        model.up.weight *= model.up.weight.abs() > 0.9 * model.up.weight.abs().max()
        model.down.weight[3] = 0
    assert all(l.quantized for l in compiled(model, "default").plan.layers)


def test_outliers_that_smoothing_takes_out_are_quantized():
    """Channels whose weights are large in every row alike, and whose inputs are small."""
    model = Block("none", 0.0).eval()
    with torch.no_grad():
        model.up.weight[:, [7, 20]] *= 100
        model.norm.weight[[7, 20]] /= 8
    assert not up_of(compiled(model, Recipe(smooth=False))).quantized
    layer = up_of(compiled(model, "default"))
    assert layer.quantized and layer.smoothing == "folded"


def test_nothing_else_to_quantize():
    with pytest.raises(NothingToQuantizeError, match="its weight has outliers"):
        compiled(Block("values", 300.0).eval(), Recipe(smooth=False, skip=("down",)))
