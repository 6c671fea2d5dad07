"""What stays in float for accuracy: the inputs that cost the logits most for their work, up to a share of it."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
from backend_cases import compiled, session
from budget_cases import LM, batches, lost
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import sqcompile
from sqcompile import Plan, Recipe, RecipeError
from sqcompile.passes.planning.budget import Unit
from sqcompile.passes.planning.dearest import ENOUGH, TIMES, dearest

PLAIN = Recipe(smooth=False)


def calibrated(model: nn.Module, share: float, recipe: Recipe = PLAIN) -> Plan:
    recipe = dataclasses.replace(recipe, float_work=share)
    return sqcompile.calibrate(model, batches(), recipe=recipe, progress=False)


def left(plan: Plan) -> set[str]:
    return {l.name for l in plan.layers if "float_work" in l.reason}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return LM(sharpness=40.0).eval()


def test_the_linear_that_costs_most_stays_in_float(model):
    """Each of nine linears does a ninth of the work."""
    whole, found = calibrated(model, 0), calibrated(model, 0.12)
    assert left(whole) == set() and left(found) == {"down.1.weight"}
    loss = {l.name: l.loss for l in found.layers if l.loss is not None}
    times = 9 * loss["down.1.weight"] / sum(loss.values())
    assert times > TIMES
    [line] = [l.reason for l in found.layers if l.name == "down.1.weight"]
    cost = f"{100 * math.expm1(loss['down.1.weight']):.2g}"
    assert line == (
        f"left in float: costs {cost} % of perplexity, and its input {times:.2g} times its share of the INT8 work (float_work=0.12)"
    )
    net = sqcompile.compile(model, plan=found, backend="eager", progress=False)
    assert re.search(r"down\.1\.weight.*float_work=0\.12", net.report.to_text(full=True))
    # the formula gives it .35 of what all cost
    assert lost(model, found) < 0.7 * lost(model, whole)


def test_a_share_that_holds_none_leaves_none(model):
    assert left(calibrated(model, 0.11)) == set()  # a ninth is more
    for wrong in (-0.1, 1.1, float("nan"), "0.1", True):
        with pytest.raises(RecipeError, match="float_work"):
            Recipe(float_work=wrong)


def test_without_logits_nothing_stays_in_float():
    plan = calibrated(LM(logits=False, sharpness=40.0).eval(), 0.5)
    assert left(plan) == set() and all(l.loss is None for l in plan.layers)  # nor are there gradients


def test_what_costs_little_stays_quantized():
    assert left(calibrated(LM().eval(), 0.5)) == set()  # all of it costs .014 % of perplexity


def test_a_limit_decides_alone(model):
    recipe = dataclasses.replace(PLAIN, max_degradation=1e9)
    assert left(calibrated(model, 0.5, recipe)) == set()


def test_the_backend_leaves_the_same(model):
    torch._dynamo.reset()
    net = compiled(model, recipe=dataclasses.replace(PLAIN, float_work=0.12), calibration_steps=4)
    with torch.no_grad():
        for ids in [*batches(), batches()[0]]:
            net(ids)
    assert left(session(model).plan) == {"down.1.weight"}


def test_a_plan_keeps_what_was_left(model, tmp_path):
    plan = calibrated(model, 0.12)
    plan.save(tmp_path / "plan.safetensors")
    again = Plan.load(tmp_path / "plan.safetensors")
    assert again == plan and left(again) == {"down.1.weight"} and again.recipe.float_work == 0.12


@given(st.lists(st.tuples(st.floats(0, 1e-2), st.floats(1, 1e6)), max_size=12), st.floats(0, 1))
def test_of_any_units(found, share):
    units = [Unit((str(i),), loss, work) for i, (loss, work) in enumerate(found)]
    units.sort(key=lambda u: -u.loss / u.work)
    loss, work = sum(u.loss for u in units), sum(u.work for u in units)
    chosen = dearest(units, share)
    names = {u.names for u, _ in chosen}
    assert sum(u.work for u, _ in chosen) <= share * work * (1 + 1e-9)
    for u, times in chosen:
        assert times == pytest.approx(u.loss / loss * work / u.work) and times >= TIMES
    # each that is quantized though it costs twice its share had no room, or came when the rest was cheap enough
    rest, room = loss, share * work
    for u in units:
        if u.names in names:
            rest, room = rest - u.loss, room - u.work
        elif loss and u.loss / loss >= TIMES * (1 + 1e-9) * u.work / work:
            assert u.work > room or rest <= ENOUGH * (1 + 1e-9)


def test_no_estimate_leaves_nothing():
    assert dearest([], 0.5) == []
    assert dearest([Unit(("a",), math.inf, 1.0), Unit(("b",), 1.0, 1e3)], 0.5) == []
    assert dearest([Unit(("a",), 1.0, 0.0), Unit(("b",), 1.0, 0.0)], 0.5) == []  # of calls without a token
