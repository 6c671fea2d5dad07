"""Both kinds of checkpoints, of families of models: the function, the names, the numbers."""

from __future__ import annotations

import pytest
import torch
from checkpoint_cases import PLAIN, exported, planned, quantization, quantized_stage, weights
from conftest import relative_error
from families import run, some_slow

from sqcompile.passes.ir.graph import get_tensor
from sqcompile.plan.recipe import Recipe

FAMILIES = ["llama", "opt", "qwen2", "phi3", "gpt_neox", "gpt2", "gemma", "falcon 7b", "bert", "t5", "vit", "mixtral"]
HEADS = {"gpt_neox": "embed_out.weight"}  # as its files name them
DENSE = ["llama", "opt", "qwen2", "phi3", "gpt_neox"]
RECIPES = {
    "per token": PLAIN,
    "static": Recipe(0.5, activation="per_tensor_static"),
    "per tensor": Recipe(0.5, weight="per_tensor"),
}


@pytest.mark.parametrize("family", some_slow(FAMILIES, ("llama", "opt")))
def test_a_smoothed_checkpoint_is_the_same_function(family, tmp_path):
    model, call, _ = planned(family)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    config = model.config.to_dict()
    done = exported(family, "smoothed", tmp_path / "out")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.config.to_dict() == config
    again = type(model).from_pretrained(tmp_path / "out").eval()
    for y, reference in zip(run(again, call), run(model, call), strict=True):
        assert relative_error(y, reference) <= 1e-5
    smoothed = [l.name for l in done.plan.layers if l.smoothing == "folded"]
    assert len(smoothed) >= (2 if family == "bert" else 6)
    for name in smoothed:
        assert not torch.equal(again.get_parameter(name), model.get_parameter(name)), name
    assert {name for name, _ in again.named_parameters()} == {name for name, _ in model.named_parameters()}


def _cases():
    for family in DENSE:
        for recipe in RECIPES:
            quick = family == "llama" or (family, recipe) == ("opt", "static")
            yield pytest.param(family, recipe, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("family", "recipe"), _cases())
def test_int8_weights_and_scales_are_those_of_the_quantized_stage(family, recipe, tmp_path):
    model, _, _ = planned(family, RECIPES[recipe])
    done = exported(family, "compressed-tensors", tmp_path / "out", RECIPES[recipe])
    stage, found = quantized_stage(model, done.plan), weights(tmp_path / "out")
    quantized = {l.name for l in done.plan.layers if l.quantized}
    assert len(quantized) == len(done.plan.layers) - 1  # all but the head
    for l in done.plan.layers:
        if not l.quantized:
            continue
        name, owner = l.name, l.name.removesuffix(".weight")
        assert found[name].dtype == torch.int8 and torch.equal(found[name], get_tensor(stage, f"{name}_int8"))
        scale = found[f"{name}_scale"]
        assert scale.dtype == torch.float32
        assert scale.shape == ((1,) if recipe == "per tensor" else (l.shape[0], 1))
        assert torch.equal(scale.flatten(), get_tensor(stage, f"{name}_scale"))
        static = recipe == "static" and l.activation is None
        assert (f"{owner}.input_scale" in found) == static
        if static:
            assert found[f"{owner}.input_scale"].dtype == torch.float32
            assert found[f"{owner}.input_scale"].tolist() == pytest.approx([l.input_scale], rel=1e-7)
    ours = {HEADS.get(family, n) if n == "lm_head.weight" else n for n in model.state_dict()}
    float_names = {n for n, t in found.items() if n in ours and t.dtype == torch.float32}
    beside = {n for n in found if n.endswith(("_scale", ".input_scale"))}
    assert quantized | float_names | beside == found.keys()
    assert ours - found.keys() == ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    if family == "gpt_neox" and recipe == "static":  # nothing absorbs the scales of one of its linears
        dynamic = [f"gpt_neox.layers.{i}.mlp.dense_4h_to_h" for i in range(2)]
        others = [l.name.removesuffix(".weight") for l in done.plan.layers if l.input_scale]
        groups = [(dynamic, "per token"), (others, "static")]
    else:
        groups = [(["Linear"], recipe)]
    assert quantization(tmp_path / "out") == {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": _group(*group) for i, group in enumerate(groups)},
        "ignore": ["embed_out", "lm_head"] if family == "gpt_neox" else ["lm_head"],
        "kv_cache_scheme": None,
    }


def _group(targets, recipe):
    args = {"num_bits": 8, "type": "int", "symmetric": True}
    static = recipe == "static"
    return {
        "targets": targets,
        "weights": {**args, "strategy": "tensor" if recipe == "per tensor" else "channel", "dynamic": False},
        "input_activations": {**args, "strategy": "tensor" if static else "token", "dynamic": not static},
        "output_activations": None,
    }


def test_classes_that_transformers_cannot_run_in_int8_are_named(tmp_path):
    """FalconLinear multiplies by its weight itself."""
    done = exported("falcon 7b", "compressed-tensors", tmp_path / "falcon")
    assert [n for n in done.notes if "transformers cannot run it: FalconLinear has a forward of its own" in n]
    assert "sqcompile.load reads it" in str(done)
    assert not any("transformers cannot" in n for n in exported("opt", "compressed-tensors", tmp_path / "opt").notes)
