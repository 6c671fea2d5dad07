"""Weights that change, whoever changes them and how: no call is served with old ones, or later ones at most, with a word."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from backend_cases import call, compiled, mlp, outliers, planned, session
from conftest import relative_error, tiny_lm, token_batches
from torch import nn
from torch.nn import functional as F

import sqcompile

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def now(model, plan, x):
    """What the model gives that is compiled as it is now."""
    return sqcompile.compile(model, plan=plan, backend="eager", progress=False)(x)


def test_other_memory_at_the_same_address():
    """``weight.data = f(weight.data)`` frees the old memory, and the allocator gives its address to the next of that size."""
    model, x = mlp(), outliers()[0]
    plan, _ = planned(model)
    net = compiled(model, plan=plan)
    for _ in range(4):
        call(net, x)
        p = model.up.weight
        before, values = (p._version, p.data_ptr()), p.detach() * 1.5
        p.data = torch.empty(0)
        gc.collect()
        held = []
        while True:  # until the allocator gives it
            held.append(torch.empty_like(values))
            if held[-1].data_ptr() == before[1] or len(held) > 200:
                break
        held[-1].copy_(values)
        p.data = held.pop().detach()
        if (p._version, p.data_ptr()) == before:
            break
    else:
        pytest.skip("the allocator never gave the address again")
    assert torch.equal(call(net, x), now(model, plan, x))


def test_values_copied_behind_the_count_of_writes():
    model, x = mlp(), outliers()[0]
    plan, _ = planned(model)
    net = compiled(model, plan=plan)
    call(net, x)
    with torch.no_grad():
        model.up.weight.data.copy_(torch.randn(96, 64))
    with pytest.warns(UserWarning, match=r"written to through \.data.*sqcompile\.refresh"):
        got = call(net, x)
    assert torch.equal(got, now(model, plan, x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.down.weight.data.mul_(2)
        assert torch.equal(call(net, x), now(model, plan, x))


@pytest.mark.parametrize(("recipe", "warns"), [("O3", True), ("O2", False), ("default", False)])
def test_static_scales_of_other_weights_are_said_once(recipe, warns):
    model, batches = mlp(), outliers()
    net = compiled(model, recipe=recipe, calibration_steps=len(batches))
    for x in (*batches, batches[0]):
        call(net, x)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for by in (3.0, 2.0):
            with torch.no_grad():
                model.up.weight.mul_(by)
            call(net, batches[0])
    told = [str(w.message) for w in found if "after its static scales were made" in str(w.message)]
    assert len(told) == warns and all("torch._dynamo.reset()" in t for t in told)


def test_moved_weights_are_no_other_ones():
    model, batches = mlp(), outliers()
    net = compiled(model, recipe="O3", calibration_steps=2)
    for x in batches[:3]:
        call(net, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.to(torch.float64).to(torch.float32)
        call(net, batches[0])


def test_a_calibration_of_which_no_plan_comes_is_made_again():
    """A warm-up with zeros has no static scales."""
    model, batches = mlp(), outliers()
    net = compiled(model, recipe=sqcompile.Recipe(0.5, "per_tensor_static"), calibration_steps=2)
    zeros = torch.zeros_like(batches[0])
    for _ in range(2):
        call(net, zeros)
    with pytest.raises(sqcompile.NothingToQuantizeError, match="the same in all"):
        call(net, zeros)
    for x in batches[:3]:
        got = call(net, x)
    assert session(model).plan is not None and relative_error(got, model(batches[2])) < 0.05


def test_every_weight_has_its_turn():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(40)]).eval()
    x = torch.randn(4, 16)
    plan, _ = planned(model, [x])
    net = compiled(model, plan=plan)
    call(net, x)
    model[-1].weight.data.copy_(torch.randn(16, 16))
    with pytest.warns(UserWarning, match="some calls before"):
        for _ in range(5):  # 80 tensors, 16 a call
            got = call(net, x)
    assert torch.equal(got, now(model, plan, x))


def test_another_graph_is_made_of_what_is_there_now():
    model, x = mlp(), outliers()[0]
    plan, _ = planned(model)
    net = compiled(model, plan=plan)
    call(net, x)
    model.up.weight.data.mul_(-1)
    assert torch.equal(call(net, x[:1]), now(model, plan, x[:1]))  # a batch of 1 is another graph


@pytest.mark.parametrize("inference", [False, True])
def test_refresh(inference):
    """One element that no sample has."""
    with torch.inference_mode(inference):
        model, x = mlp(), outliers()[0]
    plan, _ = planned(mlp())
    net = compiled(model, plan=plan)
    before = call(net, x)
    with torch.inference_mode(inference):
        model.up.weight.data[0] = 3.0
    assert torch.equal(call(net, x), before)
    sqcompile.refresh(net)
    other = mlp()
    other.up.weight.data[0] = 3.0
    assert torch.equal(call(net, x), now(other, plan, x))
    with torch.inference_mode(inference):
        model.up.weight.data[1] = 3.0
    other.up.weight.data[1] = 3.0
    sqcompile.refresh(model)
    assert torch.equal(call(net, x), now(other, plan, x))


def test_what_cannot_be_refreshed():
    model = mlp()
    _, reference = planned(model)
    with pytest.raises(
        sqcompile.StageError, match=r"weights of its own.*sqcompile\.compile\(model, plan=compiled\.plan\)"
    ):
        sqcompile.refresh(reference)
    with pytest.raises(sqcompile.StageError, match="pass the model"):
        sqcompile.refresh("model")


def test_freed_weights_are_not_refreshed():
    model, x = mlp(), outliers()[0]
    plan, reference = planned(model)
    net = compiled(model, plan=plan, free_float=True)
    call(net, x)
    sqcompile.refresh(net)
    assert torch.equal(call(net, x), reference(x))
    model.up.weight.data[0, 0] = 1.0
    sqcompile.refresh(net)
    with pytest.raises(sqcompile.StageError, match=r"written to .* after its float values were freed"):
        call(net, x)


class Adapted(nn.Module):
    """A linear with adapters, as tools write them."""

    def __init__(self, base, ranks=(4,), kind="lora"):
        super().__init__()
        self.base, self.kind, n, k = base, kind, base.out_features, base.in_features
        self.downs = nn.ModuleList(nn.Linear(k, r, bias=False) for r in ranks)
        self.ups = nn.ModuleList(nn.Linear(r, n, bias=False) for r in ranks)
        self.dropout, self.magnitude = nn.Dropout(0.1), nn.Parameter(torch.rand(n) + 0.5)

    def forward(self, x):
        y = self.base(x)
        for down, up in zip(self.downs, self.ups, strict=True):
            z = up(down(self.dropout(x).to(down.weight.dtype))) * 2.0
            if self.kind == "dora":
                z = (self.magnitude - 1) * y + self.magnitude * z
            y = z + y if self.kind == "swapped" else y + z.to(y.dtype)
        return y


@pytest.mark.parametrize(("kind", "ranks"), [("lora", (4,)), ("lora", (4, 8)), ("swapped", (4,)), ("dora", (4,))])
def test_adapters_stay_in_float(kind, ranks):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.LayerNorm(64), Adapted(nn.Linear(64, 96), ranks, kind), nn.ReLU(), nn.Linear(96, 64)
    ).eval()
    x = torch.randn(2, 8, 64)
    report = sqcompile.compile(model, [x], backend="eager", progress=False).report
    floats = {l.name: l.reason for l in report.layers if not l.quantized}
    names = {f"1.{side}.{i}.weight" for side in ("downs", "ups") for i in range(len(ranks))}
    assert floats.keys() == names
    assert floats["1.ups.0.weight"] == "low-rank adapter of 1.base.weight (rank 4): small, and swapped at run time"


def test_what_is_no_adapter():
    """A factorized linear, a bottleneck beside the residual stream, and a second branch of full rank."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(64, 8), nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 64)
            self.e, self.f = nn.Linear(64, 8), nn.Linear(8, 64)

        def forward(self, x):
            x = self.b(self.a(x))
            x = self.d(self.c(x)) + self.c(x)
            return x + self.f(F.relu(self.e(x))) + self.d(x)

    torch.manual_seed(0)
    report = sqcompile.compile(Net().eval(), [torch.randn(2, 8, 64)], backend="eager", progress=False).report
    assert all(l.quantized for l in report.layers)


