"""FP8 W8A8: the same passes with another number format, from the recipe to the lowered graph."""

import math

import pytest
import torch
from conftest import relative_error, tiny_lm, token_batches
from torch import nn

import sqcompile
from sqcompile import Recipe
from sqcompile.kernels import reference
from sqcompile.kernels.ops import sqcompile_ops
from sqcompile.kernels.qtypes import BY_DTYPE, FP8, INT8, QTYPES

KINDS = {
    "default": {}, "per tensor": {"activation": "per_tensor", "weight": "per_tensor"},
    "static": {"activation": "per_tensor_static", "weight": "per_tensor"},
}  # fmt: skip


class Mlp(nn.Module):
    """fc1 -> relu -> fc2 behind a norm whose outlier channel is far above the others."""

    def __init__(self, outlier=40.0):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 96), nn.Linear(96, 64)
        with torch.no_grad():
            self.norm.weight[5] = outlier

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


def inputs(n=3, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 33, 64, generator=g) for _ in range(n)]


@pytest.mark.parametrize("qtype", QTYPES.values(), ids=QTYPES)
def test_a_number_format_rounds_to_the_nearest_value_it_has(qtype):
    """Against all values of the format, by brute force; ties go to the even one, and what is beyond is clamped."""
    x = torch.cat([torch.linspace(-1.2 * qtype.q_max, 1.2 * qtype.q_max, 4001), torch.tensor([0.0, 0.5, 1.5, 2.5])])
    if qtype is INT8:
        values = torch.arange(-127.0, 128.0)
    else:
        every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        values = every[every.isfinite()].unique()
    nearest = (x.clamp(-qtype.q_max, qtype.q_max)[:, None] - values).abs().amin(1)
    q = qtype.of(x)
    assert q.dtype == qtype.dtype and BY_DTYPE[q.dtype] is qtype
    assert torch.equal((q.float() - x.clamp(-qtype.q_max, qtype.q_max)).abs(), nearest)
    assert float(q.float().max()) == qtype.q_max == -float(q.float().min())
    nan = qtype.of(torch.tensor([math.nan])).float()
    assert nan.isnan().all() if qtype is FP8 else nan == 0


def test_operators_without_a_format_are_int8s():
    x = torch.randn(5, 16)
    scale = sqcompile_ops.token_scale(x)
    assert torch.allclose(scale * 127, sqcompile_ops.token_scale(x, 448.0) * 448, rtol=1e-6)
    assert torch.equal(sqcompile_ops.quantize(x, scale), INT8.of(x * scale.reciprocal()))
    scale = sqcompile_ops.token_scale(x, FP8.q_max)
    assert torch.equal(sqcompile_ops.quantize(x, scale, 0, FP8.dtype).float(), FP8.of(x * scale.reciprocal()).float())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_language_model_in_fp8(name, kind):
    model, batches = tiny_lm(name), token_batches()
    net = sqcompile.compile(model, batches, recipe=Recipe(dtype="fp8", **KINDS[kind]), backend="eager", progress=False)
    assert sum(l.quantized for l in net.report.layers) == len(net.report.layers) - 1  # but the head
    assert "linears in FP8" in str(net.report) and " fp8 " in str(net.report)
    gemms = net.lowered.graph.find_nodes(op="call_function", target=sqcompile_ops.fp8_linear.default)
    assert len(gemms) == {"llama": 2 * 4, "opt": 2 * 4}[name]  # q, k, v are one; so are gate and up
    weights = {n.args[2].meta["val"].dtype for n in gemms}
    assert weights == {torch.float8_e4m3fn}
    x = torch.randint(3, 96, (2, 17))
    got, want = net(input_ids=x).logits, model(input_ids=x).logits
    assert relative_error(got, net.stages["quantized"](input_ids=x).logits) < 1e-5
    # e4m3 rounds by up to 1 part in 16, and each layer by as much again
    assert 1e-3 < relative_error(got, want) < 0.2
    folded = net.stages["folded"](input_ids=x).logits
    assert relative_error(folded, want) < 1e-5


def test_each_weight_is_the_nearest_that_fp8_holds():
    model = Mlp().eval()
    net = sqcompile.compile(model, inputs(), recipe=Recipe(dtype="fp8", smooth=False), backend="eager", progress=False)
    gm = net.stages["quantized"]
    w, scale = gm.up.weight_fp8, gm.up.weight_scale
    error = (w.double() * scale.double()[:, None] - model.up.weight.double()).abs()
    # half a step of 3 bits of mantissa, or of the smallest number
    assert bool((error <= model.up.weight.double().abs() / 16 + scale.double()[:, None] * 2**-10).all())
    assert torch.allclose(scale * FP8.q_max, model.up.weight.abs().amax(1), rtol=1e-6)


