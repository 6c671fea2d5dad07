"""Bad input gets one clear error that names what to do, and leaves the model as it was."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import tiny_lm, token_batches
from torch import nn
from torch.nn import functional as F

import sqcompile
from sqcompile import Recipe


class Net(nn.Module):
    def __init__(self, body=None):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.body = body

    def forward(self, x, flag=None):
        if self.body:
            x = self.body(x)
        return self.fc2(F.relu(self.fc1(self.norm(x))))


def batches():
    return [torch.randn(4, 6, 16) for _ in range(2)]


def fails(error, match, model=None, loader=None, **kwargs):
    model = model or Net().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    training, hooks = model.training, len(model._forward_pre_hooks)
    with pytest.raises(error, match=match) as info:
        sqcompile.compile(model, batches() if loader is None else loader, backend="eager", progress=False, **kwargs)
    assert isinstance(info.value, sqcompile.SQCompileError)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training == training and len(model._forward_pre_hooks) == hooks
    return str(info.value)


def test_empty_loader():
    fails(sqcompile.CalibrationError, "empty: pass at least one batch", loader=[])
    fails(sqcompile.CalibrationError, "never called the model", loader=lambda model: None)


def test_no_data_and_no_plan():
    with pytest.raises(sqcompile.CalibrationError, match="pass calib_loader"):
        sqcompile.compile(Net().eval())


def test_a_loader_that_is_none():
    fails(sqcompile.CalibrationError, r"calib_loader=\[batch\]", loader=torch.randn(4, 6, 16))
    fails(sqcompile.CalibrationError, "iterable of batches or a callable", loader=7)


def test_a_batch_the_model_refuses():
    fails(
        sqcompile.CalibrationError,
        "batch 0 .* does not fit Net.forward.*unexpected keyword",
        loader=[{"x": batches()[0], "y": torch.ones(1)}],
    )
    fails(sqcompile.CaptureError, "cannot be exported.*test_errors.py", loader=[torch.randn(4, 6, 17)])
    fails(
        sqcompile.CalibrationError,
        r"batch 1: .*captured as torch.float32 \[any, any, 16\]",
        loader=[torch.randn(4, 6, 16), torch.randn(4, 6, 17)],
    )
    loader = [{"x": torch.randn(4, 6, 16)}, {"x": torch.randn(4, 6, 16), "flag": torch.ones(1)}]
    fails(sqcompile.CalibrationError, "batch 1: .*captured with the arguments \\(x\\)", loader=loader)


def test_non_finite_activations_name_the_tensor():
    bad = batches()
    bad[1][0, 2, 3] = float("nan")
    fails(sqcompile.CalibrationError, "input of fc1.weight .* not finite in calibration batch 1", loader=bad)


def test_nothing_quantizable_is_an_error_and_no_no_op():
    fails(sqcompile.NothingToQuantizeError, "no linear with a weight", model=nn.Sequential(nn.LayerNorm(16)).eval())
    fails(sqcompile.NothingToQuantizeError, "all 2 linears stay in float.*skip=", recipe=Recipe(skip=("fc*",)))


@pytest.mark.parametrize(
    ("recipe", "match"),
    [("O4", "unknown recipe 'O4': pass one of default, O1, O2, O3"), (3, "unknown recipe 3")],
)
def test_unknown_recipe(recipe, match):
    fails(sqcompile.RecipeError, match, recipe=recipe)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"alpha": 1.5},
        {"alpha": ()},
        {"alpha": float("nan")},
        {"activation": "per_row"},
        {"weight": "per_group"},
        {"skip": "lm_head"},
    ],
)
def test_recipe_values(kwargs):
    with pytest.raises(sqcompile.RecipeError, match=next(iter(kwargs))):
        Recipe(**kwargs)


def test_unknown_backend():
    with pytest.raises(sqcompile.RecipeError, match="inductor, eager"):
        sqcompile.compile(Net().eval(), batches(), backend="tensorrt")


def test_a_model_that_cannot_be_exported_names_the_line():
    def branch(x):
        return x * 2 if x.sum() > 0 else x

    message = fails(sqcompile.CaptureError, "torch.where", model=Net(branch).eval())
    assert "test_errors.py" in message and "x.sum() > 0" in message


def test_training_mode_with_dropout():
    fails(sqcompile.CaptureError, r"training mode .*model.eval\(\)", model=Net(nn.Dropout(0.1)).train())
    sqcompile.compile(Net(nn.Dropout(0.1)).eval(), batches(), backend="eager", progress=False)


def test_a_plan_of_another_model(tmp_path):
    plan = sqcompile.calibrate(tiny_lm("opt"), token_batches(), progress=False)
    with pytest.raises(sqcompile.PlanError, match="calibrate this model"):
        sqcompile.compile(tiny_lm("llama"), plan=plan, backend="eager")
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(sqcompile.PlanError, match="not a sqcompile plan"):
        sqcompile.Plan.load(tmp_path / "junk")


def test_a_call_unlike_the_captured_one():
    compiled = sqcompile.compile(Net().eval(), batches(), backend="eager", progress=False)
    with pytest.raises(sqcompile.CaptureError, match=r"captured with the arguments \(x\), this call has \(x, flag\)"):
        compiled(torch.randn(1, 2, 16), flag=torch.ones(1))
    with pytest.raises(sqcompile.CaptureError, match="does not fit the model's signature"):
        compiled(z=1)


def test_a_device_without_kernels_falls_to_the_reference_with_one_warning(monkeypatch):
    from sqcompile.kernels import x86
    from sqcompile.passes import lower

    monkeypatch.setattr(x86, "available", lambda: False)
    monkeypatch.setattr(lower, "_warned", set())
    torch.manual_seed(0)
    model = Net().eval()
    with pytest.warns(UserWarning, match="no INT8 kernels for cpu.*integer reference") as caught:
        slow = sqcompile.compile(model, batches(), backend="eager", progress=False)
    assert len([w for w in caught if "INT8 kernels" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sqcompile.compile(model, batches(), backend="eager", progress=False)
    monkeypatch.undo()
    fast = sqcompile.compile(model, plan=slow.plan, backend="eager")
    x = torch.randn(3, 5, 16)
    assert torch.allclose(slow(x), fast(x), rtol=1e-5, atol=1e-6)
    assert any("int8_linear.default" in str(n.target) for n in slow.lowered.graph.nodes)


def test_float16_overflow_is_reported():
    model = Net().eval().half()
    with torch.no_grad():
        model.norm.weight.fill_(60000.0)
    fails(
        sqcompile.CalibrationError, "fc1.weight .*float16 overflows", model=model, loader=[torch.randn(4, 6, 16).half()]
    )