def lora(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
    )
    return peft.get_peft_model(model, config).eval()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["merge", "disable", "unload", "hotswap"])
def test_peft(how, tmp_path):
    hotswap = pytest.importorskip("peft.utils.hotswap")
    model, ids = lora(tiny_lm("llama", intermediate_size=112)), token_batches()[0]["input_ids"]
    net = compiled(model, calibration_steps=2)

    def error(of, like):
        return relative_error(call(of, ids, use_cache=False).logits, call(like, ids, use_cache=False).logits)

    for _ in range(3):
        call(net, ids, use_cache=False)
    assert 0 < error(net, model) < 0.06 and session(model).plan is not None
    before = call(model, ids, use_cache=False).logits
    if how == "merge":
        model.merge_adapter()
        assert error(net, model) < 0.06
        model.unmerge_adapter()
    elif how == "disable":
        with model.disable_adapter():
            assert error(net, model) < 0.06
    elif how == "unload":
        merged = model.merge_and_unload()
        net = compiled(merged, calibration_steps=2)
        for _ in range(3):
            call(net, ids, use_cache=False)
        model = merged
    else:
        torch.manual_seed(7)
        other = lora(tiny_lm("llama", intermediate_size=112))
        for name, p in other.named_parameters():
            if "lora" in name:
                p.data.normal_(std=0.1)
        other.save_pretrained(tmp_path)
        hotswap.hotswap_adapter(net, str(tmp_path), adapter_name="default")
        assert relative_error(call(model, ids, use_cache=False).logits, before) > 0.1
    assert error(net, model) < 0.06
