"""Smoothed checkpoints: the same float function, loaded by transformers alone, and nothing of the model changed."""

from __future__ import annotations

import json
import os

import pytest
import torch
from checkpoint_cases import STATIC, exported, logits, planned, quantized_stage, weights
from conftest import relative_error, tiny_lm
from families import build, token_ids
from transformers import AutoModelForCausalLM, AutoTokenizer

import sqcompile
from sqcompile import Recipe, export
from sqcompile.checkpoints import directory
from sqcompile.checkpoints import export as export_module
from sqcompile.files.directory import MARK
from sqcompile.lm.load import DATA, load_tokenizer
from sqcompile.passes.planning import shifts


def loaded(model, path):
    return type(model).from_pretrained(path).eval()


@pytest.mark.slow
def test_the_files_have_the_names_that_transformers_writes(tmp_path):
    for family in ("mixtral", "opt"):
        model, _, _ = planned(family)
        exported(family, "smoothed", tmp_path / family)
        model.save_pretrained(tmp_path / f"{family} itself")
        ours, theirs = weights(tmp_path / family), weights(tmp_path / f"{family} itself")
        assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in weights(tmp_path / "mixtral")


def test_what_no_parameter_can_do_is_left_out_and_said(tmp_path):
    recipe = Recipe("auto", rotate=16, activation="per_tensor_static")
    model, call, plan = planned("gpt_neox", recipe)
    assert any(l.smoothing == "multiplied" for l in plan.layers)
    done = exported("gpt_neox", "smoothed", tmp_path / "out", recipe)
    lines = str(done).splitlines()
    assert "  gpt_neox.layers.{0..1}: dense_4h_to_h: is not smoothed, as no parameter can absorb 1/s" in lines
    assert any("query_key_value" in l and l.endswith("is not rotated, as no parameter can do that") for l in lines)
    assert not any(l.rotation or l.smoothing == "multiplied" for l in done.plan.layers)
    given = {l.name: l for l in plan.layers}
    for l in done.plan.layers:  # a static scale of the rotated, or smoothed, input is none of the input as it is
        as_it_was = l.smoothing == given[l.name].smoothing and l.rotation == given[l.name].rotation
        assert l.input_scale == (given[l.name].input_scale if as_it_was else None)
        assert as_it_was or l.activation == "per_token"
    assert relative_error(logits(loaded(model, tmp_path / "out"), call), logits(model, call)) <= 1e-5


def test_a_tied_head_would_need_two_values(tmp_path):
    model, call, plan = planned("opt", Recipe(0.5, lm_head=True))
    assert {l.name: l.smoothing for l in plan.layers}["lm_head.weight"] == "folded"
    done = exported("opt", "smoothed", tmp_path / "out", Recipe(0.5, lm_head=True))
    assert {l.name: l.smoothing for l in done.plan.layers}["lm_head.weight"] == "none"
    assert [(c.name, c.what) for c in done.changed] == [
        (
            "lm_head.weight",
            "is not smoothed, as model.decoder.embed_tokens.weight = lm_head.weight is read by embedding, too, and would "
            "need two values",
        )
    ]
    again = loaded(model, tmp_path / "out")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert relative_error(logits(again, call), logits(model, call)) <= 1e-5


def test_an_untied_head_is_smoothed(tmp_path):
    model, call, _ = planned("llama", Recipe(0.5, lm_head=True))
    done = exported("llama", "smoothed", tmp_path / "out", Recipe(0.5, lm_head=True))
    again = loaded(model, tmp_path / "out")
    assert done.changed == () and not torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert relative_error(logits(again, call), logits(model, call)) <= 1e-5


def test_scales_of_attention_heads_are_parameters_too(tmp_path):
    model, call, plan = planned("llama", Recipe(0.5, attention="qk_pv"))
    assert any(name.endswith("/scale") for name in plan.heads)
    plain = exported("llama", "smoothed", tmp_path / "plain")
    done = exported("llama", "smoothed", tmp_path / "out", Recipe(0.5, attention="qk_pv"))
    assert done.changed == plain.changed == () and done.plan.heads.keys() == plan.heads.keys()
    again = loaded(model, tmp_path / "out")
    q = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(again.get_parameter(q), weights(tmp_path / "plain")[q])
    assert relative_error(logits(again, call), logits(model, call)) <= 1e-5


