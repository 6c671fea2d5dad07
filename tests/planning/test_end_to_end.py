"""Smoothing is left out where it makes the outputs of the whole model worse, whatever each layer's own error says."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from backend_cases import session
from torch import Tensor, nn

import sqcompile
from sqcompile import Recipe
from sqcompile.capture.inputs import as_call
from sqcompile.capture.trace import trace
from sqcompile.passes.planning.end_to_end import FEW, WHY, at_worst
from sqcompile.statistics.observer import Observer
from sqcompile.statistics.sample import CALLS, LARGEST, LOOKS, ROWS, Sample

FORMS = ("compile", "backend")


class Massive(nn.Module):
    """One linear that reads tokens of which the first is a thousand times as large, and has one large channel.

    All of a sum of squares over tokens is that token's: its error gets smaller, and that of all others larger.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(32, 48)
        self.register_buffer("first", torch.cat([torch.tensor([3e5]), torch.randn(31) * 1e3]))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.cat([x[:, :1] * 0.1 + self.first, x[:, 1:]], 1))


class Outliers(nn.Module):
    """One linear that reads tokens with outliers in a few channels, which smoothing is for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(32, 48)
        self.register_buffer("large", torch.where(torch.arange(32) % 8 == 3, 50.0, 1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x * self.large)


def plan_of(model: nn.Module, batches: list[Any], recipe: Recipe, form: str) -> sqcompile.Plan:
    if form == "compile":
        return sqcompile.calibrate(model, batches, recipe=recipe, progress=False)
    torch._dynamo.reset()
    options = {"recipe": recipe, "calibration_steps": len(batches), "compiler": "eager"}
    net = torch.compile(model, backend="smoothquant", options=options)
    with torch.no_grad():
        for x in [*batches, batches[0]]:
            net(*x) if isinstance(x, tuple) else net(x)
    return session(model).plan


def batches(seeds: range, tokens: int = 24) -> list[Tensor]:
    return [torch.randn(3, tokens, 32, generator=torch.Generator().manual_seed(s)) for s in seeds]


@pytest.mark.parametrize("form", FORMS)
def test_smoothing_that_costs_the_whole_model_is_left_out(form):
    model = Massive().eval()
    plan = plan_of(model, batches(range(4)), Recipe(weight="per_tensor"), form)
    assert plan.recipe.smooth and not plan.scales and not plan.columns
    assert [(l.quantized, l.smoothing, l.alpha, l.reason) for l in plan.layers] == [(True, "none", None, WHY)]


@pytest.mark.parametrize("form", FORMS)
def test_smoothing_that_helps_is_kept(form):
    plan = plan_of(Outliers().eval(), batches(range(4)), Recipe(weight="per_tensor"), form)
    assert [l.smoothing for l in plan.layers] == ["folded"]


@pytest.mark.parametrize("seed", [1498, 30040, 30043, 30304, 30330])
def test_what_roundings_of_several_layers_add_up_to(seed):
    """Random blocks whose layers are each better with smoothing, and whose outputs are 1.4 to 2.6 dB worse."""
    from random_checks import examine, loss

    assert loss(examine(seed)) is None


def rows_of(outputs: Tensor, sample: Sample | None = None, keep: Tensor | None = None) -> Sample:
    sample = sample or Sample()
    sample.add([outputs], [outputs], lambda i, y: keep, 0)
    return sample


def test_a_sample_is_bounded():
    sample = Sample()
    for _ in range(CALLS + 2):
        rows_of(torch.randn(1, 3, 8), sample)
    assert len(sample.calls) == CALLS
    many = rows_of(torch.randn(2, 3 * ROWS, 8))
    assert many.rows <= ROWS and len(many.calls[0].rows[0][0]) == many.rows
    assert not rows_of(torch.zeros(2**12, 2**13)).calls, "arguments of 128 MB are not copied"
    several = Sample()
    for _ in range(CALLS):
        rows_of(torch.randn(10, 2**19), several)
    assert 0 < several.bytes <= LARGEST


def test_a_sample_is_of_the_first_calls():
    """A process that shares its batches with others runs all batches until the sample is full."""
    sample = Sample()
    for _ in range(LOOKS):
        assert not sample.full
        sample.add([torch.zeros(3)], [torch.arange(3)], lambda i, y: None, 0)
    assert sample.full and not rows_of(torch.randn(1, 3, 8), sample).calls


def test_a_sample_is_a_copy_without_padding():
    x, keep = torch.randn(2, 3, 8), torch.tensor([True, True, False, True, False, False])
    want = x.flatten(0, 1)[keep]
    sample = rows_of(x, keep=keep)
    x.zero_()
    [call] = sample.calls
    assert torch.equal(call.rows[0][1], want) and bool(call.arguments[0].any())


def test_caches_count_only_where_there_is_nothing_else():
    cache, hidden = torch.randn(1, 2, 5, 8), torch.randn(1, 5, 8)
    for outputs, positions in (([cache, hidden, torch.arange(5)], [1]), ([cache], [0]), ([torch.arange(5)], [])):
        sample = Sample()
        sample.add([hidden], outputs, lambda i, y: None, 0)
        assert [list(call.rows) for call in sample.calls] == ([positions] if positions else [])


def test_few_calls_that_disagree_tell_little():
    ten, one = torch.full((4,), 1e-3), torch.full((4,), 1e-4)
    assert at_worst([one, one, one], [ten, ten, ten]) == pytest.approx(-10, abs=1e-4)
    apart = at_worst([one, ten, ten], [ten, ten, ten])
    assert apart == pytest.approx(-10 / 3 + 10 / 3, abs=1e-4), "the mean, and its standard error"


def test_what_single_rows_may_say():
    ten, one = torch.full((9,), 1e-3), torch.full((9,), 1e-4)
    exact, infinite = torch.zeros(1), torch.tensor([float("inf")])
    assert at_worst([torch.cat([one, exact])], [torch.cat([ten, exact])]) == pytest.approx(-10, abs=1e-4), (
        "exact in both"
    )
    assert at_worst([torch.cat([one, ten[:1]])], [torch.cat([ten, exact])]) == pytest.approx((-90 + 20) / 10, abs=1e-4)
    assert at_worst([torch.cat([one, infinite])], [torch.cat([ten, exact])]) == float("inf"), (
        "what overflows is the worst"
    )
    for noise in (one, infinite):
        assert at_worst([noise], [infinite[:1].expand_as(noise)]) == -float("inf"), "and no reason not to smooth"


class Head(nn.Module):
    """Outliers, a linear, and something that a user would return of it."""

    def __init__(self, end) -> None:
        super().__init__()
        self.body, self.end = Outliers(), end
        self.score = nn.Linear(48, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> object:
        x = torch.sin(input_ids[..., None] * torch.arange(1.0, 33.0))
        return self.end(self, self.body(x))


ENDS = {
    "a number a token": lambda m, y: m.score(y),
    "a number a token, flat": lambda m, y: m.score(y)[..., 0],
    "rows of zeros": lambda m, y: y * (y.amax(-1, keepdim=True) > y.mean()),
    "a mask": lambda m, y: (y > 0).to(y.dtype),
    "nothing in floating point": lambda m, y: (y.argmax(-1), None),
    "minus infinity": lambda m, y: y.masked_fill(y < 0, float("-inf")),
    "scalar": lambda m, y: {"loss": y.mean(), "hidden": y},
    "half": lambda m, y: [y.half(), (y.bfloat16(), 3)],
    "eight bits": lambda m, y: (y.to(torch.float8_e4m3fn), y),
    "random": lambda m, y: y + torch.rand(len(y), 1, 1),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("end", ENDS)
def test_outputs_of_all_kinds(end, form):
    """Smoothing helps all of these, and none is too odd to be calibrated with padding."""
    ids = [torch.randint(0, 96, (3, 24), generator=torch.Generator().manual_seed(s)) for s in range(4)]
    mask = (torch.arange(24) < torch.tensor([[24], [9], [17]])).long()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = plan_of(Head(ENDS[end]).eval(), [(x, mask) for x in ids], Recipe(), form)
    assert [l.smoothing for l in plan.layers if l.name == "body.fc.weight"] == ["folded"]


def test_random_numbers_decide_nothing():
    torch.manual_seed(0)
    with_random, without = (is_sampled(Head(ENDS[end])) for end in ("random", "scalar"))
    assert without and not with_random


def is_sampled(model: nn.Module) -> bool:
    ids = torch.randint(0, 96, (3, 24))
    gm = trace(model.eval(), as_call(model, ids))
    observer = Observer(gm)
    before = torch.get_rng_state()
    observer.batch([ids])
    torch.set_rng_state(before)
    return bool(observer.sample.calls)


def test_what_cannot_be_compared_stays_smoothed(monkeypatch):
    def fails(*args):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(Sample, "noise", fails)
    with pytest.warns(UserWarning, match="was not compared: OutOfMemoryError: no memory"):
        plan = plan_of(Outliers().eval(), batches(range(2)), Recipe(), "compile")
    assert [l.smoothing for l in plan.layers] == ["folded"]


@pytest.mark.parametrize(
    ("model", "tokens", "runs"),
    [
        (Outliers, 100, [FEW] * 2),
        (Massive, 100, [FEW] * 2 + [2] * 2),  # the sample ends after four, with 1200 rows
        (Outliers, 24, [7] * 2),  # 504 rows
        (Massive, 24, [7] * 2 + [CALLS - 7] * 2),
    ],
)
def test_few_calls_are_enough_where_the_gain_is_clear(model, tokens, runs, monkeypatch):
    """Of either plan: its first calls, and the others where those do not tell."""
    found = []

    def noise(self, quantized, calls):
        found.append(len(self.calls[calls]))
        return run(self, quantized, calls)

    run = Sample.noise
    monkeypatch.setattr(Sample, "noise", noise)
    plan_of(model().eval(), batches(range(CALLS), tokens), Recipe(), "compile")
    assert found == runs


def test_one_quantized_stage_at_a_time(monkeypatch):
    """The second is made when nothing is left of the first, without a garbage collection."""
    stages: list[weakref.ref[Any]] = []

    def noise(self, quantized, calls):
        assert all(ref() is None for ref in stages)
        stages.append(weakref.ref(quantized))
        return run(self, quantized, calls)

    run = Sample.noise
    monkeypatch.setattr(Sample, "noise", noise)
    gc.collect()
    gc.disable()
    try:
        plan_of(Outliers().eval(), batches(range(2)), Recipe(), "compile")
        assert len(stages) == 2 and all(ref() is None for ref in stages)
    finally:
        gc.enable()


def test_stages_are_shown_once(monkeypatch, capsys):
    monkeypatch.setenv("SQCOMPILE_SHOW", "1")
    sqcompile.calibrate(Outliers().eval(), batches(range(2)), progress=False)
    assert "quantized" not in capsys.readouterr().out
