"""Which means are taken off: only what other tokens share, of norms that can give it, and nothing that no dtype holds."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import relative_error, tiny_lm, token_batches
from golden_cases import graph
from shift_cases import far
from torch import nn

import sqcompile
from sqcompile import PlanError, Recipe
from sqcompile.passes.labels.match import match
from sqcompile.passes.planning.choice import Known
from sqcompile.passes.planning.shifts import choose_shifts
from sqcompile.passes.planning.spikes import spikes
from sqcompile.statistics.input_stats import InputStats
from sqcompile.statistics.observe import Calibration


class Conditional(nn.Module):
    """AdaLN: the bias of a norm comes from what stands elsewhere."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.a = nn.Parameter(torch.ones(32)), nn.Linear(32, 48)

    def forward(self, x):
        return self.a(torch.nn.functional.layer_norm(x, (32,), self.weight, 9 + x.mean((0, 1))))


@pytest.mark.parametrize("recipe", ["default", Recipe(0.5, shift=True)])
def test_a_bias_that_is_computed_takes_nothing(recipe):
    model = Conditional()
    data = [(torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(i)),) for i in range(8)]
    compiled = sqcompile.compile(model, data, recipe=recipe, backend="eager", progress=False)
    assert not compiled.plan.shifts
    with torch.no_grad():
        assert relative_error(compiled(*data[0]), model(*data[0])) < 0.02


class Alone(nn.Module):
    """A norm and a linear."""

    def __init__(self, **how):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.a = nn.LayerNorm(64, **how), nn.Linear(64, 48)

    def forward(self, x):
        return self.a(self.norm(x))


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 6, 8, 10, 20])
def test_a_mean_of_few_tokens_by_chance_is_none(tokens):
    data = [(torch.randn(tokens, 64, generator=torch.Generator().manual_seed(tokens)),)]
    assert not sqcompile.calibrate(Alone(), data, recipe=Recipe(shift=True), progress=False).shifts


@pytest.mark.parametrize("tokens", [2, 4, 12])
def test_a_mean_of_few_tokens_that_repeat_is_none(tokens):
    """Of two tokens, what is left is as large by construction, and a static scale too small for any other."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    with torch.no_grad():
        model[0].bias += 5 * torch.randn(64)
    data = [torch.randn(tokens, 1, 64).expand(-1, 128, -1).contiguous()]
    plans = {
        shift: sqcompile.calibrate(model, data, recipe=Recipe(0.5, "per_tensor_static", shift=shift), progress=False)
        for shift in (True, False)
    }
    assert not plans[True].shifts
    x = torch.randn(64, 7, 64)
    with torch.no_grad():
        want = model(x)
        found = [
            relative_error(sqcompile.compile(model, plan=p, backend="eager", progress=False)(x), want)
            for p in plans.values()
        ]
    assert found[0] == found[1]


def test_tokens_that_spike_where_the_mean_is_gone_are_found():
    x = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    x[:, 3] += 12
    x[::200, 9] = 40
    whole = InputStats.empty(x, None)
    whole.update(x, torch.zeros(len(x), dtype=torch.int64), 5, 0)
    c = whole.rows.mean(0)
    less = InputStats.empty(x, None)
    less.update(x - c, torch.zeros(len(x), dtype=torch.int64), 5, 0)
    found, want = spikes(whole.shifted(c)), spikes(less)
    assert spikes(whole) is None and found and want and found.startswith(want.partition(" ")[0])
    assert torch.equal(whole.shifted(c).absmax, less.absmax) and whole.shifted(c).count == 2000


def test_a_norm_without_parameters_stays_one_kernel():
    """Its mean comes from what it reads; a norm with a bias and no weight is none that kernels know."""
    model = Alone(elementwise_affine=False)
    data = [
        (torch.randn(64, 64, generator=torch.Generator().manual_seed(i)) + 30 * (torch.arange(64) % 16 == 3),)
        for i in range(8)
    ]
    operators = []
    for shift in (False, True):
        recipe = Recipe(smooth=False, shift=shift)
        net = sqcompile.compile(model, data, recipe=recipe, backend="eager", progress=False, target="cuda-sm90")
        operators.append([str(n.target) for n in net.stages["lowered"].graph.nodes if n.op == "call_function"])
        assert bool(net.plan.shifts) == shift
    assert operators[0] == operators[1] and any("norm_quantize" in o for o in operators[0])


def test_linears_that_have_seen_other_tokens_are_not_shifted_together():
    """One reads the norm in one graph, and something else in another."""
    stats = {}
    for name, by in (("wa", 0.0), ("wb", 1.0)):
        x = torch.randn(300, 32, generator=torch.Generator().manual_seed(0)) + 9
        stats[name] = InputStats.empty(x, None)
        stats[name].update(x + by, torch.zeros(len(x), dtype=torch.int64), 5, 0)
    gm = graph(
        """
    %x: f32[2, 3, 32] = input
    %n = aten.layer_norm(%x, [32], %g, %b)
    %q = aten.linear(%n, %wa)
    %k = aten.linear(%n, %wb)
    return [%q, %k]
