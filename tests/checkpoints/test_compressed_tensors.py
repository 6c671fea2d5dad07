"""INT8 checkpoints: what other engines cannot do is left in float or refused, and what they read is what we compute."""

from __future__ import annotations

import copy
import dataclasses
import os
import re

import pytest
import torch
from checkpoint_cases import (
    PLAIN,
    STATIC,
    exported,
    logits,
    planned,
    quantization,
    quantized_stage,
    weights,
    with_layers,
)
from conftest import relative_error, tiny_lm

import sqcompile
from sqcompile import Recipe
from sqcompile.checkpoints.export import export
from sqcompile.passes.ir.graph import get_tensor
from sqcompile.plan.entries import AttentionPlan

Q, K, V, O = (f"model.layers.0.self_attn.{n}_proj.weight" for n in "qkvo")


def float_in(done):
    return [l.name for l in done.plan.layers if not l.quantized]


ATTENTION = AttentionPlan("model.layers.0.self_attn", "qk", "none", "", shape=(4, 2, 16))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": Recipe(activation="per_tensor")}, "one dynamic scale for each input (activation='per_tensor')"),
        ({"recipe": Recipe(dtype="fp8")}, "the plan is of dtype='fp8', and this export of INT8"),
        (
            {"recipe": Recipe(attention="qk"), "attention": (ATTENTION,)},
            "the plan has INT8 attention, for which compressed-tensors has no format",
        ),
        ({"recipe": Recipe(overrides={"o_proj": {"activation": "per_tensor"}})}, "one dynamic scale for each input"),
    ],
)
def test_recipes_that_no_engine_runs_are_refused(changes, message, tmp_path):
    model, _, plan = planned("llama")
    if "one dynamic scale" in message and changes["recipe"].overrides:
        plan = with_layers(plan, o_proj={"activation": "per_tensor"})
    with pytest.raises(sqcompile.ArtifactError, match=re.escape(message)) as e:
        export(model, dataclasses.replace(plan, **changes), "compressed-tensors", tmp_path / "out")
    assert "calibrate with Recipe(activation='per_token', rotate='none')" in str(e.value)
    assert os.listdir(tmp_path) == []


