"""What no scale can be made of: weights that are not finite, and inputs that calibration never saw move."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from backend_cases import call, compiled
from conftest import relative_error
from torch import nn

import sqcompile
from sqcompile import Recipe
from sqcompile.passes.planning.sqnr import relative, sqnr_db

STATIC = Recipe(activation="per_tensor_static")


def mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.LayerNorm(32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)
    return nn.Sequential(*layers).eval().to(dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"])
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_parameter_that_is_not_finite_is_named(name, bad):
    model = mlp(torch.bfloat16 if name == "3.weight" else torch.float16 if name == "1.bias" else torch.float32)
    x = torch.randn(2, 9, 32, dtype=model[0].weight.dtype)
    plan = sqcompile.calibrate(model, [x], progress=False)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = bad
    what = "NaN" if math.isnan(bad) else "an infinity"
    for again in (
        lambda: sqcompile.compile(model, [x], backend="eager", progress=False),
        lambda: sqcompile.calibrate(model, [x], progress=False),
        lambda: sqcompile.compile(model, plan=plan, backend="eager"),
    ):
        with pytest.raises(sqcompile.WeightError, match=rf"^{name} holds {what} at \["):
            again()


def test_the_backend_names_a_weight_that_is_not_finite():
    model, x = mlp(), torch.randn(2, 9, 32)
    plan = sqcompile.calibrate(model, [x], progress=False)
    with torch.no_grad():
        model[3].weight[0, 3] = math.inf
    for options in ({"plan": plan}, {"recipe": "default", "calibration_steps": 1}):
        torch._dynamo.reset()
        with pytest.raises(sqcompile.WeightError, match=r"3\.weight holds an infinity"):
            call(compiled(model, **options), x)


def test_a_linear_in_float_may_hold_infinities():
    model, x = mlp(), torch.randn(2, 9, 32)
    with torch.no_grad():
        model[3].bias[0] = -math.inf  # a class that never comes
    net = sqcompile.compile(model, [x], recipe=Recipe(skip=("3",)), backend="eager", progress=False)
    assert net(x)[..., 0].isinf().all() and net(x)[..., 1:].isfinite().all()


def test_silent_inputs_get_no_static_scale():
    """The second linear sees relu of the first one's bias, the same for all tokens."""
    with pytest.raises(
        sqcompile.NothingToQuantizeError, match=r"1.weight: its input was zero in all 18 calibration tokens"
    ):
        sqcompile.compile(mlp(), [torch.zeros(2, 9, 32)], recipe="O3", backend="eager", progress=False)
    with pytest.raises(
        sqcompile.NothingToQuantizeError, match=r"3.weight: its input was the same in all 18 calibration"
    ):
        sqcompile.compile(mlp(), [torch.zeros(2, 9, 32)], recipe="O3", backend="eager", progress=False)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.loud, self.silent = nn.Linear(32, 32), nn.Linear(16, 32)

    def forward(self, x, y):
        return self.loud(x) + self.silent(y)


@pytest.mark.parametrize("recipe", [STATIC, "default"])
@torch.no_grad()
def test_a_silent_input_beside_a_loud_one(recipe):
    torch.manual_seed(0)
    model = Two().eval()
    data = {"x": torch.randn(8, 16, 32), "y": torch.zeros(8, 16, 16)}
    net = sqcompile.compile(model, [data], recipe=recipe, backend="eager", progress=False)
    loud, silent = net.report.layers
    assert loud.quantized and loud.sqnr_db > 30 and silent.sqnr_db is None
    assert silent.quantized == (recipe == "default")
    assert "zero in all 128 calibration tokens" in silent.reason
    data["y"] = torch.randn(8, 16, 16)
    assert relative_error(net(**data), model(**data)) < 0.02


class Heads(nn.Module):
    """Attention of two heads; ``dead`` rows of the values' projection give nothing while ``x[..., 0]`` is zero."""

    def __init__(self, dead: slice):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32, bias=False) for _ in range(4))
        with torch.no_grad():
            self.v.weight[dead, 1:] = 0

    def forward(self, x):
        q, k, v = (f(x).view(*x.shape[:2], 2, 16).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("dead", [slice(5, 6), slice(16, 32)])
@torch.no_grad()
def test_a_silent_channel_or_head_of_values_gets_the_scale_of_the_others(dead):
    torch.manual_seed(0)
    model, x = Heads(dead).eval(), torch.randn(4, 64, 32)
    x[..., 0] = 0
    recipe = Recipe(activation="per_tensor_static", attention="qk_pv", smooth=False)
    net = sqcompile.compile(model, [x], recipe=recipe, backend="eager", progress=False)
    scale = net.plan.heads[f"{net.plan.attention[0].name}/value_scale"].flatten()
    assert scale.min() > 0.1 * scale.median()
    x = torch.randn(4, 64, 32)
    assert relative_error(net(x), model(x)) < 0.05


def test_attention_of_silent_keys_stays_in_float():
    torch.manual_seed(0)
    model = Heads(slice(0)).eval()
    with torch.no_grad():
        model.k.weight.zero_()
    recipe = Recipe(activation="per_tensor_static", attention="qk")
    net = sqcompile.compile(model, [torch.randn(4, 64, 32)], recipe=recipe, backend="eager", progress=False)
    (attention,) = net.report.attention
    assert attention.quantized == "none" and "keys were zero in all 256 calibration tokens" in attention.reason


def test_an_error_that_is_not_finite_is_no_small_one():
    assert relative(0.0, 2.0) == 0 and relative(1.0, 2.0) == 0.5 and relative(0.0, 0.0) == 0
    for noise, signal in ((1.0, 0.0), (math.nan, 1.0), (1.0, math.nan), (math.inf, math.inf), (0.0, math.nan)):
        assert relative(noise, signal) == math.inf
    assert sqnr_db(0.0, "x") == math.inf and sqnr_db(0.01, "x") == pytest.approx(20)
    with pytest.raises(sqcompile.CalibrationError, match="the outputs of w are beyond float32"):
        sqnr_db(math.inf, "the outputs of w")


@pytest.mark.parametrize("size", [1e-12, 1e20])
def test_the_report_has_the_error_of_activations_of_any_size(size):
    """Squares of outputs beyond 1e19 are beyond float32."""
    model = mlp()[1:]
    net = sqcompile.compile(model, [size * torch.randn(4, 16, 32)], backend="eager", progress=False)
    assert all(35 < l.sqnr_db < 60 for l in net.report.layers)
