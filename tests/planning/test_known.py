"""What is known of a graph's sites is not computed again, and changes nothing."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from test_sharing import known

from sqcompile import Recipe
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
