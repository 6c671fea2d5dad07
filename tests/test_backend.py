"""torch.compile(backend="smoothquant"): the same numbers as compile(), and never a stale weight."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
import torch
from conftest import relative_error, tiny_lm, token_batches
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

import sqcompile
from sqcompile.backend import smoothquant
from sqcompile.backend.session import _sessions
from sqcompile.passes.graph import get_tensor


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class MLP(nn.Module):
    def __init__(self, broken=False):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 96), nn.Linear(96, 64)
        self.broken = broken

    def forward(self, x, scale=None):
        h = self.norm(x)
        if self.broken:
            torch._dynamo.graph_break()
        y = self.down(F.relu(self.up(h)))
        return x + (y if scale is None else y * scale)


def outliers(n=4):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 2, 8, 64, generator=generator)
    x[..., 5] *= 30
    return list(x)


def mlp(broken=False):
    torch.manual_seed(0)
    model = MLP(broken).eval()
    with torch.no_grad():
        model.norm.weight[5] = 20
    return model


def compiled(model, **options):
    return torch.compile(model, backend=smoothquant, options={"compiler": "eager", **options})


def planned(model, batches=None, **kwargs):
    plan = sqcompile.calibrate(model, batches or outliers(), progress=False, **kwargs)
    return plan, sqcompile.compile(model, plan=plan, backend="eager")


def session(model):
    return next(iter(_sessions[model].values()))


@torch.no_grad()
def call(model, *args, **kwargs):
    return model(*args, **kwargs)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
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


def test_graphs_share_int8_weights():
    model = tiny_lm("llama")
    plan, _ = planned(model, token_batches())
    net = compiled(model, plan=plan)
    ids = torch.randint(3, 96, (2, 9))
    out = call(net, ids, use_cache=True)
    call(net, ids[:, :1], past_key_values=out.past_key_values)
    runners = list(session(model).runners)
    assert len(runners) == 2
    first, second = ({id(m) for m in r.bound[0].keep} for r in runners)
    assert len(first & second) >= 2 * 3  # q/k/v, gate/up and down of each layer; o_proj is smoothed unlike before


def test_memory_with_free_float():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(256), nn.Linear(256, 1024), nn.Linear(1024, 256)

        def forward(self, x):
            return x + self.down(F.relu(self.up(self.norm(x))))

    torch.manual_seed(0)
    model = nn.Sequential(*[Block() for _ in range(16)]).eval().bfloat16()
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    plan, reference = planned(model, [torch.randn(2, 8, 256, dtype=torch.bfloat16)])
    x = torch.randn(2, 8, 256, dtype=torch.bfloat16)
    want = reference(x)
    del reference
    gc.collect()
    net = compiled(model, plan=plan, free_float=True)
    assert torch.equal(call(net, x), want)
    assert torch.equal(call(net, x[:1]), want[:1])  # a batch of 1 is another graph, of the same INT8 weights
    left = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.parameters()}
    kept = {id(m): m for r in session(model).runners for m in r.bound[0].keep}
    int8 = sum(m.w.numel() + m.scale.numel() * 4 + m.row_sum.numel() * 4 for m in kept.values())
    assert sum(left.values()) + int8 <= 0.55 * before
    assert bool(model[0].up.weight.isnan().all())
    with torch.no_grad():
        model[0].up.weight.zero_()
    with pytest.raises(
        sqcompile.StageError, match=r"0\.up\.weight was written to .* after its float values were freed"
    ):
        call(net, x)


def test_changed_weights_are_quantized_again():
    model = mlp()
    plan, _ = planned(model)
    net, x = compiled(model, plan=plan), outliers()[0]
    first = call(net, x)
    other = mlp()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    want = sqcompile.compile(other, plan=plan, backend="eager")(x)
    model.load_state_dict(other.state_dict())  # copies into the parameters
    assert torch.equal(call(net, x), want) and not torch.equal(first, want)
    model.load_state_dict(mlp().state_dict(), assign=True)  # other parameters in their place
    assert torch.equal(call(net, x), first)
    model.up.weight.data = model.up.weight.data * 2  # other memory behind the same parameter
    assert not torch.equal(call(net, x), first)
    model.to(torch.bfloat16)
    assert call(net, x.bfloat16()).dtype == torch.bfloat16


def test_calls_under_grad_are_refused_in_words():
    model = mlp()
    plan, reference = planned(model)
    net, x = compiled(model, plan=plan), outliers()[0]
    with pytest.raises(sqcompile.CaptureError, match=r"no gradients.*torch\.no_grad\(\)"):
        net(x)
    want = call(net, x)
    with pytest.raises(sqcompile.CaptureError, match="no gradients"):
        net(x)
    model.requires_grad_(False)
    assert torch.equal(net(x), want) and torch.equal(want, reference(x))
    with pytest.raises(sqcompile.CaptureError, match="no gradients"):
        net(x.clone().requires_grad_())


def test_training_mode_is_refused():
    model = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5)).eval()
    plan, _ = planned(model, [torch.randn(4, 16)])
    net = compiled(model, plan=plan)
    call(net, torch.randn(4, 16))
    model.train()
    with pytest.raises(sqcompile.CaptureError, match=r"training mode.*model\.eval\(\)"):
        call(net, torch.randn(4, 16))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"plam": 1}, "option 'plam' .*choose from plan, recipe"),
        ({"plan": 3}, "option plan=3: pass what sqcompile.calibrate gives"),
        ({"plan": "plan", "recipe": "O1"}, "plan needs no calibration"),
        ({"recipe": "O4"}, "unknown recipe 'O4'"),
        ({"calibration_steps": 0}, "calibration_steps=0"),
        ({"compiler": "gcc"}, "compiler='gcc'"),
        ({"mode": "fast"}, "mode='fast'"),
        ({"stage": "folded"}, "stage='folded'"),
        ({"mode": "reduce-overhead"}, "move the model to a GPU"),
        ({"mode": "reduce-overhead", "regional": True}, "regional=True and mode='reduce-overhead'"),
    ],
)
def test_bad_options(options, match):
    model = mlp()
    if options.get("plan") == "plan":
        options = {**options, "plan": planned(model)[0]}
    with pytest.raises(sqcompile.RecipeError, match=match):
        call(compiled(model, **options), outliers()[0])


def test_a_plan_of_another_model(tmp_path):
    plan, _ = planned(mlp())
    with pytest.raises(sqcompile.PlanError, match="calibrate this model"):
        call(compiled(nn.Linear(16, 16).eval(), plan=plan), torch.randn(2, 16))
    plan.save(tmp_path / "plan")
    model = mlp()
    x = outliers()[0]
    want = call(compiled(model, plan=plan), x)
    assert torch.equal(call(compiled(model, plan=tmp_path / "plan"), x), want)


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