def test_half_precision_is_rounded_once(tmp_path):
    model = tiny_lm("llama", torch.bfloat16)
    call = planned("llama")[1]
    plan = sqcompile.calibrate(model, [call], recipe=Recipe(0.5), progress=False)
    export(model, plan, "smoothed", tmp_path / "out")
    found = weights(tmp_path / "out")
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    name = "model.layers.0.self_attn.q_proj.weight"
    s = next(s for site, s in plan.scales.items() if name in site)
    assert torch.equal(found[name], (model.get_parameter(name).float() * s).bfloat16())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert loaded(model, tmp_path / "out").dtype == torch.bfloat16


def test_what_is_beside_the_weights_is_copied(tmp_path):
    model = tiny_lm("llama")
    model.save_pretrained(tmp_path / "source")
    load_tokenizer(DATA).save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "generation_config.json").write_text('{"max_new_tokens": 3}')
    (tmp_path / "source" / "secrets.txt").write_text("not the model's")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source").eval()
    call = planned("llama")[1]
    plan = sqcompile.calibrate(model, [call], recipe=Recipe(0.5), progress=False)
    done = export(model, plan, "smoothed", tmp_path / "out")
    assert done.notes == () and not (tmp_path / "out" / "secrets.txt").exists()
    assert (tmp_path / "out" / "generation_config.json").read_text() == '{"max_new_tokens": 3}'
    text = "def f(x): return x"
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")(text)["input_ids"]
    assert ids == load_tokenizer(DATA)(text)["input_ids"]
    bare = export(planned("llama")[0], plan, "smoothed", tmp_path / "bare")
    assert bare.notes == ("no tokenizer is beside the weights: the model was not loaded from a directory, pass source",)
    given = export(planned("llama")[0], plan, "smoothed", tmp_path / "bare", source=tmp_path / "source")
    assert given.notes == () and (tmp_path / "bare" / "tokenizer.json").exists()


def test_large_models_are_several_files(tmp_path, monkeypatch):
    model, call, plan = planned("llama")
    monkeypatch.setattr(directory.Weights.__init__, "__defaults__", (100_000,))
    done = export(model, plan, "smoothed", tmp_path / "out")
    files = sorted(f for f in os.listdir(tmp_path / "out") if f.endswith(".safetensors"))
    assert len(files) == 4 and files[0] == "model-00001-of-00004.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == done.bytes == sum(p.numel() * 4 for p in model.parameters())
    assert relative_error(logits(loaded(model, tmp_path / "out"), call), logits(model, call)) <= 1e-5


def test_an_export_replaces_an_export_and_nothing_else(tmp_path):
    model, _, plan = planned("llama")
    (tmp_path / "out").mkdir()
    exported("llama", "smoothed", tmp_path / "out")  # an empty directory
    (tmp_path / "out" / "vocab.old").write_text("")
    exported("llama", "compressed-tensors", tmp_path / "out")
    assert not (tmp_path / "out" / "vocab.old").exists()
    os.remove(tmp_path / "out" / MARK)
    with pytest.raises(sqcompile.ArtifactError, match="has other files in it, which would be removed"):
        export(model, plan, "smoothed", tmp_path / "out")
    assert "model.safetensors" in os.listdir(tmp_path / "out")


def test_what_cannot_be_exported_is_said(tmp_path):
    model, _, plan = planned("llama")

    def refused(match, *args, **kwargs):
        with pytest.raises(sqcompile.ArtifactError, match=match):
            export(*args, **kwargs)
        assert os.listdir(tmp_path) == ["a file"]

    (tmp_path / "a file").write_text("")
    refused(
        "there is no format 'gguf': choose one of sqcompile, compressed-tensors, smoothed, onnx, pt2",
        model,
        plan,
        "gguf",
        tmp_path / "out",
    )
    refused("a Linear has no configuration to write", torch.nn.Linear(2, 2), plan, "smoothed", tmp_path / "out")
    refused("there is no directory .*: make it first", model, plan, "smoothed", tmp_path / "none" / "out")
    refused("is no directory: pass the path of a new one", model, plan, "smoothed", tmp_path / "a file")
    refused("the path is 3: pass a string", model, plan, "smoothed", 3)
    refused("source is 3: pass the path", model, plan, "smoothed", tmp_path / "out", source=3)
    refused("there is no such directory", model, plan, "smoothed", tmp_path / "out", source=tmp_path / "none")
    with pytest.raises(sqcompile.PlanError, match="the plan has no linear"):
        export(planned("qwen3")[0], planned("phi3")[2], "smoothed", tmp_path / "out")
    with pytest.raises(sqcompile.PlanError):
        export(model, None, "smoothed", tmp_path / "out")
    assert os.listdir(tmp_path) == ["a file"]


