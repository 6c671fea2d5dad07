"""Bad input gets one clear error that names what to do, and leaves the model as it was."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import relative_error, tiny_lm, token_batches
from torch import nn
from torch.nn import functional as F

import sqcompile
from sqcompile import Recipe
from sqcompile.backend import smoothquant


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
        "batch 0 .* does not fit Net.forward.*missing a required argument: 'x'.*it has no 'input', 'y'",
        loader=[{"input": batches()[0], "y": torch.ones(1), "flag": torch.ones(1)}],
    )
    fails(
        sqcompile.CalibrationError, r"does not fit Net.forward\(x, flag\): got 'y' alone", loader=[{"y": torch.ones(1)}]
    )
    fails(sqcompile.CaptureError, "cannot be exported.*test_errors.py", loader=[torch.randn(4, 6, 17)])
    fails(
        sqcompile.CalibrationError,
        r"batch 1: .*captured as torch.float32 \[any, any, 16\]",
        loader=[torch.randn(4, 6, 16), torch.randn(4, 6, 17)],
    )
    loader = [{"x": torch.randn(4, 6, 16)}, {"x": torch.randn(4, 6, 16), "flag": torch.ones(1)}]
    fails(sqcompile.CalibrationError, "batch 1: .*captured with the arguments \\(x\\)", loader=loader)


@pytest.mark.parametrize("batch", [{"x": [[1.0, 2.0]]}, [[1.0, 2.0]], ([1.0], None)])
def test_a_batch_of_lists_says_how_to_make_tensors(batch):
    remedy = r'to tensors \(return_tensors="pt" .*with_format\("torch"\)\) and batch them'
    fails(sqcompile.CalibrationError, rf"batch 0 \(\w+\) holds no tensor: .*{remedy}", loader=[batch])
    fails(sqcompile.CalibrationError, r"batch 1 \(\w+\) holds no tensor", loader=[torch.randn(4, 6, 16), batch])


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
    with pytest.raises(sqcompile.RecipeError, match="regional='yes': pass True or False"):
        sqcompile.compile(Net().eval(), batches(), regional="yes")


def test_a_number_of_batches_beside_none():
    model = Net().eval()
    plan = sqcompile.calibrate(model, batches(), progress=False)
    with pytest.raises(sqcompile.PlanError, match="plan and max_batches"):
        sqcompile.compile(model, plan=plan, max_batches=3)
    scales = {n: torch.ones(m.in_features) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    with pytest.raises(sqcompile.CalibrationError, match="max_batches with act_scales"):
        sqcompile.compile(model, act_scales=scales, example_inputs=batches()[0], max_batches=3)


class Wrapped:
    """A type that torch.utils._pytree does not know."""

    def __init__(self, value):
        self.value = value


_library = torch.library.Library("sqcompile_test_errors", "DEF")
_library.define("no_fake(Tensor x) -> Tensor")
_library.impl("no_fake", lambda x: x.clone(), "CPU")

# forward's body, what fails, the line, what to try
NOT_EXPORTABLE = {
    "a branch on values": (lambda x: x * 2 if x.sum() > 0 else x, "Eq|>", "x.sum() > 0", "torch.where"),
    "a size from values": (lambda x: x[:, : int(x.sum())], "TruncToInt", "int(x.sum())", "pass it to forward"),
    "a loop over values": (lambda x: sum(x for _ in range(int(x.sum()))), "data-dependent", "range", "pass it to forward"),
    "rows picked by values": (lambda x: x[x > 0].reshape(-1, 16), "size of what index gives depends on tensor values", "self.body(x)", "a mask"),
    "nonzero": (lambda x: torch.nonzero(x)[:, :1].expand(-1, 16).float(), "size of what nonzero gives", "", "compile a submodule"),
    "unique": (lambda x: torch.unique(x)[:, None].expand(-1, 16), "size of what _unique2 gives", "", "compile a submodule"),
    "numpy": (lambda x: torch.from_numpy(x.numpy() * 2), r"\.numpy\(\)", "x.numpy()", "torch instead of numpy"),
    "an operator without a fake": (
        lambda x: torch.ops.sqcompile_test_errors.no_fake(x), "sqcompile_test_errors.no_fake", "no_fake(x)", "register_fake",
    ),
    "wrong shapes": (lambda x: x @ torch.ones(3, 16), "same reduction dim", "torch.ones(3, 16)", "run the model itself"),
    "control flow": (
        lambda x: torch.cond(x.sum() > 0, torch.neg, torch.abs, (x,)), "cond is a nested graph", "self.body(x)", "control flow",
    ),
    "a generator": (
        lambda x: x[..., torch.randperm(16, generator=torch.Generator().manual_seed(0))],
        "reads a Generator", "self.body(x)", "outside forward",
    ),
    "an output of an unknown type": (Wrapped, "Wrapped", "", "register_pytree_node"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_EXPORTABLE)
def test_a_model_that_cannot_be_exported_names_operation_line_and_remedy(name, capfd):
    body, what, line, remedy = NOT_EXPORTABLE[name]
    model = Net(body).eval()
    model.forward = (
        (lambda x: body(x)) if name in ("an output of an unknown type", "nonzero", "unique") else model.forward
    )
    message = fails(sqcompile.CaptureError, what, model=model)
    assert "What to try: " in message and remedy in message.split("What to try: ")[1]
    assert line in message and ("test_errors.py" in message or not line)
    assert "\n" not in message
    assert capfd.readouterr().err == ""  # one message, not PyTorch's graphs and traces beside it


def test_an_operation_that_fails_on_one_batch_is_named():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fc = nn.Embedding(10, 16), nn.Linear(16, 16)

        def forward(self, ids):
            return self.fc(self.embed(ids))

    loader = [torch.tensor([[1, 2]]), torch.tensor([[1, 12]])]
    message = fails(
        sqcompile.CalibrationError, "batch 1: IndexError: .* in embedding at ", model=Table().eval(), loader=loader
    )
    assert "test_errors.py" in message and "self.embed(ids)" in message and "\n" not in message


@pytest.mark.parametrize("dropout", [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout])
def test_training_mode_with_dropout(dropout):
    fails(sqcompile.CaptureError, r"training mode .*model.eval\(\)", model=Net(dropout(0.1)).train())


def test_dropout_is_nothing_in_eval_mode():
    torch.manual_seed(0)
    model, x = Net(nn.Dropout(0.5)).eval(), torch.randn(3, 5, 16)
    net = sqcompile.compile(model, batches(), backend="eager", progress=False)
    assert relative_error(net(x), model(x)) < 0.05


def test_a_gradient_that_is_asked_for_is_refused():
    """It would be gone in silence; under no_grad nobody asks."""
    net = sqcompile.compile(Net().eval(), batches(), backend="eager", progress=False)
    x = torch.randn(3, 5, 16, requires_grad=True)
    with pytest.raises(sqcompile.CaptureError, match=r"computes no gradients.*detach it"):
        net(x)
    with torch.no_grad():
        want = net(x)
    assert torch.equal(net(x.detach()), want) and not want.requires_grad


def test_a_gradient_that_goes_forward_is_refused():
    model = Net().eval()
    plan = sqcompile.calibrate(model, batches(), progress=False)
    net = sqcompile.compile(model, plan=plan, backend="eager", progress=False)
    x, tangent = torch.randn(3, 5, 16), torch.randn(3, 5, 16)
    refused = pytest.raises(sqcompile.CaptureError, match=r"computes no gradients, neither backward nor forward")
    with refused:
        torch.func.jvp(net, (x,), (tangent,))
    with refused:
        torch.func.jacfwd(lambda x: net(x).sum())(x)
    with refused:  # at the outer of two levels
        torch.func.jvp(lambda a: torch.func.jvp(lambda b: net(a) * b, (x,), (tangent,))[1], (x,), (tangent,))
    backend = torch.compile(
        model, backend=smoothquant, options={"plan": plan, "model": model, "compiler": "eager", "progress": False}
    )
    with torch.no_grad():
        want = backend(x)
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(Exception, match="computes no gradients"),
        torch.no_grad(),
    ):
        backend(torch.autograd.forward_ad.make_dual(x, tangent))
    assert torch.equal(net(x), want)
    assert torch.equal(torch.func.vmap(net)(x[:, None]).squeeze(1), want)  # which asks for none


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
    remedy = r"leave flag=True out, compile with example_inputs= .*torch.compile\(model, backend='smoothquant'\)"
    with pytest.raises(sqcompile.CaptureError, match=remedy):
        compiled(torch.randn(1, 2, 16), flag=True)
    with pytest.raises(sqcompile.CaptureError, match="does not fit the model's signature"):
        compiled(z=1)


def test_a_device_without_kernels_falls_to_the_reference_with_one_warning(monkeypatch):
    from sqcompile.passes.lowering import lower

    monkeypatch.setattr(lower, "_warned", set())
    torch.manual_seed(0)
    model = Net().eval()
    with pytest.warns(UserWarning, match="no INT8 kernels for cpu.*integer reference") as caught:
        slow = sqcompile.compile(model, batches(), backend="eager", progress=False, target="reference")
    assert len([w for w in caught if "INT8 kernels" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sqcompile.compile(model, batches(), backend="eager", progress=False, target="reference")
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