def test_rows_that_are_not_finite_come_out_as_nan():
    model = Mlp().eval()
    for kind in KINDS.values():
        net = sqcompile.compile(model, inputs(), recipe=Recipe(dtype="fp8", **kind), backend="eager", progress=False)
        x = inputs(1, 7)[0]
        x[1, 3, 2], x[2, 5, 0] = math.nan, math.inf
        y = net(x)
        assert y[1, 3].isnan().all() and y[2, 5].isnan().all()
        if kind.get("activation") != "per_tensor":
            assert y[0].isfinite().all()


def test_smoothing_costs_floating_point_nothing():
    """Steps grow with the value, so an outlier costs other channels nothing until they leave the range of 2^-9 to 448."""
    for outlier in (40.0, 3e6):
        model = Mlp(outlier).eval()
        plans = {
            smooth: sqcompile.compile(
                model, inputs(), recipe=Recipe(dtype="fp8", smooth=smooth), backend="eager", progress=False
            )
            for smooth in (False, True)
        }
        x = inputs(1, 9)[0]
        want = model(x) - x
        errors = {smooth: relative_error(net(x) - x, want) for smooth, net in plans.items()}
        assert errors[True] < 1.1 * errors[False], outlier


def test_a_plan_in_fp8_is_saved_and_served_by_the_backend(tmp_path, fresh_dynamo):
    model, x = Mlp().eval(), inputs(1, 5)[0]
    net = sqcompile.compile(model, inputs(), recipe=Recipe(dtype="fp8"), backend="eager", progress=False)
    net.plan.save(tmp_path / "plan.safetensors")
    plan = sqcompile.Plan.load(tmp_path / "plan.safetensors")
    assert plan == net.plan and plan.recipe.dtype == "fp8"
    with torch.no_grad():
        run = torch.compile(model, backend="smoothquant", options={"plan": plan, "compiler": "eager"})
        assert torch.equal(run(x), net(x))


@pytest.mark.parametrize("target", ["cuda-sm90", "cuda-sm80", "arm64", "reference"])
def test_every_target_takes_fp8(target):
    model, x = Mlp().eval(), inputs(1, 5)[0]
    net = sqcompile.compile(model, inputs(), recipe=Recipe(dtype="fp8"), backend="eager", progress=False)
    other = sqcompile.compile(model, plan=net.plan, backend="eager", target=target)
    assert torch.equal(other(x), net(x))


def test_experts_and_attention_stay_in_float():
    net = sqcompile.compile(
        tiny_lm("mixtral"), token_batches(), recipe=Recipe(dtype="fp8"), backend="eager", progress=False
    )
    experts = [l for l in net.report.layers if l.kind == "experts"]
    assert experts and all(not l.quantized and l.reason == "routed experts have no kernel in FP8" for l in experts)
    assert any(l.quantized for l in net.report.layers)
    with pytest.raises(sqcompile.RecipeError, match=r"attention='qk' with dtype='fp8'.*leave it out"):
        Recipe(dtype="fp8", attention="qk")
    with pytest.raises(sqcompile.RecipeError, match=r"min_speedup=1\.1 with dtype='fp8': only INT8 was measured"):
        Recipe(dtype="fp8", min_speedup=1.1)
    with pytest.raises(sqcompile.RecipeError, match="dtype='int4': choose one of int8, fp8"):
        Recipe(dtype="int4")


def test_the_reference_of_the_linear():
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(7, 32, generator=g), torch.randn(24, 32, generator=g)
    s, ws = reference.token_scale(x, FP8.q_max), reference.weight_scale(w, True, FP8.q_max)
    q, qw = reference.quantize(x, s, dtype=FP8.dtype), reference.quantize(w, ws, dtype=FP8.dtype)
    b = torch.randn(24, generator=g)
    got = sqcompile_ops.fp8_linear(q, s, qw, ws.flatten(), b, torch.float32)
    want = (q.double() * s) @ (qw.double() * ws).t() + b
    assert relative_error(got, want) < 1e-6
    assert relative_error(got - b, x.double() @ w.double().t()) < 0.06
