"""Smoothing is left out where it makes the outputs of the whole model worse, whatever each layer's own error says."""

from __future__ import annotations

import pytest
import torch
from backend_cases import session
from torch import Tensor, nn

import sqcompile
from sqcompile import Recipe
from sqcompile.passes.end_to_end import CALLS, ROWS, Sample, at_worst

WHY = "smoothing would make the outputs of the whole model worse"
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


def plan_of(model: nn.Module, batches: list[Tensor], recipe: Recipe, form: str) -> sqcompile.Plan:
    if form == "compile":
        return sqcompile.calibrate(model, batches, recipe=recipe, progress=False)
    torch._dynamo.reset()
    options = {"recipe": recipe, "calibration_steps": len(batches), "compiler": "eager"}
    net = torch.compile(model, backend="smoothquant", options=options)
    with torch.no_grad():
        for x in [*batches, batches[0]]:
            net(x)
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
    sample.add([outputs], [outputs], lambda i, y: keep)
    return sample


def test_a_sample_is_bounded():
    sample = Sample()
    for _ in range(CALLS + 2):
        rows_of(torch.randn(1, 3, 8), sample)
    assert len(sample.calls) == CALLS
    many = rows_of(torch.randn(2, 3 * ROWS, 8))
    assert many.rows <= ROWS and len(many.calls[0].rows[0][0]) == many.rows
    assert not rows_of(torch.zeros(2**12, 2**13)).calls, "arguments of 128 MB are not copied"


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
        sample.add([hidden], outputs, lambda i, y: None)
        assert [list(call.rows) for call in sample.calls] == ([positions] if positions else [])


def test_few_calls_that_disagree_tell_little():
    ten, one = torch.full((4,), 1e-3), torch.full((4,), 1e-4)
    alike = at_worst([[one], [one], [one]], [[ten], [ten], [ten]])
    assert alike == pytest.approx(-10, abs=1e-4)
    apart = at_worst([[one], [ten], [ten]], [[ten], [ten], [ten]])
    assert apart == pytest.approx(-10 / 3 + 10 / 3, abs=1e-4), "the mean, and its standard error"
    assert at_worst([[one, ten[:1]]], [[ten, ten[:1]]]) == pytest.approx(-8, abs=1e-4), "each row counts as much"


def test_stages_are_shown_once(monkeypatch, capsys):
    monkeypatch.setenv("SQCOMPILE_SHOW", "1")
    sqcompile.calibrate(Outliers().eval(), batches(range(2)), progress=False)
    assert "quantized" not in capsys.readouterr().out
