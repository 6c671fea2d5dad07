"""Mixed precision on a budget: which linears are left in float, how many, and what is said of it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
from backend_cases import compiled, session
from budget_cases import LM, batches, lost
from conftest import relative_error, tiny_lm, token_batches
from torch import Tensor, nn

import sqcompile
from sqcompile import CalibrationError, NothingToQuantizeError, Plan, PlanError, Recipe, RecipeError
from sqcompile.capture.inputs import as_call
from sqcompile.capture.trace import trace
from sqcompile.lm import calibration_texts, evaluation_texts, load_lm, token_windows
from sqcompile.passes.planning.budget import at_most, ranked, without
from sqcompile.statistics.observe import calibrate as observe


def calibrated(model: nn.Module, most: float | None, evaluate=None, **recipe) -> Plan:
    recipe = {"smooth": False, **recipe}
    how = Recipe(max_degradation=most, **recipe)
    return sqcompile.calibrate(model, batches(), recipe=how, progress=False, evaluate=evaluate)


def left(plan: Plan) -> list[str]:
    return [l.name for l in plan.layers if "max_degradation" in l.reason]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return LM().eval()


@pytest.fixture(scope="module")
def whole(model) -> tuple[Plan, float]:
    """The plan with every linear in INT8, and what it loses."""
    plan = calibrated(model, None)
    return plan, lost(model, plan)


def test_the_fewest_are_left_with_which_the_target_holds(model, whole):
    most = whole[1] / 3
    assert most > 0
    found = calibrated(model, most)
    names = left(found)
    assert names and len(names) <= 3 and lost(model, found) <= most
    assert "down.1.weight" in names  # whose input has spikes
    for l in found.layers:
        if l.name in names:
            assert not l.quantized and l.loss is not None
            cost = f"{100 * math.expm1(l.loss):.2g}"
            assert l.reason == f"left in float: costs {cost} % of perplexity, and max_degradation={most}"
    text = str(sqcompile.compile(model, plan=found, backend="eager", progress=False).report.to_text(full=True))
    assert all(any(n in line and "max_degradation" in line for line in text.splitlines()) for n in names)
    for unit in ({"down.1.weight"}, {"gate.1.weight", "up.1.weight"}):  # one less is too few
        assert unit <= {*names} and lost(model, without(whole[0], {*names} - unit, most, True)) > most


def test_larger_budgets_leave_less_in_float_and_a_large_one_nothing(model, whole):
    plan, all_ = whole
    counts = [len(left(calibrated(model, all_ * share))) for share in (0.05, 0.2, 0.6, 2)]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[2] and counts[-1] == 0
    found = calibrated(model, 2 * all_)
    layers = tuple(dataclasses.replace(l, loss=None) for l in found.layers)
    assert dataclasses.replace(found, recipe=plan.recipe, layers=layers) == plan


def test_no_budget_leaves_nothing_to_quantize(model):
    with pytest.raises(NothingToQuantizeError, match=r"max_degradation=0\.0 every linear stays in float"):
        calibrated(model, 0)


def test_a_limit_is_a_percentage():
    for wrong in (-1, float("nan"), "0.1", True, float("inf")):
        with pytest.raises(RecipeError, match="max_degradation"):
            Recipe(max_degradation=wrong)
    assert Recipe(max_degradation=1).max_degradation == 1.0


def test_linears_that_read_one_tensor_are_left_together(model, whole):
    names = set(left(calibrated(model, whole[1] / 20)))
    for i in range(3):
        assert (f"gate.{i}.weight" in names) == (f"up.{i}.weight" in names)
    assert {"gate.0.weight", "gate.1.weight", "gate.2.weight"} & names


def test_smoothing_that_is_left_is_dropped_and_plans_come_back(model, tmp_path):
    smoothed = calibrated(model, None, smooth=True)
    assert any("down" in site for site in smoothed.scales)
    found = calibrated(model, lost(model, smoothed) / 3, smooth=True)
    names = left(found)
    assert names
    for site in found.scales:
        assert not set(site.partition(" -> ")[2].split(", ")) <= set(names)
    found.save(tmp_path / "p")
    assert Plan.load(tmp_path / "p") == found
    net = sqcompile.compile(model, plan=found, backend="eager", progress=False)
    assert relative_error(net.stages["folded"](batches()[0]), model(batches()[0])) < 1e-5


def test_what_cannot_be_measured_says_to_pass_evaluate():
    with pytest.raises(CalibrationError, match=r"the model gives no logits: pass evaluate="):
        calibrated(LM(logits=False).eval(), 0.1)
    with pytest.raises(
        CalibrationError, match=r"no calibration call can be run again to see its logits: pass evaluate="
    ):
        calibrated(LM(random=True).eval(), 0.1)


@pytest.mark.parametrize("kind", ["hidden states", "random"])
def test_the_user_s_own_value(kind):
    """Without logits, and without calls that can be run again: linears are ranked by what is known."""
    model = LM(logits=kind == "random", random=kind == "random").eval()

    @torch.no_grad()
    def outputs(net: nn.Module) -> list[Tensor]:
        torch.manual_seed(0)
        return [net(ids) for ids in batches()]

    want = outputs(model)
    seen: list[nn.Module] = []

    def evaluate(net: nn.Module) -> float:
        seen.append(net)
        return 1.0 + sum(relative_error(y, w) for y, w in zip(outputs(net), want, strict=True))

    all_ = 100 * (evaluate(sqcompile.compile(model, plan=calibrated(model, None), backend="eager", progress=False)) - 1)
    seen.clear()
    most = all_ * (0.5 if kind == "hidden states" else 0.8)
    plan = calibrated(model, most, evaluate)
    assert seen[0] is model and 2 <= len(seen) < 10 and all(isinstance(m, nn.Module) for m in seen)
    names = left(plan)
    assert names and "down.1.weight" in names
    net = sqcompile.compile(model, plan=plan, backend="eager", progress=False)
    assert 100 * (evaluate(net) - evaluate(model)) / evaluate(model) <= most
    reason = next(l.reason for l in plan.layers if l.name == "down.1.weight")
    assert ("of the outputs" if kind == "hidden states" else "its own relative error is") in reason
    with pytest.raises(NothingToQuantizeError, match=r"max_degradation=0\.0 every"):
        calibrated(model, 0, lambda net: 1.0 if net is model else 2.0)


@pytest.mark.parametrize(
    ("most", "evaluate", "error", "message"),
    [
        (None, lambda m: 1.0, RecipeError, r"evaluate without a limit: pass Recipe\(max_degradation="),
        (1.0, 3.0, RecipeError, r"evaluate=3.0: pass a function"),
        (1.0, lambda m: 0.0, CalibrationError, "evaluate gives 0 for the float model"),
        (1.0, lambda m: "good", CalibrationError, "evaluate gives 'good' for the float model: return one number"),
        (1.0, lambda m: math.nan, CalibrationError, "evaluate gives nan for the float model"),
    ],
)
def test_a_wrong_evaluate_is_refused(model, most, evaluate, error, message):
    with pytest.raises(error, match=message):
        calibrated(model, most, evaluate)


def test_a_plan_needs_no_evaluate(model, whole):
    with pytest.raises(PlanError, match="plan and evaluate"):
        sqcompile.compile(model, plan=whole[0], evaluate=lambda m: 1.0, progress=False)


def test_values_that_are_not_finite_are_the_worst(model):
    """A quantized model of which ``evaluate`` gives NaN is none that holds the target."""
    with pytest.raises(NothingToQuantizeError):
        calibrated(model, 50, lambda net: 1.0 if net is model else math.nan)


def test_the_mean_and_its_error():
    rows = torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert at_most([rows]) == pytest.approx(3 + float(rows.std()) / 2)
    calls = [torch.tensor([1.0, 3.0]), torch.tensor([4.0, 4.0])]
    assert at_most(calls) == pytest.approx(3 + math.sqrt(2) / math.sqrt(2))
    assert at_most([torch.tensor([1.0, math.nan])]) == math.inf


def test_sqnr_ranks_where_nothing_is_known_of_the_outputs(model, whole):
    """0 dB is all noise, infinity is exact, and None is not known: of one work, down.0, down.1 and down.2."""
    gm = trace(model, as_call(model, batches()[0]))
    calibration = observe(gm, model, batches())
    downs = [f"down.{i}.weight" for i in range(3)]
    for names in itertools.permutations(downs):
        sqnr = dict(zip(names, (0.0, 10.0, math.inf), strict=True))
        layers = tuple(dataclasses.replace(l, loss=None, sqnr_db=sqnr.get(l.name)) for l in whole[0].layers)
        units = ranked(gm, dataclasses.replace(whole[0], layers=layers), calibration)
        assert [u.names for u in units[:2]] == [names[:1], names[1:2]]
        assert [u.loss for u in units] == pytest.approx([1.0, 0.1, *[0.0] * (len(units) - 2)])


def test_the_backend_keeps_a_budget_alike(model, whole):
    most = whole[1] / 3
    torch._dynamo.reset()
    net = compiled(model, recipe=Recipe(smooth=False, max_degradation=most), calibration_steps=4)
    with torch.no_grad():
        for ids in [*batches(), batches()[0]]:
            net(ids)
    plan = session(model).plan
    assert left(plan) == left(calibrated(model, most))


def test_static_values_of_attention_keep_what_they_count_on():
    """Δ of V is that of the folded V: v_proj -> o_proj stays folded where o_proj is left in float."""
    model, data = tiny_lm("llama"), token_batches()
    recipe = Recipe(activation="per_tensor_static", attention="qk_pv", alpha=0.5)
    plan = sqcompile.calibrate(model, data, recipe=recipe, progress=False)
    site = next(s for s in plan.scales if "v_proj" in s.partition(" -> ")[0] and "o_proj" in s)
    names = {l.name for l in plan.layers if "o_proj" in l.name or "down_proj" in l.name}
    found = without(plan, names, 1.0, True)
    found.check()
    assert site in found.scales and not any(l.quantized for l in found.layers if l.name in names)
    net = sqcompile.compile(model, plan=found, backend="eager", progress=False)
    want = model(**data[0]).logits
    assert relative_error(net.stages["folded"](**data[0]).logits, want) < 1e-5
    before, after = (
        relative_error(sqcompile.compile(model, plan=p, backend="eager", progress=False)(**data[0]).logits, want)
        for p in (plan, found)
    )
    assert after < before


@pytest.mark.slow
@pytest.mark.parametrize("style", ["llama", "neox", "opt"])
def test_trained_models_keep_their_budget_on_text_they_were_not_calibrated_on(style):
    data = Path(__file__).parents[1] / "data"
    lm, tokenizer = load_lm() if style == "llama" else load_lm(folder=data / style)
    windows = token_windows(calibration_texts(), tokenizer, 128, 16).split(2)
    held_out = token_windows(evaluation_texts(), tokenizer, 256)[::24]
    names = {}
    for most in (0.05, 0.2):
        plan = sqcompile.calibrate(lm, list(windows), recipe=Recipe(max_degradation=most), progress=False)
        names[most] = left(plan)
        if most == 0.05:
            net = sqcompile.compile(lm, plan=plan, backend="eager", progress=False)
            found = sqcompile.evaluate(net, held_out, against=lm, layers=False, progress=False)
            print(f"{style}: {found.increase:.3f} ± {found.increase_error:.3f} %, left in float: {names[most]}")
            assert found.increase - found.increase_error <= most
    assert 0 < len(names[0.05]) < 15 and len(names[0.2]) < len(names[0.05])
    with pytest.raises(NothingToQuantizeError, match="max_degradation"):
        sqcompile.calibrate(lm, list(windows), recipe=Recipe(max_degradation=0), progress=False)
