"""options={"model": model}, and what was decided for a model: plan_of, report_of."""

import dataclasses
import gc
import weakref
from unittest import mock

import pytest
import torch
from backend_cases import call, compiled, mlp, outliers, planned, sessions
from torch import nn

import sqcompile
from sqcompile.backend import find_model

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def no_walk():
    """The call stack is not looked at."""

    def fails():
        raise AssertionError("the call stack was walked")

    with mock.patch.object(find_model, "_modules", fails):
        yield


@pytest.mark.parametrize("how", ["module", "weak reference", "what was compiled"])
def test_the_model_that_the_options_name_is_not_looked_for(no_walk, how):
    hidden = [[mlp()]]  # nowhere on the call stack
    plan, reference = planned(hidden[0][0])
    model = hidden[0][0]
    given = {"module": model, "weak reference": weakref.ref(model), "what was compiled": torch.compile(model)}[how]
    del model
    run = torch.compile(
        lambda x: hidden[0][0](x), backend="smoothquant", options={"plan": plan, "compiler": "eager", "model": given}
    )
    x = outliers()[0]
    assert torch.equal(call(run, x), reference(x))
    assert sqcompile.plan_of(hidden[0][0]) == plan


class Counted(nn.Module):
    """A model whose first graph reads buffers alone."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.arange(64.0))
        self.inner = mlp()

    def forward(self, x):
        x = x + self.shift
        torch._dynamo.graph_break()
        return self.inner(x)


def test_a_graph_of_buffers_alone_belongs_to_the_named_model(no_walk):
    model = Counted().eval()
    net = compiled(model, plan=sqcompile.calibrate(model, outliers(), progress=False), model=model)
    x = outliers()[0]
    assert torch.allclose(
        call(net, x), sqcompile.compile(model, outliers(), backend="eager", progress=False)(x), rtol=1e-5
    )
    assert len(sessions(model)) == 1


def test_tensors_of_another_model_are_refused_in_words():
    model, other = mlp(), mlp()
    plan, _ = planned(model)
    with pytest.raises(sqcompile.PlanError, match=r"one of shape .* are none of the model of options"):
        call(compiled(model, plan=plan, model=other), outliers()[0])


@pytest.mark.parametrize("what", ["lm", 3, lambda x: x])
def test_what_is_no_module_is_refused(what):
    with pytest.raises(sqcompile.RecipeError, match=r"option model=.*: pass the nn\.Module"):
        call(compiled(mlp(), model=what), outliers()[0])


def test_a_model_that_is_gone_is_said_to_be():
    model, gone = mlp(), mlp()
    reference = weakref.ref(gone)
    del gone
    gc.collect()
    with pytest.raises(sqcompile.PlanError, match="is gone"):
        call(compiled(model, model=reference), outliers()[0])


def test_sessions_do_not_keep_the_model_that_is_named():
    model = mlp()
    call(compiled(model, plan=planned(model)[0], model=weakref.ref(model)), outliers()[0])
    reference = weakref.ref(model)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert reference() is None


def test_plan_of_and_report_of_say_what_was_decided(tmp_path):
    model = mlp()
    plan, reference = planned(model)
    assert sqcompile.plan_of(reference) is reference.plan and sqcompile.report_of(reference) is reference.report
    net = compiled(model, plan=plan)
    with pytest.raises(sqcompile.StageError, match="no plan yet"):
        sqcompile.plan_of(net)
    call(net, outliers()[0])
    for what in (net, model):
        assert sqcompile.plan_of(what) == plan
        decided = dataclasses.replace(reference.report, gemms=(), seconds={})  # without what is of its graph
        assert str(sqcompile.report_of(what)) == str(decided)


def test_a_model_that_calibrates_itself_has_a_plan_once_it_is_done(tmp_path):
    model = mlp()
    net = compiled(model, calibration_steps=2)
    call(net, outliers()[0])
    with pytest.raises(sqcompile.StageError, match="still calibrates itself: call it until 2 calls"):
        sqcompile.plan_of(net)
    for x in outliers():
        got = call(net, x)
    plan = sqcompile.plan_of(net)
    plan.save(tmp_path / "plan.safetensors")
    again = sqcompile.compile(model, plan=tmp_path / "plan.safetensors", backend="eager", example_inputs=x)
    assert torch.allclose(again(x), got, rtol=1e-5, atol=1e-5)


def test_a_layer_that_is_compiled_alone_has_the_plan_of_its_model():
    model = nn.Sequential(mlp(), mlp())
    plan = sqcompile.calibrate(model, outliers(), progress=False)
    for layer in model:
        layer.compile(backend="smoothquant", options={"plan": plan, "compiler": "eager"})
    call(model, outliers()[0])
    assert sqcompile.plan_of(model[1]) == plan == sqcompile.plan_of(model)


@pytest.mark.parametrize("what", ["model", None, len])
def test_what_has_no_plan_is_refused_in_words(what):
    with pytest.raises(sqcompile.StageError, match="is no module: pass the model"):
        sqcompile.plan_of(what)
