"""torch.compile(backend="smoothquant"): one weight, one attention, one model used several times, in graphs of their own."""

from __future__ import annotations

import dataclasses
import gc
import warnings

import pytest
import torch
from backend_cases import call, compiled, mlp, outliers, planned, session, sessions
from conftest import relative_error
from torch import nn
from torch.nn import functional as F

import sqcompile
from sqcompile.passes.ir.graph import Linear
from sqcompile.passes.planning.uses import as_used
from sqcompile.plan.recipe import resolve_recipe

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

D = 32


class Twice(nn.Module):
    """One linear behind two norms, whose outputs are ``apart`` times as large; ``cut`` breaks the graph between."""

    def __init__(self, apart=2500.0):
        super().__init__()
        self.n1, self.n2, self.l = nn.LayerNorm(D), nn.LayerNorm(D), nn.Linear(D, D, bias=False)
        self.cut = False
        with torch.no_grad():
            self.n2.weight.mul_(apart**0.5)
            self.n1.weight.div_(apart**0.5)
            self.n1.weight[3] *= 20
            self.n2.weight[7] *= 20

    def forward(self, x):
        y = self.l(self.n1(x))
        if self.cut:
            torch._dynamo.graph_break()
        return y, self.l(self.n2(x))


class Block(nn.Module):
    """An encoder layer that is called three times, as ALBERT's; its inputs grow from call to call."""

    def __init__(self):
        super().__init__()
        self.norm, self.q, self.k, self.v, self.o = nn.LayerNorm(D), *(nn.Linear(D, D) for _ in range(4))

    def forward(self, x):
        h = self.norm(x) * x.abs().amax()
        q, k, v = (z.unflatten(-1, (4, -1)).transpose(1, 2) for z in (self.q(h), self.k(h), self.v(h)))
        return x + self.o(F.scaled_dot_product_attention(q * 0.2, k, v).transpose(1, 2).flatten(2))


class Albert(nn.Module):
    def __init__(self, cut=False):
        super().__init__()
        self.layer, self.cut = Block(), cut

    def forward(self, x):
        for i in range(3):
            if self.cut and i:
                torch._dynamo.graph_break()
            x = self.layer(x)
        return x


def make(kind, *args):
    torch.manual_seed(0)
    return kind(*args).eval()


def inputs(n=3):
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(n, 2, 16, D, generator=generator))


@pytest.mark.parametrize("recipe", ["default", "O3"])
@pytest.mark.parametrize("apart", [1.0, 2500.0])
@pytest.mark.parametrize("old", [False, True])
def test_two_uses_of_a_weight_with_a_graph_break_between(recipe, apart, old, tmp_path):
    model = make(Twice, apart)
    plan = sqcompile.calibrate(model, inputs(), recipe=recipe, progress=False)
    assert [l.name for l in plan.layers] == ["l.weight", "l.weight#2"]
    if old:
        plan.save(tmp_path / "plan")
        plan = sqcompile.Plan.load(tmp_path / "plan")
    x = inputs()[0]
    want = call(model, x)
    for model.cut in (False, True):
        torch._dynamo.reset()
        for got, expected in zip(call(compiled(model, plan=plan), x), want, strict=True):
            assert relative_error(got, expected) < 0.05, model.cut


def test_two_uses_calibrate_apart_from_each_other():
    model = make(Twice, 1.0)
    model.cut = True
    net = compiled(model, recipe="O3", calibration_steps=2)
    for x in inputs():
        got = call(net, x)
    for y, want in zip(got, call(model, inputs()[2]), strict=True):
        assert 1e-6 < relative_error(y, want) < 0.03


def layers(*fields):
    made = sqcompile.calibrate(make(Twice), inputs(1), recipe="O3", progress=False)
    names = ["l.weight", "l.weight#2"]
    return dataclasses.replace(
        made,
        layers=tuple(dataclasses.replace(made.layers[0], name=n, **f) for n, f in zip(names, fields, strict=True)),
        columns={n: torch.full((D,), float(2 + i)) for i, n in enumerate(names)},
    )


