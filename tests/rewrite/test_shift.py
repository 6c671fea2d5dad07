"""What is taken off linears' inputs comes back by their biases: exactly, whoever reads the norm, and only where it helps."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from conftest import relative_error, tiny_lm, token_batches
from expecttest import assert_expected_inline
from golden_cases import before_after, difference, graph, planned
from random_checks import capture
from shift_cases import far
from test_rotation import worst
from torch import nn
from torch.utils import _pytree as pytree

import sqcompile
from sqcompile import PlanError, Recipe
from sqcompile.passes.ir.graph import find_linears
from sqcompile.passes.ir.verify import verify
from sqcompile.passes.labels.match import input_sites, match
from sqcompile.passes.labels.shiftable import shiftable
from sqcompile.passes.rewrite import shift as shift_module
from sqcompile.passes.rewrite.fold import fold
from sqcompile.plan.plan import Plan

C = torch.tensor([8.0, -3.0, 0.5, 0.0])


def shifted(gm, shifts, scales=None):
    sites, refusals = match(gm)
    sites += input_sites(refusals, {l.name for l in find_linears(gm)})
    plan = dataclasses.replace(
        planned(gm, {s.name: scales for s in sites} if scales is not None else {}), shifts=shifts
    )
    return verify(fold(gm, sites, plan, (), shiftable(gm, sites)), "folded")


NORM = """
    %x: f32[2, 3, 4] = input
    %n = aten.layer_norm(%x, [4], %g, %b)
    %q = aten.linear(%n, %wq, %bq)
    %k = aten.linear(%n, %wk)
    return [%q, %k]
"""
TENSORS = {"g": [4], "b": [4], "wq": [6, 4], "bq": [6], "wk": [2, 4]}


def test_a_norm_takes_the_mean_and_the_linears_give_it_back():
    gm = graph(NORM, TENSORS)
    text, after = before_after(lambda g: shifted(g, {"wq": C, "wk": C}), gm)
    assert difference(gm, after) <= 1e-5
    assert_expected_inline(
        text.partition("after:")[2],
        """\

%x: f32[2, 3, 4] = input
%sub_tensor: f32[4] = aten.sub(%b, %shift_0)
%n: f32[2, 3, 4] = aten.layer_norm(%x, [4], %g, %sub_tensor)
%add_tensor: f32[6] = aten.add(%bq, %shift_0_constant)
%q: f32[2, 3, 6] = aten.linear(%n, %wq, %add_tensor)
%k: f32[2, 3, 2] = aten.linear(%n, %wk, %shift_0_constant_2)
return [%q, %k]
""",
    )


def test_the_scale_divides_what_is_left():
    gm = graph(NORM, TENSORS)
    _, after = before_after(lambda g: shifted(g, {"wq": C, "wk": C}, torch.tensor([0.25, 3.0, 0.5, 7.0])), gm)
    assert difference(gm, after) <= 1e-5
    (norm,) = after.graph.find_nodes(op="call_function", target=torch.ops.aten.layer_norm.default)
    assert norm.args[3].target == torch.ops.aten.div.Tensor and norm.args[3].args[0].target == torch.ops.aten.sub.Tensor


@pytest.mark.parametrize(
    "shifts", [{"wq": C}, {"wq": C, "wk": 2 * C}, {"wk": C}], ids=["one of two", "two means", "without a bias"]
)
def test_where_not_all_who_read_a_norm_agree_the_input_is_shifted(shifts):
    gm = graph(NORM, TENSORS)
    for scales in (None, torch.tensor([0.25, 3.0, 0.5, 7.0])):
        _, after = before_after(lambda g, scales=scales: shifted(g, shifts, scales), gm)
        assert difference(gm, after) <= 1e-5
        subtracted = after.graph.find_nodes(op="call_function", target=torch.ops.aten.sub.Tensor)
        assert len(subtracted) == len(shifts)


BODIES = {
    "reshape": ("%r = aten.reshape(%n, [6, 4])\n    %y = aten.linear(%r, %w)", True),
    "clone": ("%r = aten.clone(%n)\n    %y = aten.linear(%r, %w)", True),
    "slice": ("%r = aten.slice(%n, 1, 1)\n    %y = aten.linear(%r, %w)", True),
    "relu": ("%r = aten.relu(%n)\n    %y = aten.linear(%r, %w)", False),
    "mul": ("%r = aten.mul(%n, 2.0)\n    %y = aten.linear(%r, %w)", False),
    "residual": ("%l = aten.linear(%n, %w)\n    %y = aten.add(%n, %l)", False),
    "another reader": ("%l = aten.linear(%n, %w)\n    %s = aten.softmax(%n, -1)\n    %y = aten.add(%l, %s)", False),
    "channels out of order": ("%r = aten.flip(%n, [-1])\n    %y = aten.linear(%r, %w)", False),
}


@pytest.mark.parametrize("body", BODIES)
def test_which_norms_can_be_shifted(body):
    lines, may = BODIES[body]
    gm = graph(
        f"""
    %x: f32[2, 3, 4] = input
    %n = aten.layer_norm(%x, [4], %g, %b)
    {lines}
    return [%y]
