"""What is known of a graph's sites is not computed again, and changes nothing."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from conftest import relative_error
from test_sharing import known
from torch import nn

import sqcompile
from sqcompile import Recipe
from sqcompile.passes.ir.graph import row_step
from sqcompile.passes.planning import products
from sqcompile.passes.planning.choice import Known
from sqcompile.passes.planning.choose import choose
from sqcompile.passes.planning.error import Chooser
from sqcompile.plan.recipe import resolve_recipe


class Forgetful(dict):
    """Keeps nothing longer than it is asked for at once."""

    def __contains__(self, key):
        return False


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("llama", resolve_recipe("default")),
        ("opt", resolve_recipe("O3")),
        ("qwen2_moe", Recipe("auto", rotate="auto", activation="per_tensor_static")),
        ("llama", Recipe((0.3, 0.5, 0.7), weight="per_tensor", rotate="auto")),  # of which linears feel their readers
        ("bert", Recipe((0.3, 0.6))),
    ],
    ids=str,
)
@torch.no_grad()
def test_the_plan_is_that_of_who_knows_nothing(family, recipe, monkeypatch):
    gm, sites, refusals, statistics, felt, spec = known(family, recipe)
    given, tried = (gm, sites, refusals, statistics, recipe, spec), Counter()
    real = Chooser.apply
    monkeypatch.setattr(
        Chooser, "apply", lambda self, site, choice: tried.update([site.name]) or real(self, site, choice)
    )
    plans, counts = [], []
    for what in (Known(), Known(Forgetful(), Forgetful())):
        for how in ({}, {"unsmoothed": "for a test"}):
            plans.append(choose(*given, felt=felt, known=what, **how).encoded())
        counts.append(tried.total())
        tried.clear()
    assert plans[:2] == plans[2:]
    assert counts[0] < counts[1]


@pytest.mark.parametrize("activation", ["per_token", "per_tensor_static"])
def test_a_large_weight_is_judged_by_some_of_its_rows_for_all(activation, monkeypatch):
    """Beside what static scales are expected to clip, which is of all rows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 4000)).eval()
    batches = [torch.randn(64, 64) * torch.logspace(-1, 1, 64) for _ in range(8)]
    found = []
    for most in (2**30, 2**14):
        monkeypatch.setattr(products, "LARGEST", most)
        recipe = Recipe(0.5, activation=activation)
        (layer,) = sqcompile.calibrate(model, batches, recipe=recipe, progress=False).layers
        found.append(layer.sqnr_db)
    assert found[0] != found[1] and found[0] == pytest.approx(found[1], abs=0.3)


def test_rows_of_a_large_weight_are_not_all_of_one_place_in_their_heads():
    w = torch.empty(4096, 4096, device="meta")
    rows = range(0, 4096, row_step(w, 2**19))
    assert len(Counter(r % 128 for r in rows)) > 100 and 2**18 < len(rows) * 4096 < 2**20


@pytest.mark.parametrize("recipe", ["default", "O3"])
def test_a_weight_of_zeros_costs_nothing_and_stops_nobody(recipe):
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.Linear(32, 48)).eval()
    nn.init.zeros_(model[3].weight)
    batches = [torch.randn(16, 32) for _ in range(32)]
    net = sqcompile.compile(model, batches, recipe=recipe, backend="eager", progress=False)
    with torch.no_grad():
        assert relative_error(net(batches[0]), model(batches[0])) < 0.03