""",
        {"g": [32], "b": [32], "wa": [16, 32], "wb": [16, 32]},
    )
    sites, recipe = match(gm)[0], Recipe(shift=True)
    assert not choose_shifts(gm, sites, Calibration(stats, 1), recipe, Known())
    same = Calibration(dict.fromkeys(stats, stats["wa"]), 1)
    assert choose_shifts(gm, sites, same, recipe, Known()).keys() == stats.keys()


@pytest.mark.parametrize("by", [1e5, 1e9])
def test_shifts_that_no_dtype_holds_are_refused(by):
    model = far(tiny_lm("opt"))
    plan = sqcompile.calibrate(model, token_batches(2), recipe=Recipe(shift=True), progress=False)
    wrong = dataclasses.replace(plan, shifts={n: torch.full_like(c, by) for n, c in plan.shifts.items()})
    with pytest.raises(PlanError, match="must lie in"):
        sqcompile.compile(model, plan=wrong, backend="eager", progress=False)


def test_a_bias_that_overflows_half_precision_is_refused():
    model = far(tiny_lm("opt"))
    plan = sqcompile.calibrate(model, token_batches(2), recipe=Recipe(shift=True), progress=False)
    wrong = dataclasses.replace(plan, shifts={n: torch.full_like(c, 65000.0) for n, c in plan.shifts.items()})
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.Linear):
                m.weight.fill_(1.0)
    with pytest.raises(PlanError, match=r"out of torch\.float16"):
        sqcompile.compile(model.half(), plan=wrong, backend="eager", progress=False)


class Two(nn.Module):
    """A norm far from zero, and two linears that read it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.a, self.b = nn.LayerNorm(64), nn.Linear(64, 48), nn.Linear(64, 32)
        with torch.no_grad():
            self.norm.bias.uniform_(-8, 8)

    def forward(self, x):
        y = self.norm(x)
        return self.a(y), self.b(y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_reader_in_float_costs_the_others_nothing(dtype):
    """What is left of a shift in 16 bits is as coarse as the float reader's own results are."""
    model = Two().to(dtype)
    exact = Two().float()
    exact.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    data = [(torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(i)).to(dtype),) for i in range(4)]
    x = torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(99)).to(dtype)

    def lost(found, want):  # beside what varies between tokens
        return float((found.float() - want).norm() / (want - want.mean((0, 1))).norm())

    errors = {}
    with torch.no_grad():
        want = exact(x.float())
        floats = lost(model(x)[1], want[1])
        for skip in ((), ("b.weight",)):
            net = sqcompile.compile(
                model, data, recipe=Recipe(0.5, shift=True, skip=skip), backend="eager", progress=False
            )
            assert net.plan.shifts.keys() >= {"a.weight"}, skip
            errors[skip] = [lost(y, z) for y, z in zip(net(x), want, strict=True)]
    assert errors[("b.weight",)][0] <= 1.05 * errors[()][0]
    assert errors[("b.weight",)][1] <= 1.3 * floats + 1e-6


def test_a_bias_that_a_reader_in_float_cannot_hold_is_not_asked_of_it():
    model = Two()
    with torch.no_grad():
        model.norm.bias.copy_(1000 * (torch.arange(64) % 2))
        model.b.weight.fill_(3.0)  # W c is 96,000
    data = [(torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(i)),) for i in range(4)]
    recipe = Recipe(0.5, shift=True, skip=("b.weight",))
    assert sqcompile.calibrate(model, data, recipe=recipe, progress=False).shifts
    half = sqcompile.compile(
        model.bfloat16(), [(data[0][0].bfloat16(),)], recipe=recipe, backend="eager", progress=False
    )
    assert half.plan.shifts  # bfloat16 holds it
    plan = sqcompile.calibrate(model.half(), [(x.half(),) for (x,) in data], recipe=recipe, progress=False)
    assert not plan.shifts


@pytest.mark.parametrize(("bias", "shifts"), [(6e4, True), (1e5, False)])
def test_a_mean_that_no_plan_holds_is_not_taken_off(bias, shifts, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64)).eval()
    with torch.no_grad():
        model[0].bias.copy_(3 * torch.randn(32))
        model[0].bias[3] = bias
        model[1].weight[:, 3] *= 1e-5
    data = [torch.randn(4, 16, 32) for _ in range(8)]
    net = sqcompile.compile(model, data, recipe=Recipe(shift=True), backend="eager", progress=False)
    assert bool(net.plan.shifts) == shifts
    net.save(tmp_path / "net")
    assert torch.equal(sqcompile.load(tmp_path / "net", backend="eager")(data[0]), net(data[0]))