def test_what_all_uses_of_a_weight_have_in_common():
    def one(plan):
        [layer] = (used := as_used(plan, [linear], [])).layers
        return layer, used.columns

    linear = Linear("l.weight", "linear", "x", "w", None, D, D)
    smoothed = {"smoothing": "folded", "quantized": True}
    layer, columns = one(layers({**smoothed, "input_scale": 0.1}, {**smoothed, "input_scale": 0.15}))
    assert (layer.quantized, layer.smoothing, layer.input_scale) == (True, "multiplied", 0.15)
    assert torch.equal(columns["l.weight"], torch.full((D,), 3.0)), "the larger divides both"
    layer, _ = one(layers({**smoothed, "input_scale": 0.1}, {**smoothed, "input_scale": 0.5}))
    assert layer.quantized and layer.input_scale is None, "measured at run time"
    layer, columns = one(layers({**smoothed, "input_scale": 0.1}, {"smoothing": "none", "input_scale": 0.1}))
    assert (layer.quantized, layer.smoothing, layer.input_scale, columns) == (True, "none", None, {})
    layer, _ = one(layers({**smoothed, "input_scale": 0.1}, {"quantized": False, "reason": "skipped"}))
    assert not layer.quantized and "skipped" in layer.reason
    plan = layers(smoothed, smoothed)
    assert as_used(plan, [linear, dataclasses.replace(linear, name="l.weight#2")], []) is plan


ATTENTION = dataclasses.replace(resolve_recipe("O3"), attention="qk_pv")


@pytest.mark.parametrize("how", ["whole", "cut", pytest.param("its layer compiled alone", marks=pytest.mark.slow)])
@pytest.mark.parametrize("recipe", ["default", pytest.param(ATTENTION, id="O3 with attention")])
def test_a_layer_that_is_called_several_times(how, recipe):
    model = make(Albert)
    plan, reference = planned(model, inputs(), recipe=recipe)
    x = inputs()[0]
    want, bound = call(model, x), 0.02 if recipe == "default" else 0.05  # static scales leave room for unseen tokens
    assert relative_error(reference(x), want) < bound
    model.cut = how == "cut"
    if how == "its layer compiled alone":
        model.layer.compile(backend="smoothquant", options={"plan": plan, "compiler": "eager"})
        got = call(model, x)
    else:
        got = call(compiled(model, plan=plan), x)
    assert 1e-6 < relative_error(got, want) < bound


def test_a_layer_with_breaks_between_its_calls_calibrates():
    model = make(Albert, True)
    net = compiled(model, recipe=ATTENTION, calibration_steps=3)
    for x in (*inputs(), *inputs()):
        got = call(net, x)
    assert session(model).plan is not None
    assert 1e-6 < relative_error(got, call(model, inputs()[2])) < 0.05