def test_a_dtype_that_nobody_reads_is_refused(tmp_path):
    model, _, plan = planned("llama")
    model = copy.deepcopy(model).double()
    with pytest.raises(
        sqcompile.ArtifactError, match=r"of float64, which no engine reads: convert it, as by model.float"
    ):
        export(model, plan, "compressed-tensors", tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_linears_that_are_computed_as_one_need_one_scheme(tmp_path):
    model, _, plan = planned("llama")
    left = dict(quantized=False, smoothing="none", alpha=None)
    done = export(model, with_layers(plan, k_proj=left, down_proj=left), "compressed-tensors", tmp_path / "out")
    attention = [f"model.layers.{i}.self_attn.{n}_proj.weight" for i in (0, 1) for n in "qkv"]
    down = [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]
    assert set(float_in(done)) == {*attention, *down, "lm_head.weight"}
    assert [c.name for c in done.changed] == [n for n in attention if ".k_proj." not in n]
    assert (
        "  model.layers.{0..1}: q_proj, v_proj: stays in float, as linears that are computed as one need one scheme"
        in str(done).splitlines()
    )
    found = weights(tmp_path / "out")
    assert all(found[n].dtype == torch.float32 and f"{n}_scale" not in found for n in float_in(done))
    assert set(quantization(tmp_path / "out")["ignore"]) == {n.removesuffix(".weight") for n in float_in(done)}


def test_they_have_one_static_scale_the_largest(tmp_path):
    model, _, plan = planned("llama", STATIC)
    largest = 2.0 * next(l.input_scale for l in plan.layers if l.name == Q)
    layers = tuple(dataclasses.replace(l, input_scale=largest) if l.name == Q else l for l in plan.layers)
    done = export(model, dataclasses.replace(plan, layers=layers), "compressed-tensors", tmp_path / "out")
    what = "takes the largest static scale of the linears that are computed as one"
    assert [(c.name, c.what) for c in done.changed] == [(K, what), (V, what)]
    found = weights(tmp_path / "out")
    for name in (Q, K, V):
        assert found[name.replace("weight", "input_scale")].tolist() == pytest.approx([largest], rel=1e-7)
    assert found[O.replace("weight", "input_scale")].item() != pytest.approx(largest)


def test_scales_for_each_token_beside_static_ones(tmp_path):
    model, _, plan = planned("llama", STATIC)
    rotated = {"rotation": 16}
    plan = with_layers(plan, q_proj=rotated, k_proj=rotated, v_proj=rotated)
    done = export(model, plan, "compressed-tensors", tmp_path / "out")
    tokens = [l.name for l in done.plan.layers if l.quantized and l.input_scale is None]
    assert tokens == [f"model.layers.{i}.self_attn.{n}_proj.weight" for i in (0, 1) for n in "qkv"]
    said = str(done).splitlines()
    assert "  model.layers.{0..1}: q_proj, k_proj, v_proj: is not rotated, as no parameter can do that" in said
    assert (
        "  model.layers.{0..1}: q_proj, k_proj, v_proj: gets a scale for each token in the place of a static one, which "
        "was for another input"
    ) in said
    groups = quantization(tmp_path / "out")["config_groups"]
    by_kind = {g["input_activations"]["strategy"]: g["targets"] for g in groups.values()}
    assert by_kind["token"] == [n.removesuffix(".weight") for n in tokens]
    assert len(by_kind["tensor"]) == 8 and not {"Linear", *by_kind["token"]} & {*by_kind["tensor"]}
    found = weights(tmp_path / "out")
    assert {n.removesuffix(".input_scale") for n in found if n.endswith("input_scale")} == {*by_kind["tensor"]}


def test_a_tensor_s_scale_is_that_of_each_of_its_channels(tmp_path):
    model, _, plan = planned("llama")
    recipe = Recipe(0.5, overrides={"o_proj": {"weight": "per_tensor"}})
    plan = with_layers(plan, recipe, o_proj={"weight": "per_tensor"})
    done = export(model, plan, "compressed-tensors", tmp_path / "out")
    stage, found = quantized_stage(model, done.plan), weights(tmp_path / "out")
    assert get_tensor(stage, f"{O}_scale").shape == (1,)
    assert torch.equal(found[f"{O}_scale"], get_tensor(stage, f"{O}_scale").expand(64, 1))
    assert torch.equal(found[O], get_tensor(stage, f"{O}_int8"))
    assert quantization(tmp_path / "out")["config_groups"]["group_0"]["weights"]["strategy"] == "channel"


def test_the_head_stays_in_float(tmp_path):
    for family, head in (("llama", "lm_head.weight"), ("opt", "lm_head.weight")):
        recipe = Recipe(0.5, lm_head=True)
        done = exported(family, "compressed-tensors", tmp_path / family, recipe)
        assert float_in(done) == [head] and quantization(tmp_path / family)["ignore"] == ["lm_head"]
        assert done.changed[-1].what == "stays in float, as engines compute the projection to the vocabulary in float"


def experts_of(family, found, stage, e):
    """By the checkpoint's names, INT8 weights and scales of one expert as the quantized stage has them stacked."""
    up, down = (f"model.layers.0.mlp.experts.{n}" for n in ("gate_up_proj", "down_proj"))
    q, s = get_tensor(stage, f"{up}_int8")[e], get_tensor(stage, f"{up}_scale")[e]
    half = len(q) // 2
    last = get_tensor(stage, f"{down}_int8")[e], get_tensor(stage, f"{down}_scale")[e]
    parts = ((q[:half], s[:half]), (q[half:], s[half:]), last)
    if family == "mixtral":
        names = [f"model.layers.0.block_sparse_moe.experts.{e}.{n}" for n in ("w1", "w3", "w2")]
    else:
        names = [f"model.layers.0.mlp.experts.{e}.{n}_proj" for n in ("gate", "up", "down")]
    return dict(zip(names, parts, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_experts_are_written_one_by_one(family, tmp_path):
    model, _, _ = planned(family)
    done = exported(family, "compressed-tensors", tmp_path / "out")
    stage, found = quantized_stage(model, done.plan), weights(tmp_path / "out")
    for e in range(4):
        for name, (q, s) in experts_of(family, found, stage, e).items():
            assert torch.equal(found[f"{name}.weight"], q), name
            assert torch.equal(found[f"{name}.weight_scale"], s[:, None]), name
    assert not any("gate_up_proj" in name for name in found)
    gate = "block_sparse_moe.gate" if family == "mixtral" else "mlp.gate"
    ignore = quantization(tmp_path / "out")["ignore"]
    assert found[f"model.layers.0.{gate}.weight"].dtype == torch.float32
    assert {f"model.layers.{i}.{gate}" for i in (0, 1)} <= {*ignore} and "lm_head" in ignore


@pytest.mark.slow
def test_static_experts_get_a_scale_for_each_token(tmp_path):
    model, _, plan = planned("mixtral")
    step = {"input_scale": 0.1}
    plan = with_layers(plan, STATIC, self_attn=step, experts=step)
    done = export(model, plan, "compressed-tensors", tmp_path / "out")
    assert {l.activation for l in done.plan.layers if l.kind == "experts"} == {"per_token"}
    experts = [l.name for l in plan.layers if l.kind == "experts"]
    what = "gets a scale for each token in the place of a static one, as engines have no static scales of experts"
    assert sorted((c.name, c.what) for c in done.changed) == sorted((name, what) for name in experts)
    groups = quantization(tmp_path / "out")["config_groups"]
    token, static = groups["group_0"], groups["group_1"]
    assert token["targets"] == [rf"re:model\.layers\.{i}\.block_sparse_moe\.experts[.].*" for i in (0, 1)]
    assert len(static["targets"]) == 8 and "model.layers.0.self_attn.q_proj" in static["targets"]


@pytest.mark.slow
def test_experts_that_stay_in_float_are_ignored_whatever_their_names(tmp_path):
    model, _, plan = planned("mixtral")
    plan = with_layers(plan, gate_up_proj={"quantized": False, "smoothing": "none", "alpha": None})
    done = export(model, plan, "compressed-tensors", tmp_path / "out")
    assert {c.what for c in done.changed} == {
        "stays in float, as linears that are experts of one block need one scheme"
    }
    assert sum(l.quantized for l in done.plan.layers) == 8
    patterns = [i.removeprefix("re:") for i in quantization(tmp_path / "out")["ignore"] if i.startswith("re:")]
    for name in ("experts.0.w1", "experts.3.gate_proj"):
        assert any(re.match(p, f"model.layers.1.block_sparse_moe.{name}") for p in patterns)
    assert not any(re.match(p, "model.layers.1.self_attn.q_proj") for p in patterns)


@pytest.mark.slow
def test_what_is_no_module_of_linears_stays_in_float(tmp_path):
    model, _, plan = planned("gpt2")
    with pytest.raises(
        sqcompile.ArtifactError, match=r"no linear would be INT8 .*its weight is not that of an nn.Linear"
    ):
        export(model, plan, "compressed-tensors", tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_half_precision_keeps_scales_in_float32(tmp_path):
    model, call = tiny_lm("llama", torch.bfloat16), planned("llama")[1]
    plan = sqcompile.calibrate(model, [call], recipe=PLAIN, progress=False)
    export(model, plan, "compressed-tensors", tmp_path / "out")
    found, stage = weights(tmp_path / "out"), quantized_stage(model, plan)
    assert found[f"{Q}_scale"].dtype == torch.float32 and found["model.norm.weight"].dtype == torch.bfloat16
    assert torch.equal(found[Q], get_tensor(stage, f"{Q}_int8"))


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("llama", STATIC),
        ("opt", PLAIN),
        pytest.param("llama", PLAIN, marks=pytest.mark.slow),
        pytest.param("qwen2", Recipe(0.5, weight="per_tensor"), marks=pytest.mark.slow),
        pytest.param("phi3", STATIC, marks=pytest.mark.slow),
        pytest.param("gpt_neox", PLAIN, marks=pytest.mark.slow),
    ],
)
def test_transformers_reads_them(family, recipe, tmp_path):
    pytest.importorskip("compressed_tensors")
    model, call, _ = planned(family, recipe)
    done = exported(family, "compressed-tensors", tmp_path / "out", recipe)
    y, reference = logits(type(model).from_pretrained(tmp_path / "out").eval(), call), None
    with torch.no_grad():
        reference = quantized_stage(model, done.plan)(**call).logits
    cosine = torch.nn.functional.cosine_similarity(y.flatten(1).double(), reference.flatten(1).double())
    assert float(cosine.min()) >= 0.999
    if done.plan.recipe.activation == "per_tensor_static":  # their scales for tokens are absmax / 127.5, ours / 127
        assert relative_error(y, reference) <= 1e-5
    assert relative_error(y, logits(model, call)) > 1e-3  # which is not the float model
