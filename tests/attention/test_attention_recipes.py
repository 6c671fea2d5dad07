"""INT8 attention: recipes, plans, reports, and where it is not worth it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import tiny_lm, token_batches
from families import build, resized
from test_attention_chains import operators, with_attention
from torch import nn

import sqcompile
from sqcompile import PRESETS, Recipe
from sqcompile.compiled import report
from sqcompile.errors import PlanError, RecipeError
from sqcompile.kernels import speedup
from sqcompile.passes.attention.chains import find_attentions
from sqcompile.plan.plan import Plan


def test_static_recipes_have_constant_scales():
    model, call = build("llama")
    compiled = with_attention(model, call, Recipe(activation="per_tensor_static", attention="qk_pv"))
    for plan in compiled.plan.attention:
        assert plan.q_scale is not None and plan.q_scale > 0 and plan.k_scale is not None
        assert compiled.plan.heads[f"{plan.name}/value_scale"].shape == (2, 16)
    quantized = compiled.stages["quantized"]
    for node in operators(quantized, "int8_scores"):  # constants, and factors of 1 or NaN
        assert node.args[1].args[1].op == node.args[3].args[1].op == "get_attr"
        assert [str(node.args[i].args[0].target) for i in (1, 3)] == [
            f"sqcompile.finite_{x}.default" for x in ("rows", "heads")
        ]
    assert all(n.args[2].args[1].op == "get_attr" for n in operators(quantized, "int8_attend"))
    assert not operators(quantized, "token_scale") and not operators(quantized, "scale_over")


@pytest.mark.parametrize(
    ("qk", "shape"), [("per_token", (2, 4, 11, 1)), ("per_head", (2, 4, 1, 1)), ("per_tensor", ())]
)
def test_granularity_of_queries(qk, shape):
    model, call = build("opt")
    compiled = with_attention(model, call, Recipe(attention="qk", qk=qk))
    (node, *_) = operators(compiled.stages["quantized"], "int8_scores")
    scale = node.args[1].meta["val"]
    assert scale.dtype == torch.float32 and scale.dim() == len(shape)
    assert all(isinstance(s, torch.SymInt) or s == want for s, want in zip(scale.shape, shape, strict=True))


def test_bad_recipes():
    for bad in (dict(attention="pv"), dict(attention="qk", qk="per_channel"), dict(qk="per_head")):
        with pytest.raises(RecipeError, match=next(reversed(bad))):
            Recipe(**bad)
    assert Recipe(attention="qk").granularity == "per_token"
    assert Recipe(attention="qk", activation="per_tensor_static").granularity == "per_tensor_static"
    assert PRESETS["default"].attention == "none"


def test_the_default_leaves_attention_alone():
    model, call = build("opt")
    compiled = with_attention(model, call, "default")
    assert compiled.plan.attention == () and compiled.plan.heads == {}
    assert "attention" not in [line.strip(":") for line in str(compiled.report).splitlines()]
    assert not operators(compiled.stages["lowered"], "int8_attention")


def test_skipping_a_module_keeps_its_attention_in_float():
    model, call = build("opt")
    recipe = Recipe(attention="qk", skip=("model.decoder.layers.1.self_attn",))
    compiled = with_attention(model, call, recipe)
    assert [a.quantized for a in compiled.plan.attention] == ["qk", "none"]
    assert "skipped by the recipe" in compiled.plan.attention[1].reason


def test_a_plan_keeps_what_was_decided_about_attention(tmp_path):
    model, call = build("llama")
    recipe = Recipe(activation="per_tensor_static", attention="qk_pv", alpha=(0.3, 0.5))
    compiled = with_attention(model, call, recipe)
    compiled.plan.save(tmp_path / "plan")
    plan = Plan.load(tmp_path / "plan")
    assert plan.attention == compiled.plan.attention and plan.recipe == recipe
    assert plan.heads.keys() == compiled.plan.heads.keys()
    assert all(torch.equal(t, compiled.plan.heads[k]) for k, t in plan.heads.items())
    again = sqcompile.compile(model, plan=plan, backend="eager")
    x = resized(call)
    assert torch.equal(again(**x).logits, compiled(**x).logits)
    other, _ = build("opt")
    with pytest.raises(PlanError):
        sqcompile.compile(other, plan=dataclasses.replace(plan, layers=compiled.plan.layers), example_inputs=call)


def test_the_report_has_a_line_for_each_attention():
    model, call = build("bert")
    compiled = with_attention(model, call, Recipe(attention="qk", alpha=(0.3, 0.5, 0.7)))
    lines = compiled.report.to_text(full=True).splitlines()
    at = lines.index("attention:")
    assert len(compiled.report.attention) == 2 and lines[-1] == "2 of 2 attentions in INT8"
    for i, plan in enumerate(compiled.report.attention):
        assert lines[at + 1 + i].strip().startswith(f"{plan.name}  int8 QKᵀ")
        assert plan.reason in lines[at + 1 + i] and f"{plan.sqnr_db:.1f} dB" in lines[at + 1 + i]


def test_min_speedup_keeps_slow_attention_in_float(monkeypatch):
    gains = {(1, 2048, 2048): 1.3, (1, 1, 2048): 0.9}
    monkeypatch.setattr(speedup, "expected_attention", lambda device, products, width: gains)
    for least, quantized in ((0.8, "qk"), (1.0, "none")):
        recipe = sqcompile.Recipe(attention="qk", min_speedup=least)
        plan = sqcompile.calibrate(tiny_lm("llama"), token_batches(), recipe=recipe, progress=False)
        assert [a.quantized for a in plan.attention] == [quantized] * 2
    assert "0.90x of bf16 with 1 x 1 queries of 2048 keys, less than 1.0x" in plan.attention[0].reason


def test_the_report_says_where_int8_attention_is_slower(monkeypatch):
    gains = {(1, 2048, 2048): 1.3, (1, 1, 2048): 0.9}
    monkeypatch.setattr(report, "expected_attention", lambda device, products, width: gains)
    recipe = sqcompile.Recipe(attention="qk_pv")
    compiled = sqcompile.compile(tiny_lm("llama"), token_batches(), recipe=recipe, backend="eager", progress=False)
    lines = str(compiled.report).split("\n")
    line = lines[lines.index("INT8 attention, expected speed against bf16:") + 1]
    assert line.startswith(
        "  2 x qk_pv, 16 channels: 1.30x with 1 x 2048 queries of 2048 keys, 0.90x with 1 x 1 queries"
    )
    assert "slower" in line and "min_speedup" in line
    assert speedup.expected_attention(torch.device("cpu"), "qk", 128) == {}


def test_a_cpu_has_no_kernel_for_int8_attention_and_the_report_says_so():
    model, batches = tiny_lm("llama"), token_batches(1)
    compiled = sqcompile.compile(model, batches, recipe="O1", backend="eager", progress=False)
    lines = str(compiled.report).split("\n")
    line = lines[lines.index("INT8 attention, expected speed against bf16:") + 1]
    assert line == (
        "  2 x qk_pv, 16 channels: in plain PyTorch, cpu has no kernel for it "
        "(slower: Recipe(min_speedup=1.0) leaves it in float)"
    )
    recipe = dataclasses.replace(sqcompile.PRESETS["O1"], min_speedup=1.0)
    plan = sqcompile.calibrate(model, batches, recipe=recipe, progress=False)
    assert [a.quantized for a in plan.attention] == ["none"] * 2 and sum(l.quantized for l in plan.layers) == 14
    assert plan.attention[0].reason == "INT8 is slower than float on cpu, which has no kernel for it"


def test_the_measured_speedups_of_the_h100(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    gains = speedup.expected_attention(torch.device("cuda", 0), "qk", 128)
    assert set(gains) == set(speedup.CALLS) and all(0.5 < gain < 3 for gain in gains.values())
    assert speedup.expected_attention(torch.device("cuda", 0), "qk", 512) == {}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_static_values_are_those_of_the_folded_graph(family):
    """v_proj -> o_proj divides V by s: its static scale is of what is left."""
    model, batches = tiny_lm(family), token_batches()
    recipe = Recipe(activation="per_tensor_static", attention="qk_pv", alpha=0.9)
    compiled = sqcompile.compile(model, batches, recipe=recipe, backend="eager", progress=False)
    assert any(
        "v_proj" in site or "qkv" in site or "c_attn" in site or "query_key_value" in site
        for site in compiled.plan.scales
    )
    folded = compiled.stages["folded"]
    values = [a.v for a in find_attentions(compiled.stages["traced"])]
    largest = {name: 0.0 for name in values}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n):
            out = super().run_node(n)
            if n.name in largest:
                here = out.float().abs().amax((0, 2)) / 127
                largest[n.name] = torch.maximum(torch.as_tensor(largest[n.name]), here)
            return out

    with torch.no_grad():
        for batch in batches:
            Watch(folded).run(*torch.utils._pytree.tree_leaves(batch))
    for plan, name in zip(compiled.plan.attention, values, strict=True):
        room = compiled.plan.heads[f"{plan.name}/value_scale"] / largest[name]  # one margin for unseen tokens
        torch.testing.assert_close(room, room.mean().expand_as(room), rtol=1e-3, atol=0)
        assert 1 <= room.mean() < 1.3


class Odd(nn.Module):
    """Attention that stays in float, for reasons that are found before its sizes are."""

    def __init__(self, attend):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.attend = attend

    def forward(self, x):
        return self.attend(*(f(x).unflatten(-1, (4, 8)).transpose(1, 2) for f in (self.q, self.k, self.v)), self.o)


def together(heads, o):
    return o(heads.transpose(1, 2).flatten(2))


def weights_read(q, k, v, o):
    p = (q @ k.mT).softmax(-1)
    return together(p @ v, o), p


ODD = {
    "weights are read elsewhere": weights_read,
    "does not run over the last dim": lambda q, k, v, o: together((q @ k.mT).softmax(-2) @ v, o),
    "a sum of several products": lambda q, k, v, o: together((q @ k.mT + k @ q.mT).softmax(-1) @ v, o),
    "not multiplied with values": lambda q, k, v, o: together((q @ k.mT).softmax(-1).relu().cumsum(-1) @ v, o),
}


@pytest.mark.parametrize("reason", ODD)
def test_a_plan_with_attention_that_is_refused_is_saved_and_used(reason, tmp_path):
    model, x = Odd(ODD[reason]).eval(), torch.randn(2, 7, 32)
    net = sqcompile.compile(model, [x], recipe="O1", backend="eager", progress=False)
    assert any(reason in a.reason for a in net.plan.attention)
    net.plan.save(tmp_path / "plan")
    plan = Plan.load(tmp_path / "plan")
    assert plan == net.plan
    again = sqcompile.compile(model, plan=plan, backend="eager", progress=False)
    net.save(tmp_path / "saved", progress=False)
    loaded = sqcompile.load(tmp_path / "saved", backend="eager")
    first = [y[0] if isinstance(y, tuple) else y for y in (net(x), again(x), loaded(x))]
    assert torch.equal(first[0], first[1]) and torch.equal(first[0], first[2])