""",
        {"g": [4], "b": [4], "w": [4, 4]},
    )
    assert [s.norm for s in shiftable(gm, match(gm)[0])] == (["n"] if may else [])
    _, after = before_after(lambda g: shifted(g, {"w": C}), gm)  # explicitly, where it may not
    assert difference(gm, after) <= 1e-5


@pytest.mark.parametrize("seed", range(12))
def test_random_models_with_random_shifts_fold_exactly(seed):
    c, r = capture(seed), random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    shifts = {}
    for s in shiftable(c.gm, match(c.gm)[0]):
        if r.random() < 0.8:
            shifts |= dict.fromkeys(
                (l.name for l in s.linears), torch.randn(s.linears[0].in_features, generator=generator)
            )
    for l in find_linears(c.gm):
        if not l.experts and (r.random() < 0.5 or not shifts):
            shifts[l.name] = torch.randn(l.in_features, generator=generator)
    assert worst(shifted(c.gm, shifts), c) <= 1e-5


@pytest.mark.parametrize("wrong", ["nothing comes back", "the norm keeps its bias"])
def test_a_wrong_shift_is_caught(wrong, monkeypatch):
    gm = graph(NORM, TENSORS)
    monkeypatch.setattr(shift_module, "_bias" if wrong == "nothing comes back" else "_norm", lambda *_: None)
    _, after = before_after(lambda g: shifted(g, {"wq": C, "wk": C}), gm)
    assert difference(gm, after) > 1e-2


RECIPES = {
    "default": Recipe(shift=True),
    "rotated": Recipe(shift=True, rotate=16),
    "static": Recipe(shift=True, activation="per_tensor_static"),
    "per tensor": Recipe(shift=True, activation="per_tensor", weight="per_tensor"),
    "O3": dataclasses.replace(sqcompile.PRESETS["O3"], attention="none"),
    "unsmoothed": Recipe(shift=True, smooth=False),
}


@pytest.mark.parametrize(
    ("family", "name", "dtype"),
    [
        ("gpt_neox", "default", torch.bfloat16),
        ("opt", "rotated", torch.bfloat16),
        *[("opt", n, torch.float32) for n in RECIPES],
    ],
)
def test_stages_agree_and_shifting_gains(family, name, dtype):
    model, recipe = far(tiny_lm(family)).to(dtype), RECIPES[name]
    x, errors = token_batches(1, (3, 11), seed=9)[0], []
    for how in (recipe, dataclasses.replace(recipe, shift=False)):
        compiled = sqcompile.compile(model, token_batches(16), recipe=how, backend="eager", progress=False)
        with torch.no_grad():
            want, got = (pytree.tree_leaves(f(**x))[0].float() for f in (model, compiled))
            folded, quantized = (pytree.tree_leaves(compiled.stages[s](**x))[0] for s in ("folded", "quantized"))
        assert relative_error(folded, want) < (1e-5 if dtype == torch.float32 else 0.02)
        assert relative_error(got, quantized) < (1e-3 if dtype == torch.float32 else 0.03)
        errors.append(relative_error(got, want))
        assert bool(compiled.plan.shifts) == how.shift
        held = {str(n.target) for n in compiled.stages["quantized"].graph.find_nodes(op="get_attr")}
        assert not held & {l.name for l in compiled.plan.layers if l.quantized}
    if dtype == torch.float32:  # of bfloat16 the model's own roundings are as large
        assert errors[0] < errors[1]


def test_every_reader_of_a_norm_has_its_mean_and_plans_keep_it(tmp_path):
    plan = sqcompile.calibrate(far(tiny_lm("opt")), token_batches(4), recipe=Recipe(shift=True), progress=False)
    plan.save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan") == plan != dataclasses.replace(plan, shifts={})
    names = [n for n in plan.shifts if "layers.0.self_attn" in n]
    assert len(names) == 3 and all(plan.shifts[n] is plan.shifts[names[0]] for n in names)
    assert f"{len(plan.shifts)} linears shifted" in repr(plan)
    said = [l.reason for l in plan.layers if l.name in plan.shifts]
    assert said and all("the mean of its input is taken off" in reason for reason in said)


@pytest.mark.parametrize("wrong", ["no linear", "too long", "infinite", "another model's"])
def test_shifts_that_cannot_be_right_are_refused(wrong, tmp_path):
    model = far(tiny_lm("opt"))
    plan = sqcompile.calibrate(model, token_batches(2), recipe=Recipe(shift=True), progress=False)
    name, c = next(iter(plan.shifts.items()))
    other = {"no linear": {"x": c}, "too long": {name: torch.ones(99)}, "infinite": {name: c + torch.inf}}.get(
        wrong, {}
    )
    if wrong == "another model's":
        with pytest.raises(PlanError, match="calibrate this model"):
            sqcompile.compile(tiny_lm("llama"), plan=plan, backend="eager", progress=False)
        return
    with pytest.raises(PlanError, match="shifts"):
        dataclasses.replace(plan, shifts=plan.shifts | other).save(tmp_path / "plan")


def test_linears_kept_in_float_keep_the_function():
    model = far(tiny_lm("opt"))
    plan = sqcompile.calibrate(model, token_batches(4), recipe=Recipe(shift=True), progress=False)
    some = plan.keep_float("*.0.self_attn.k_proj")
    assert some.shifts.keys() == plan.shifts.keys()
    none = plan.keep_float("*.fc1")
    assert none.shifts.keys() == {n for n in plan.shifts if "fc1" not in n}
    x = token_batches(1, (3, 11), seed=9)[0]
    for p in (some, none):
        compiled = sqcompile.compile(model, plan=p, backend="eager", progress=False)
        with torch.no_grad():
            want, got = (pytree.tree_leaves(f(**x))[0] for f in (model, compiled))
        assert relative_error(got, want) < 0.05


def batches(count):
    return [(torch.randn(64, 32, generator=torch.Generator().manual_seed(i)),) for i in range(count)]


def check_behind_a_break(model, plan, x):
    """A graph without the norm gives what the whole one does."""
    torch._dynamo.reset()
    net = torch.compile(model, backend="smoothquant", options={"plan": plan})
    whole = sqcompile.compile(model, plan=plan, backend="eager", progress=False)
    with torch.no_grad():
        got, want, exact = (f(*x) for f in (net, whole, model))
    assert relative_error(got, want) < 1e-3 and relative_error(got, exact) < 0.05


class Broken(nn.Module):
    """A norm behind which Dynamo breaks the graph."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.a, self.b = nn.LayerNorm(32), nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x):
        y = self.norm(x)
        torch._dynamo.graph_break()
        return self.b(torch.relu(self.a(y)))


