"""A plan looked at and changed by hand: its worst linears, and some of them left in float."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from conftest import relative_error
from plan_cases import Attend, dynamic_plan, static_plan
from torch import Tensor, nn

import sqcompile
from sqcompile import Plan, PlanError, Recipe
from sqcompile.plan.edit import KEPT
from sqcompile.plan.entries import LayerPlan

RECIPE = Recipe(alpha=0.5, skip=("head",))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate_proj, self.up_proj = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(16, 24)
        self.down_proj = nn.Linear(24, 16)
        with torch.no_grad():  # outliers, so that smoothing helps
            self.norm.weight[3] = 30.0
            self.up_proj.weight[5] *= 30.0

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down_proj(torch.sigmoid(self.gate_proj(h)) * self.up_proj(h))


class Gated(nn.Module):
    """Two gated MLPs, and a head that the recipe skips."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.Sequential(Layer(), Layer()), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


def batches(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 40, 16, generator=generator) for _ in range(2)]


@pytest.fixture(scope="module")
def gated() -> tuple[nn.Module, Plan]:
    torch.manual_seed(0)
    model = Gated().eval()
    return model, sqcompile.calibrate(model, batches(), recipe=RECIPE, progress=False)


def compiled(model: nn.Module, plan: Plan) -> sqcompile.CompiledModel:
    return sqcompile.compile(model, plan=plan, backend="eager", progress=False)


def decided(plan: Plan) -> list[LayerPlan]:
    """What the linears' entries say but for how it came to it, and how it was measured."""
    return [dataclasses.replace(l, reason="", loss=None, sqnr_db=None) for l in plan.layers]


@pytest.mark.parametrize("names", ["down_proj", "layers.1.down*", ["gate_proj", "up_proj"]])
def test_whole_sites_in_float_are_what_a_recipe_that_skips_them_gives(
    names: Any, gated: tuple[nn.Module, Plan]
) -> None:
    model, plan = gated
    kept = plan.keep_float(names)
    skip = ((names,) if isinstance(names, str) else tuple(names)) + RECIPE.skip
    want = sqcompile.calibrate(model, batches(), recipe=dataclasses.replace(RECIPE, skip=skip), progress=False)
    assert decided(kept) == decided(want) and kept.recipe == plan.recipe and plan.keep_float([*skip]) == kept != plan
    assert kept.scales.keys() == want.scales.keys() and kept.columns.keys() == want.columns.keys()
    for site, s in kept.scales.items():
        assert torch.equal(s, want.scales[site]) and torch.equal(s, plan.scales[site])
    x = batches(7)[0]
    assert torch.equal(compiled(model, kept)(x), compiled(model, want)(x))


def test_what_shares_a_site_keeps_its_scale_and_its_int8_weight(gated: tuple[nn.Module, Plan]) -> None:
    model, plan = gated
    name = "layers.0.gate_proj.weight"
    kept = plan.keep_float(name)
    assert [l.name for l in kept.layers if l.reason == KEPT] == [name] and kept.scales == plan.scales
    kept.check()
    before, after = compiled(model, plan), compiled(model, kept)
    tensors = dict(before.stages["quantized"].named_buffers())
    same = {n: t for n, t in after.stages["quantized"].named_buffers() if n.endswith("_int8")}
    assert len(same) == sum(l.quantized for l in plan.layers) - 1
    assert all(torch.equal(t, tensors[n]) for n, t in same.items())
    x = batches(7)[0]
    assert relative_error(after.stages["folded"](x), model(x)) <= 1e-5
    assert relative_error(after(x), after.stages["quantized"](x)) <= 1e-5
    assert name in str(after.report) and KEPT in str(after.report)