@pytest.mark.parametrize("recipe", ["default", "O3"])
def test_parts_of_one_weight_in_graphs_of_their_own(recipe):
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.tall = nn.Parameter(torch.randn(3 * D, D) / 5), nn.Parameter(torch.randn(D, 3 * D) / 5)

        def forward(self, x, y):
            a, b = F.linear(x, self.w[:D]), F.linear(x, self.tall[:, :D])
            torch._dynamo.graph_break()
            return a, b, F.linear(y, self.w[D:]), F.linear(y, self.tall[:, D:].reshape(-1, D))

    model, (x, y, _) = make(Parts), inputs()
    for how in ({"calibration_steps": 1, "recipe": recipe}, {}):
        torch._dynamo.reset()
        if not how:
            how = {"plan": sqcompile.calibrate(model, [(x, y * 100)], recipe=recipe, progress=False)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net = compiled(model, **how)
            call(net, x, y * 100)
            for got, want in zip(call(net, x, y * 100), call(model, x, y * 100), strict=True):
                assert relative_error(got, want) < 0.03


def test_a_head_that_a_break_puts_alone_stays_in_float_without_a_word(recwarn):
    class LM(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.n, self.a, self.b = nn.Embedding(48, D), nn.LayerNorm(D), nn.Linear(D, 48), nn.Linear(48, D)
            self.lm_head = nn.Linear(D, 48, bias=False)

        def forward(self, ids):
            x = self.e(ids)
            x = x + self.b(F.relu(self.a(self.n(x))))
            torch._dynamo.graph_break()
            return self.lm_head(x)

    model, ids = make(LM), torch.randint(0, 48, (2, 9), generator=torch.Generator().manual_seed(0))
    net = compiled(model, calibration_steps=2)
    for _ in range(4):
        got = call(net, ids)
    assert 1e-6 < relative_error(got, call(model, ids)) < 0.03
    layers = {l.name: l for l in session(model).plan.layers}
    assert "back to the vocabulary" in layers["lm_head.weight"].reason
    assert not [w for w in recwarn if "FLOAT" in str(w.message)]


def test_what_no_call_reached_while_it_calibrated_runs_in_float_with_one_warning():
    class Seeing(nn.Module):
        """Text, and now and then an image beside it."""

        def __init__(self):
            super().__init__()
            self.tower, self.project, self.text, self.block = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D), Block()

        def forward(self, x, image=None):
            if image is not None:
                x = torch.cat([self.block(self.project(torch.tanh(self.tower(image)))), x], 1)
            return self.text(x)

    model, (x, image, _) = make(Seeing), inputs()
    net = compiled(model, calibration_steps=2, recipe=sqcompile.Recipe(attention="qk"))
    for _ in range(3):
        call(net, x)
    with pytest.warns(UserWarning, match=r"project\.weight.*calibration_steps=2.*run in FLOAT.*or pass a plan") as told:
        got = call(net, x, image)
    assert 1e-6 < relative_error(got, call(model, x, image)) < 0.03
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(net, x.clone(), image[:1].expand(2, -1, -1))
    assert len([w for w in told if "FLOAT" in str(w.message)]) == 1
    torch._dynamo.reset()
    plan = sqcompile.calibrate(model, [x], progress=False)
    with pytest.raises(sqcompile.PlanError, match="calibrate this model"):
        call(compiled(model, plan=plan), x, image)


class Pipeline(nn.Module):
    """Owns a model, as a trainer does."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def serve(self, net, x):
        return call(net, x)


class Box:
    """Something that is not found on the call stack."""


@pytest.mark.parametrize("first", ["pipeline", "alone"])
def test_a_model_called_in_several_places_is_one_session(first):
    box = Box()
    box.inner = Box()
    box.inner.net = compiled(mlp(), calibration_steps=2)
    box.inner.pipeline = Pipeline(box.inner.net._orig_mod)

    def in_a_pipeline():
        for x in outliers():
            box.inner.pipeline.serve(box.inner.net, x)

    def alone():
        for x in outliers():
            got = call(box.inner.net, x, 1.0)  # another graph
        return got

    for run in (in_a_pipeline, alone) if first == "pipeline" else (alone, in_a_pipeline):
        run()
    model = box.inner.net._orig_mod
    assert len(sessions(model)) == 1 and not sessions(box.inner.pipeline)
    keeps = [{id(w) for b in r.bound for w in b.keep} for r in session(model).runners]
    assert len(keeps) == 2 and keeps[0] == keeps[1] and len(keeps[0]) == 2
    box.inner.pipeline = None
    gc.collect()
    x = outliers()[0]
    assert not torch.equal(call(box.inner.net, x), call(model, x)), "still in INT8"


def test_two_ways_to_compile_one_model_are_one_session():
    model = mlp()
    options = {"calibration_steps": 2, "compiler": "eager"}
    net = compiled(model, calibration_steps=2)

    @torch.compile(backend="smoothquant", options=options)
    def twice(x):
        return model(x) * 2

    for x in outliers():
        call(net, x)
        call(twice, x)
    assert len(sessions(model)) == 1 and session(model).plan is not None
    assert {len(r.bound) for r in session(model).runners} == {1}
    x = outliers()[0]
    assert torch.allclose(call(twice, x), call(net, x) * 2)
