"""torch.compile(backend="smoothquant"): weights are shared, freed and never stale; what it refuses."""

from __future__ import annotations

import gc

import pytest
import torch
from backend_cases import call, compiled, mlp, outliers, planned, session
from conftest import tiny_lm, token_batches
from torch import nn
from torch.nn import functional as F

import sqcompile

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


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


@pytest.mark.slow
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
    sums = sum(m.beside.numel() * 4 for m in kept.values() if m.beside is not None)  # of the kernels for x86
    int8 = sum(m.w.numel() + m.scale.numel() * 4 for m in kept.values()) + sums
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
        ({"recipe": "O4"}, "unknown recipe 'O4'"),
        ({"calibration_steps": 0}, "calibration_steps=0"),
        ({"compiler": "gcc"}, "compiler='gcc'"),
        ({"mode": "fast"}, "mode='fast'"),
        ({"stage": "folded"}, "stage='folded'"),
        ({"stage": "quantized", "free_float": True}, "stage='quantized' and free_float=True"),
        ({"mode": "reduce-overhead"}, "are on cpu: move them to one GPU"),
    ],
)
def test_bad_options(options, match):
    model = mlp()
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
