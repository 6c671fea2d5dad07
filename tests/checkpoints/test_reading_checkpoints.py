"""Loading INT8 checkpoints: the files' weights, the numbers of our own quantized stage, and refusals in words."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import struct
from collections import Counter

import pytest
import torch
from checkpoint_cases import PLAIN, STATIC, exported, masked, planned, weights
from conftest import relative_error
from families import build
from safetensors.torch import load_file, save_file

import sqcompile
from sqcompile.checkpoints.names import CheckpointNames
from sqcompile.checkpoints.read_model import read_model
from sqcompile.passes.ir.graph import get_tensor


@pytest.mark.parametrize("recipe", [PLAIN, STATIC], ids=["token", "static"])
@pytest.mark.parametrize("family", ["llama", "opt", "qwen2", "phi3", "gpt_neox"])
def test_an_export_is_loaded_with_the_numbers_of_the_quantized_stage(family, recipe, tmp_path):
    done = exported(family, "compressed-tensors", tmp_path / "out", recipe)
    loaded = sqcompile.load(tmp_path / "out", backend="eager")
    model, call, _ = planned(family, recipe)
    call = masked(call)
    ours = sqcompile.compile(model, plan=done.plan, example_inputs=call, backend="eager", progress=False)
    assert relative_error(loaded(**call).logits, ours(**call).logits) < 1e-3
    kernels, wanted = (
        Counter(str(n.target) for n in net.lowered.graph.nodes if n.op == "call_function") for net in (loaded, ours)
    )
    assert {k: n for k, n in kernels.items() if "sqcompile" in k} == {
        k: n for k, n in wanted.items() if "sqcompile" in k
    }
    quantized, found = loaded.stages["quantized"], weights(tmp_path / "out")
    held = {n.target: get_tensor(quantized, n.target) for n in quantized.graph.find_nodes(op="get_attr")}
    files = [t for t in found.values() if t.dtype == torch.int8]
    int8 = [t for t in held.values() if t.dtype == torch.int8]
    assert len(files) == len(int8) > 0
    assert all(any(torch.equal(a, b) for b in files) for a in int8)
    plan = {l.name: l.input_scale or 0.0 for l in loaded.plan.layers if l.quantized}
    want = {l.name: l.input_scale or 0.0 for l in done.plan.layers if l.quantized}
    assert plan == pytest.approx(want, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_experts_are_stacked_again(family, tmp_path):
    done = exported(family, "compressed-tensors", tmp_path / "out")
    loaded = sqcompile.load(tmp_path / "out", backend="eager")
    model, call, _ = planned(family)
    call = masked(call)
    ours = sqcompile.compile(model, plan=done.plan, example_inputs=call, backend="eager", progress=False)
    assert relative_error(loaded(**call).logits, ours(**call).logits) < 1e-3
    experts = [l.name for l in loaded.plan.layers if l.kind == "experts"]
    assert experts == [l.name for l in done.plan.layers if l.kind == "experts" and l.quantized] and len(experts) == 4
    got, want = loaded.stages["quantized"], ours.stages["quantized"]
    for name in experts:
        for suffix in ("int8", "scale"):
            assert torch.equal(get_tensor(got, f"{name}_{suffix}"), get_tensor(want, f"{name}_{suffix}"))


def rewritten(path, change):
    """The files with other tensors."""
    found = {n: t.clone() for n, t in weights(path).items()}
    change(found)
    for file in path.glob("*.safetensors*"):
        os.remove(file)
    save_file(found, path / "model.safetensors")


EXPERT = "model.layers.0.block_sparse_moe.experts.1.w3.weight"


@pytest.mark.slow
def test_experts_that_are_not_the_model_s_are_refused(tmp_path):
    path = tmp_path / "out"
    exported("mixtral", "compressed-tensors", path)
    for change, message in (
        (lambda f: f.pop(EXPERT), f"there is no tensor '{EXPERT}'"),
        (lambda f: f.pop(f"{EXPERT}_scale"), f"there is no tensor '{EXPERT}_scale'"),
        (lambda f: f.update({EXPERT: f[EXPERT][:-1].clone()}), f"{EXPERT} is I8 [111, 64], and I8 [112, 64] is wanted"),
    ):
        exported("mixtral", "compressed-tensors", path)
        rewritten(path, change)
        refused(path, message)
    exported("mixtral", "compressed-tensors", path)
    edited(path, lambda q: q["ignore"].append(EXPERT.removesuffix(".weight")))
    refused(path, "experts.gate_up_proj is quantized in several ways: export its experts in one")
    exported("mixtral", "compressed-tensors", path)
    edited(path, group("input_activations", strategy="tensor", dynamic=False))
    steps = [n.replace("weight_scale", "input_scale") for n in weights(path) if n.endswith("weight_scale")]
    rewritten(path, lambda found: found.update({n: torch.ones(1) for n in steps}))
    refused(path, "has experts with static scales, which are not read")


@pytest.mark.slow
def test_experts_in_float_stay_so(tmp_path):
    path = tmp_path / "out"
    exported("mixtral", "compressed-tensors", path)
    model = planned("mixtral")[0]
    floats = {n: t for n, t in CheckpointNames(model).convert(dict(model.state_dict())).items() if ".experts." in n}

    def in_float(found):
        for name in [n for n in found if ".experts." in n and n.endswith("_scale")]:
            del found[name]
        found.update({n: floats[n].clone() for n in found if ".experts." in n})

    rewritten(path, in_float)
    edited(path, lambda q: q["ignore"].append("re:.*[.]experts[.].*"))
    loaded = sqcompile.load(path, backend="eager")
    plan = {l.name: l for l in loaded.plan.layers if l.kind == "experts"}
    assert len(plan) == 4 and not any(l.quantized for l in plan.values())
    gm = loaded.stages["quantized"]
    for name in plan:
        assert torch.equal(get_tensor(gm, name), model.state_dict()[name])


def edited(path, change):
    """A config.json with another quantization_config."""
    config = json.loads((path / "config.json").read_text())
    change(config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))


def refused(path, message):
    with pytest.raises(sqcompile.ArtifactError, match=re.escape(message)):
        sqcompile.load(path, backend="eager")


def group(part, **changes):
    return lambda q: q["config_groups"]["group_0"][part].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(format="float-quantized"), "format='float-quantized', and only int-quantized is read"),
        (lambda q: q.update(quant_method="gptq"), "its quantization_config is not of compressed-tensors"),
        (lambda q: q.update(kv_cache_scheme={"num_bits": 8}), "has a kv_cache_scheme, which is not read"),
        (lambda q: q.update(sparsity_config={"format": "dense"}), "has a sparsity_config, which is not read"),
        (lambda q: q.update(config_groups={}), "has no config_groups"),
        (lambda q: q.update(ignore=["re:(a+)+$"]), "has the pattern 're:(a+)+$', which is not read"),
        (lambda q: q.update(ignore=["re:("]), "has the pattern 're:(', which is not read"),
        (group("weights", num_bits=4), "weights has num_bits='4', and only 8 is read"),
        (group("weights", type="float"), "weights has type='float', and only int is read"),
        (group("weights", symmetric=False), "weights has symmetric='False', and only True is read"),
        (group("weights", strategy="group"), "weights has strategy='group', and only channel or tensor is read"),
        (group("input_activations", strategy="tensor"), "input_activations has dynamic='True', and only False is read"),
        (group("input_activations", dynamic=False), "input_activations has dynamic='False', and only True is read"),
    ],
)
def test_other_schemes_are_refused_in_words(change, message, tmp_path):
    exported("llama", "compressed-tensors", tmp_path / "out")
    edited(tmp_path / "out", change)
    refused(tmp_path / "out", message)


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q), f"there is no tensor {Q!r}"),
        (lambda t: t.pop(f"{Q}_scale"), f"there is no tensor '{Q}_scale'"),
        (lambda t: t.update(more=torch.ones(1)), "the model has no place for the tensor 'more'"),
        (lambda t: t.update({Q: t[Q][:-1].clone()}), f"{Q} is I8 [63, 64], and I8 [64, 64] is wanted"),
        (lambda t: t.update({Q: t[Q].float()}), f"{Q} is F32 [64, 64], and I8 [64, 64] is wanted"),
        (lambda t: t[f"{Q}_scale"].fill_(float("nan")), f"{Q}_scale has scales that are not positive and finite"),
        (lambda t: t[f"{Q}_scale"].fill_(0.0), f"{Q}_scale has scales that are not positive and finite"),
        (lambda t: t["model.norm.weight"].fill_(float("inf")), "model.norm.weight has values that are not finite"),
    ],
)
def test_tensors_that_are_not_the_model_s_are_refused(change, message, tmp_path):
    path = tmp_path / "out"
    exported("llama", "compressed-tensors", path)
    rewritten(path, change)
    refused(path, message)


def test_scales_may_be_bfloat16(tmp_path):
    path = tmp_path / "out"
    exported("llama", "compressed-tensors", path)
    rewritten(path, lambda found: found.update({n: t.bfloat16() for n, t in found.items() if n.endswith("_scale")}))
    found = weights(path)
    gm = sqcompile.load(path, backend="eager").stages["quantized"]
    scale = get_tensor(gm, f"{Q}_scale")
    assert scale.dtype == torch.float32 and torch.equal(scale, found[f"{Q}_scale"].float().flatten())


def test_no_float_copy_of_an_int8_weight(tmp_path):
    exported("llama", "compressed-tensors", tmp_path / "out")
    loaded = sqcompile.load(tmp_path / "out", backend="eager")
    shapes = {l.shape for l in loaded.plan.layers if l.quantized}
    shapes -= {l.shape for l in loaded.plan.layers if not l.quantized}
    tensors = [*loaded.lowered.parameters(), *loaded.lowered.buffers()]
    assert shapes and not [t for t in tensors if t.is_floating_point() and tuple(t.shape) in shapes]


@pytest.mark.parametrize("damage", ["truncated", "header", "length"])
def test_damaged_files_are_refused(damage, tmp_path):
    path = tmp_path / "out"
    exported("llama", "compressed-tensors", path)
    file = next(path.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    if damage == "truncated":
        data = data[: len(data) // 2]
    elif damage == "header":
        data[8] ^= 1
    else:
        data[:8] = struct.pack("<Q", 2**63)
    file.write_bytes(data)
    refused(path, f"{file.name} cannot be read")


@pytest.mark.slow
def test_damage_anywhere_is_an_error_in_one_sentence_or_a_model(tmp_path):
    """What a flipped bit of a weight is, no one can say: these files have no checksums."""
    whole, path, r = tmp_path / "whole", tmp_path / "out", random.Random(0)
    exported("llama", "compressed-tensors", whole)
    names = [f.name for f in whole.iterdir() if f.name == "config.json" or "safetensors" in f.name]
    refusals = 0
    for i in range(40):
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(whole, path)
        file = path / r.choice(names)
        data = bytearray(file.read_bytes())
        if i % 2:
            data = data[: r.randrange(len(data))]
        else:
            data[r.randrange(min(len(data), 3000))] ^= 1 << r.randrange(8)
        file.write_bytes(data)
        try:
            read_model(str(path))
        except sqcompile.ArtifactError as e:
            refusals += 1
            assert "\n" not in str(e) and len(str(e)) < 1000
    assert refusals >= 20


def test_of_a_file_and_an_index_the_file_is_read_as_transformers_does(tmp_path):
    model, call = build("llama")
    model.save_pretrained(tmp_path / "net")
    half = {n: t * 0.5 for n, t in load_file(tmp_path / "net" / "model.safetensors").items()}
    save_file(half, tmp_path / "net" / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(half, "model-00001-of-00001.safetensors")}
    (tmp_path / "net" / "model.safetensors.index.json").write_text(json.dumps(index))
    theirs = type(model).from_pretrained(tmp_path / "net")
    ours = sqcompile.open_checkpoint(tmp_path / "net")
    with torch.no_grad():
        assert torch.equal(theirs(**call).logits, model(**call).logits)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), model.parameters(), strict=True))


def test_links_and_other_directories_are_refused(tmp_path):
    path = tmp_path / "out"
    exported("llama", "compressed-tensors", path)
    file = next(path.glob("*.safetensors"))
    file.rename(tmp_path / "elsewhere.safetensors")
    file.symlink_to(tmp_path / "elsewhere.safetensors")
    refused(path, f"{file.name} is a link, or no file")
    file.unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {Q: "../elsewhere.safetensors"}}))
    refused(path, "names '../elsewhere.safetensors', which is no file of the directory")


@pytest.mark.parametrize(
    ("field", "number", "message"),
    [
        ("num_hidden_layers", 10**9, "num_hidden_layers=1000000000, more than any model has"),
        ("hidden_size", 10**12, "hidden_size=1000000000000, more than any model has"),
        ("model_type", "nothing", "transformers has no model_type 'nothing'"),
        ("dtype", "int8", "its dtype is 'int8'"),
        ("architectures", ["LlamaForTokenClassification"], "only causal language models are read"),
    ],
)
def test_configurations_that_fit_no_model_are_refused(field, number, message, tmp_path):
    path = tmp_path / "out"
    exported("llama", "compressed-tensors", path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, field: number}))
    refused(path, message)
