"""torch.compile(backend="smoothquant"): the same numbers as compile()."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from backend_cases import call, compiled, mlp, outliers, planned, session
from conftest import relative_error, tiny_lm, token_batches
from torch import nn
from torch._dynamo.utils import counters

import sqcompile
from sqcompile.backend import smoothquant
from sqcompile.passes.ir.graph import get_tensor
from sqcompile.plan.recipe import resolve_recipe

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def test_listed_and_loaded_from_its_entry_point(tmp_path):
    info = tmp_path / "sqcompile_entry-0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sqcompile-entry\nVersion: 0.0\n")
    (info / "entry_points.txt").write_text("[torch_dynamo_backends]\nsmoothquant = sqcompile.backend:smoothquant\n")
    code = f"""
        import sys; sys.path.insert(0, {str(tmp_path)!r})
        import torch
        assert "smoothquant" in torch._dynamo.list_backends() and "sqcompile" not in sys.modules
        torch.compile(torch.nn.Linear(2, 2), backend="smoothquant")
        print(sys.modules["sqcompile.backend"].__name__)
    """
    lines = "\n".join(line.strip() for line in code.splitlines())
    out = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "sqcompile.backend"


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_same_logits_as_compile(family):
    model = tiny_lm(family)
    plan, reference = planned(model, token_batches())
    net = compiled(model, plan=plan)
    for shape in ((2, 9), (3, 17), (2, 4)):
        x = torch.randint(3, 96, shape)
        got, want = call(net, x, use_cache=False), reference(input_ids=x)
        assert type(got).__name__ == type(want).__name__
        assert float((got.logits - want.logits).abs().max()) <= 1e-3
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_the_same_logits_through_inductor(lm, lm_windows):
    plan = sqcompile.calibrate(lm[0], [lm_windows[0][:4]], progress=False)
    reference = sqcompile.compile(lm[0], plan=plan)
    net = torch.compile(lm[0], backend=smoothquant, options={"plan": plan})
    x = lm_windows[1][:2, :200]
    assert float((call(net, x, use_cache=False).logits - reference(input_ids=x).logits).abs().max()) <= 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_half_precision(dtype):
    model = tiny_lm("llama", dtype)
    plan, reference = planned(model, token_batches())
    x = torch.randint(3, 96, (2, 12))
    got = call(compiled(model, plan=plan), x, use_cache=False).logits
    assert got.dtype == dtype and torch.equal(got, reference(input_ids=x).logits)


def test_autocast():
    model = mlp()
    plan, _ = planned(model)
    x = outliers()[0]
    with torch.autocast("cpu", torch.bfloat16):
        want, got = call(model, x), call(compiled(model, plan=plan), x)
    assert got.dtype == want.dtype and relative_error(got, want) < 0.05


def test_inference_mode_and_keyword_arguments():
    model = mlp()
    plan, reference = planned(model)
    net, x = compiled(model, plan=plan), outliers()[0]
    with torch.inference_mode():
        assert torch.allclose(net(x=x), reference(x), atol=1e-5)
    want = call(net, x) - x
    assert torch.allclose(call(net, x, scale=torch.tensor(2.0)) - x, 2 * want, atol=1e-4)


def test_the_first_calls_calibrate():
    model, batches = mlp(), outliers(5)
    net = compiled(model, recipe="default", calibration_steps=3)
    for x in batches[:3]:
        assert torch.allclose(call(net, x), call(model, x), atol=1e-5)  # float
    got = call(net, batches[4])
    plan, reference = planned(model, batches[:3])
    assert torch.allclose(got, reference(batches[4]), atol=1e-4) and not torch.equal(got, call(model, batches[4]))
    mine = session(model).plan
    assert [(l.name, l.quantized, l.alpha) for l in mine.layers] == [
        (l.name, l.quantized, l.alpha) for l in plan.layers
    ]
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("calibrated", [False, True])
def test_graph_breaks_multiply_explicitly_and_fold_nothing(calibrated):
    model = mlp(broken=True)
    plan, reference = planned(mlp())
    assert any(l.smoothing == "folded" for l in plan.layers)
    if calibrated:
        net = compiled(model, recipe=plan.recipe, calibration_steps=4)
        for x in outliers():
            call(net, x)
    else:
        net = compiled(model, plan=plan)
    x = outliers()[1]
    assert relative_error(call(net, x), reference(x)) < 2e-3
    assert counters["stats"]["unique_graphs"] == 2
    assert "smooth" not in "".join(n for n, _ in model.named_parameters())


def test_inputs_that_are_written_to_and_outputs_that_alias():
    class Cache(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x, cache, at):
            cache.index_copy_(0, at, self.fc(x))
            return cache.sum(0), cache[1:], x.view(-1)

    torch.manual_seed(0)
    model = Cache().eval()
    plan, _ = planned(nn.Sequential(model.fc), [torch.randn(2, 16)])
    layers = tuple(type(l)(**{**l.__dict__, "name": l.name.replace("0.", "fc.")}) for l in plan.layers)
    plan = sqcompile.Plan(
        plan.recipe, plan.call, {}, tuple(type(l)(**{**l.__dict__, "smoothing": "none"}) for l in layers)
    )
    x, at = torch.randn(2, 16), torch.tensor([1, 3])
    mine, theirs = torch.zeros(5, 16), torch.zeros(5, 16)
    got, want = call(compiled(model, plan=plan), x, mine, at), call(model, x, theirs, at)
    assert relative_error(mine, theirs) < 0.02 and relative_error(got[0], want[0]) < 0.02
    assert got[1].data_ptr() == mine[1:].data_ptr() and got[2].data_ptr() == x.data_ptr()


def test_other_backends_and_other_models_are_left_alone():
    model = tiny_lm("llama")
    net = torch.compile(model, backend="eager")
    assert net.generate.__self__ is model
    assert get_tensor(model, "lm_head.weight") is model.lm_head.weight


@torch._dynamo.config.patch(recompile_limit=3)
def test_the_last_compilation_is_announced():
    """Beyond Dynamo's limit a function runs in float: no call gets there without a warning."""
    model, x = mlp(), outliers()[0]
    plan, _ = planned(model)
    net = compiled(model, plan=plan)
    call(net, x, scale=1.5)
    call(net, x)
    with pytest.warns(UserWarning, match="last of the 3 times .* run in FLOAT"):
        call(net, x, scale=torch.tensor(2.0))