def test_nothing_is_left_of_a_checkpoint_that_cannot_be_finished(tmp_path, monkeypatch):
    model, _, plan = planned("llama")
    exported("llama", "smoothed", tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "write_config", full)
    with pytest.raises(sqcompile.ArtifactError, match=r"No space left on device.*on a disk with room"):
        export(model, plan, "compressed-tensors", tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_a_parameter_that_leaves_its_dtype_is_refused(tmp_path):
    model = tiny_lm("llama", torch.float16)
    call = planned("llama")[1]
    plan = sqcompile.calibrate(model, [call], recipe=Recipe(0.5), progress=False)
    site = next(site for site in plan.scales if "q_proj" in site)
    plan.scales[site][1] = 2.0**30
    with pytest.raises(
        sqcompile.ArtifactError, match=r"does not fit torch.float16 once it is smoothed: load the model in"
    ):
        export(model, plan, "smoothed", tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_plan_on_the_disk_and_a_static_one(tmp_path):
    model, _, plan = planned("llama", STATIC)
    plan.save(tmp_path / "plan")
    done = export(model, tmp_path / "plan", "smoothed", str(tmp_path / "out"))
    assert done.plan == plan and done.path == str(tmp_path / "out")
    assert str(done).splitlines()[0].endswith("12 of 15 linears smoothed, 0.3 MB")


@pytest.mark.parametrize(("family", "kept"), [("opt", {"q_proj", "k_proj", "v_proj", "fc1"}), ("falcon 7b", set())])
def test_shifts_are_written_where_the_checkpoint_has_the_biases(family, kept, tmp_path, monkeypatch):
    monkeypatch.setattr(shifts, "GAIN", float("inf"))
    model, call = build(family)
    recipe = Recipe(0.5, shift=True, lm_head=True, activation="per_tensor_static")
    plan = sqcompile.calibrate(model, [call], recipe=recipe, progress=False)
    assert "lm_head.weight" in plan.shifts  # which has no bias, and falcon's others have none
    done = export(model, plan, "smoothed", tmp_path / "out")
    assert {n.split(".")[-2] for n in done.plan.shifts} == kept
    dropped = plan.shifts.keys() - done.plan.shifts.keys()
    assert {c.name for c in done.changed if c.what.startswith("keeps the mean of its input: ")} == dropped
    assert all(l.input_scale is None for l in done.plan.layers if l.name in dropped)
    done.plan.check()
    assert relative_error(logits(loaded(model, tmp_path / "out"), call), logits(model, call)) <= 1e-5


def test_what_cannot_be_shifted_in_a_checkpoint_is_smoothed_as_it_is(tmp_path):
    """s of X - c would magnify c."""
    model, _ = build("falcon 7b")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "layernorm" in name and name.endswith("bias"):
                p[3::16] += 20
    x = token_ids((4, 11), seed=5)
    errors = {}
    for shift in (False, True):
        recipe = Recipe(0.5, shift=shift)
        plan = sqcompile.calibrate(
            model, [{"input_ids": token_ids((16, 11), s)} for s in range(8)], recipe=recipe, progress=False
        )
        done = export(model, plan, "compressed-tensors", tmp_path / str(shift))
        assert bool(plan.shifts) == shift and not done.plan.shifts
        with torch.no_grad():
            got = quantized_stage(model, done.plan)(input_ids=x).logits
            errors[shift] = relative_error(got, model(input_ids=x).logits)
    assert errors[True] <= 1.1 * errors[False]