@pytest.mark.parametrize("activation", ["per_token", "per_tensor_static"])
def test_a_graph_that_has_not_the_norm_shifts_the_input(activation):
    model, data = far(Broken()), batches(20)
    plan = sqcompile.calibrate(model, data, recipe=Recipe(shift=True, activation=activation), progress=False)
    assert [*plan.shifts] == ["a.weight"]
    check_behind_a_break(model, plan, data[0])


@pytest.mark.parametrize("recipe", [Recipe(shift=True), Recipe(shift=True, activation="per_tensor_static")])
def test_a_backend_that_calibrates_itself_shifts_as_compile_does(recipe):
    model, data = far(tiny_lm("opt")), token_batches(8)
    torch._dynamo.reset()
    net = torch.compile(model, backend="smoothquant", options={"recipe": recipe, "calibration_steps": 8})
    with torch.no_grad():
        for x in [*data, data[0]]:
            net(**x)
        plan = sqcompile.plan_of(model)
        want = sqcompile.calibrate(model, data, recipe=recipe, progress=False)
        assert plan.shifts.keys() == want.shifts.keys()
        assert all(torch.allclose(plan.shifts[n], want.shifts[n], atol=1e-5) for n in plan.shifts)
        x = token_batches(1, (3, 11), seed=9)[0]
        got, exact = (pytree.tree_leaves(f(**x))[0] for f in (net, model))
    assert relative_error(got, exact) < 0.1


class Parts(nn.Module):
    """A norm that two linears read, behind a break of the graph."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.a, self.b = nn.LayerNorm(32), nn.Linear(32, 48), nn.Linear(32, 48)

    def forward(self, x):
        y = self.norm(x)
        torch._dynamo.graph_break()
        return self.a(y) * self.b(y)


@pytest.mark.parametrize("kept", ["a", "b"])
def test_linears_in_float_beside_others_that_a_graph_shifts_itself(kept):
    model, data = far(Parts()), batches(8)
    plan = sqcompile.calibrate(model, data, recipe=Recipe(shift=True), progress=False).keep_float(kept)
    assert {*plan.shifts} == {"a.weight", "b.weight"}
    check_behind_a_break(model, plan, data[0])


def test_graphs_of_one_model_share_what_is_added_when_the_float_weights_are_gone():
    model = far(Broken()).bfloat16()
    data = [(x.bfloat16(),) for (x,) in batches(8)]
    plan = sqcompile.calibrate(model, data, recipe=Recipe(shift=True), progress=False)
    assert [*plan.shifts] == ["a.weight"]
    want = sqcompile.compile(model, plan=plan, backend="eager", progress=False)(*data[0])
    torch._dynamo.reset()
    net = torch.compile(model, backend="smoothquant", options={"plan": plan, "free_float": True}, dynamic=False)
    with torch.no_grad():
        got, less = net(*data[0]), net(data[0][0][:8])  # another graph, of the same INT8 weights
    assert bool(model.a.weight.isnan().all())
    assert relative_error(got, want) < 1e-2 and relative_error(less, want[:8]) < 1e-2