@torch._dynamo.config.patch(recompile_limit=2)
def test_models_with_plans_of_their_own_do_not_count_as_recompilations(tmp_path):
    for i, x in enumerate(outliers()):
        plan, reference = planned(mlp(), [x])
        plan.save(tmp_path / str(i))
        net = compiled(mlp(), plan=str(tmp_path / str(i)))
        assert torch.equal(call(net, x), reference(x))


def test_the_quantized_stage_of_a_graph_without_a_linear():
    model, x = mlp(broken=True), outliers()[0]
    plan, _ = planned(mlp())
    got, want = (call(compiled(model, plan=plan, stage=stage), x) for stage in ("quantized", "lowered"))
    assert torch.equal(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["O2", "O3"])
def test_the_first_calls_calibrate_attention(recipe):
    recipe = dataclasses.replace(resolve_recipe(recipe), attention="qk_pv")
    model, batches = tiny_lm("llama"), token_batches()
    plan, _ = planned(model, batches, recipe=recipe)
    net = compiled(model, recipe=recipe, calibration_steps=len(batches))
    for ids in (*batches, batches[0]):
        call(net, **ids, use_cache=False)
    mine = session(model).plan
    assert mine is not None and [a.quantized for a in mine.attention] == ["qk_pv"] * 2
    assert mine.attention == plan.attention
    assert mine.heads.keys() == plan.heads.keys() and all(torch.equal(mine.heads[k], plan.heads[k]) for k in plan.heads)


@pytest.mark.parametrize("activation", ["per_token", pytest.param("per_tensor_static", marks=pytest.mark.slow)])
def test_attention_is_smoothed_explicitly(activation):
    """Keys of a cache are the model's own: s is multiplied right before quantization, in prefill and decode."""
    recipe = sqcompile.Recipe(attention="qk", activation=activation)
    model = tiny_lm("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight[3::16] *= 20
            layer.self_attn.q_proj.weight[3::16] /= 20
    plan, reference = planned(model, token_batches(), recipe=recipe)
    assert [a.smoothing for a in plan.attention] == ["folded"] * 2
    net, ids = compiled(model, plan=plan), torch.randint(3, 96, (2, 9))
    want = reference(input_ids=ids).logits
    first = call(net, ids[:, :-1], use_cache=True)
    second = call(net, ids[:, -1:], past_key_values=first.past_key_values)
    for got, expected in ((first.logits, want[:, :-1]), (second.logits, want[:, -1:])):
        assert relative_error(got, expected) < 1e-4
    for runner in session(model).runners:
        graph = runner.bound[0].run.graph
        attentions = graph.find_nodes(op="call_function", target=torch.ops.sqcompile.int8_attention.default)
        assert len(attentions) == 2
    keys = first.past_key_values.layers[0].keys
    float_keys = call(model, ids, use_cache=True).past_key_values.layers[0].keys
    assert relative_error(keys, float_keys) < 5e-2, "neither divided nor shifted"