class Waves(nn.Module):
    """Linears that read one tensor which cannot be smoothed, so that it is multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sin(x) * torch.linspace(0.1, 9, 16)
        return self.d(torch.tanh(self.a(h)) * self.b(h) + self.c(h))


@pytest.mark.parametrize("names", ["a", "b", ["a", "c"]])
@pytest.mark.parametrize("recipe", [Recipe(0.5), Recipe("auto", activation="per_tensor_static", rotate="auto")])
def test_an_input_that_is_multiplied_for_what_is_left(names: Any, recipe: Recipe) -> None:
    torch.manual_seed(0)
    model = Waves().eval()
    plan = sqcompile.calibrate(model, batches(), recipe=recipe, progress=False)
    kept, x = plan.keep_float(names), batches(7)[0]
    left = [n for n in "abc" if n not in names]
    assert kept.scales.keys() - plan.scales.keys() == {"input -> " + ", ".join(f"{n}.weight" for n in left)}
    net = compiled(model, kept)
    assert relative_error(net.stages["folded"](x), model(x)) <= 1e-5
    assert relative_error(net(x), net.stages["quantized"](x)) <= 1e-5
    assert kept.evidence is not None
    sites = {i.site for i in kept.evidence.inputs if i.site}
    assert sites <= {"a.weight", *kept.scales} | {i.site for i in plan.evidence.inputs} - (  # type: ignore[union-attr]
        plan.scales.keys() - kept.scales.keys()
    )


@pytest.mark.parametrize("names", ["v", "mlp", ["q", "k"]])
def test_attentions_run_on(names: Any) -> None:
    torch.manual_seed(0)
    model = Attend().eval()
    x = torch.randn(2, 9, 32)
    for plan in (dynamic_plan(), static_plan()):
        kept = plan.keep_float(names)
        net = sqcompile.compile(model, plan=kept, backend="eager", progress=False, target="reference")  # rounds alike
        assert kept.attention == plan.attention and kept.heads.keys() == plan.heads.keys()
        assert relative_error(net(x), net.stages["quantized"](x)) <= 1e-5
        assert relative_error(net.stages["folded"](x), model(x)) <= 1e-5


def test_the_worst_linears_come_first(gated: tuple[nn.Module, Plan]) -> None:
    plan = gated[1]
    by_db = plan.worst(3)  # α is given, so that no gradients were taken
    every = sorted((l for l in plan.layers if l.quantized), key=lambda l: l.sqnr_db or 0)
    assert list(by_db) == every[:3] and len(plan.worst(100)) == 6 and plan.worst(0) == ()
    losses = [float(i) if l.quantized else None for i, l in enumerate(plan.layers)]
    felt = dataclasses.replace(
        plan, layers=tuple(dataclasses.replace(l, loss=x) for l, x in zip(plan.layers, losses, strict=True))
    )
    assert [l.loss for l in felt.worst(2)] == [5.0, 4.0] and [l.name for l in felt.worst(3, by="sqnr")] == [
        l.name for l in by_db
    ]
    kept = plan.keep_float(plan.worst(2))
    assert {l.name for l in kept.layers if l.reason == KEPT} == {l.name for l in every[:2]}
    for wrong in ({"n": -1}, {"n": 2.0}, {"by": "alpha"}):
        with pytest.raises(PlanError, match="worst"):
            plan.worst(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("up_prj", r"'up_prj' names no linear of this plan: the nearest names are up_proj"),
        (
            ["head", "layers.7.up_proj"],
            r"'layers.7.up_proj' names no linear.*layers.1.up_proj",
        ),
        ("xyz", r"'xyz' names no linear of this plan: its linears are layers.0: gate_proj, .*, \.\.\."),
        ("*", "would leave every linear in float: name fewer"),
        ([], "pass names or patterns of linears"),
        (3, "pass names or patterns of linears"),
        ([None], "pass names or patterns of linears"),
    ],
)
def test_what_names_nothing_is_refused_with_the_nearest_names(
    names: Any, message: str, gated: tuple[nn.Module, Plan]
) -> None:
    with pytest.raises(PlanError, match=message):
        gated[1].keep_float(names)


def test_an_edited_plan_is_saved_and_linears_in_float_stay_as_they_were(
    tmp_path: Any, gated: tuple[nn.Module, Plan]
) -> None:
    plan = gated[1]
    kept = plan.keep_float(["head", "up_proj"])
    head = next(l for l in kept.layers if l.name == "head.weight")
    assert head in plan.layers  # it was in float, with its own reason
    kept.save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan") == kept != plan
    edited = kept.keep_float("layers.0.down_proj")  # whose up_proj, in float already, is not divided any more
    edited.save(tmp_path / "edited")
    for plan in (edited, Plan.load(tmp_path / "edited")):
        assert plan.evidence is not None
        assert [i.undivided for i in plan.evidence.inputs if i.undivided] == [("layers.0.up_proj.weight",)]


def test_evidence_of_linears_in_float_is_as_the_recipe_that_skips_them_makes_it(gated: tuple[nn.Module, Plan]) -> None:
    model, plan = gated
    kept = plan.keep_float("*.down_proj")
    want = sqcompile.calibrate(
        model, batches(), recipe=dataclasses.replace(RECIPE, skip=("head", "*.down_proj")), progress=False
    )
    for edited, made in ((kept, want), (plan, plan)):
        assert edited.evidence is not None and made.evidence is not None
        found, wanted = ({i.linears: i for i in p.evidence.inputs if p.evidence} for p in (edited, made))
        assert found.keys() == wanted.keys()
        for names, i in found.items():
            of = wanted[names]
            if edited is kept and not any("down_proj" in n for n in names):  # up_proj's rows are not divided any more
                assert i.undivided == tuple(n for n in names if "up_proj" in n)
                continue
            assert i.undivided == ()
            assert (i.site, i.clipped, i.zeros, i.ratio, i.tops) == (of.site, of.clipped, of.zeros, of.ratio, of.tops)
            for name in ("absmax", "values", "heat"):
                assert torch.equal(getattr(i, name), getattr(of, name)), (names, name)
            assert torch.equal(i.codes, of.codes)


def test_an_input_of_linears_in_float_and_in_int8_is_told_by_those_in_int8(gated: tuple[nn.Module, Plan]) -> None:
    kept = gated[1].keep_float("layers.0.gate_proj")
    assert kept.evidence is not None
    assert ("layers.0.up_proj.weight", "layers.0.gate_proj.weight") in [i.linears for i in kept.evidence.inputs]
