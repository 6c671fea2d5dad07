"""Rotations are tried in some of the layers that a model repeats: the first, the last, and some between. All get the same."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from test_sharing import known

from sqcompile import Recipe
from sqcompile.passes.planning import candidates
from sqcompile.passes.planning.candidates import BETWEEN, ENDS, to_look_at
from sqcompile.passes.planning.choose import choose

MOST = 2 * ENDS + BETWEEN
LAYERS = 9
SOME = {0, 1, 4, 5, 7, 8}


def _layer(name: str) -> int:
    return int(name.split(".")[2])


@pytest.fixture
def seen(monkeypatch) -> Counter[tuple[bool, int]]:
    """How often a site was looked at by itself, and chosen for, by the layer whose linears it feeds."""
    found: Counter[tuple[bool, int]] = Counter()
    best = candidates.best

    def see(chooser, site, floats, look=None):
        found[look is None, _layer(site.balance[0][0].name)] += 1
        return best(chooser, site, floats, look)

    monkeypatch.setattr(candidates, "best", see)
    return found


@torch.no_grad()
def test_some_are_looked_at_and_all_are_rotated_alike(seen):
    recipe = Recipe((0.3, 0.7), rotate="auto")
    gm, sites, refusals, statistics, felt, spec = known("llama", recipe, num_hidden_layers=LAYERS)
    plan = choose(gm, sites, refusals, statistics, recipe, spec, felt=felt)
    assert {layer for first, layer in seen if first} == SOME
    assert {layer for first, layer in seen if not first} == set(range(LAYERS))
    assert len({n for (first, _), n in seen.items() if first}) == 1  # all kinds of sites of a layer
    by_kind: dict[str, set[int | None]] = {}
    for l in plan.layers:
        if l.quantized:
            by_kind.setdefault(l.name.split(".", 3)[3], set()).add(l.rotation)
    assert all(len(found) == 1 for found in by_kind.values()) and any(None not in found for found in by_kind.values())


@torch.no_grad()
def test_a_static_recipe_looks_at_all_of_them(seen):
    """Which single inputs stay dynamic is not known from other layers."""
    recipe = Recipe((0.3, 0.7), rotate="auto", activation="per_tensor_static")
    gm, sites, refusals, statistics, felt, spec = known("llama", recipe, num_hidden_layers=LAYERS)
    choose(gm, sites, refusals, statistics, recipe, spec, felt=felt)
    assert {layer for first, layer in seen if first} == set(range(LAYERS))


@pytest.mark.parametrize("layers", [1, MOST - 1, MOST, MOST + 1, MOST + 2, 16, 80])
def test_which(layers):
    recipe = Recipe()
    linears = [SimpleNamespace(name=f"model.{i}.up", shape=(4, 4)) for i in range(layers)]
    sites = [SimpleNamespace(name=f"model.{i}.norm", balance=[(l, None)]) for i, l in enumerate(linears)]
    alone = SimpleNamespace(name="head", balance=[(SimpleNamespace(name="head", shape=(4, 4)), None)])
    chooser = SimpleNamespace(own=dict.fromkeys([l.name for l in linears] + ["head"], recipe))
    found = to_look_at(chooser, [*sites, alone], {})  # type: ignore[arg-type, list-item]
    assert found[-1] is alone and len(found) == min(layers, MOST) + 1
    assert found == [s for s in [*sites, alone] if s in found]
    assert {0, layers - 1} <= {sites.index(s) for s in found[:-1]}


def test_what_was_looked_at_decides_for_the_others():
    """The block that costs least in the sum over those layers, however a layer that was not looked at feels."""
    kinds = {f"model.{i}.norm": {None: 3.0, 16: 2.0 if i else 9.0} for i in (0, 1, 2)}
    linears = [SimpleNamespace(name=f"model.{i}.up", shape=(4, 4)) for i in range(5)]
    sites = [SimpleNamespace(name=f"model.{i}.norm", balance=[(l, None)]) for i, l in enumerate(linears)]
    chooser = SimpleNamespace(own=dict.fromkeys([l.name for l in linears], Recipe()))
    found = {name: SimpleNamespace(costs=costs, loss=None) for name, costs in kinds.items()}
    look = candidates.look_at(chooser, sites, {}, found)  # type: ignore[arg-type]
    assert look.rotations == {s.name: None for s in sites} and not look.costly
    kinds["model.0.norm"][16] = 4.0
    assert set(candidates.look_at(chooser, sites, {}, found).rotations.values()) == {16}  # type: ignore[arg-type]
