"""Models over mapped checkpoint files: the same numbers and the same artifacts as in memory, and damaged files."""

from __future__ import annotations

import filecmp
import gc
import json
import os
import subprocess
import sys

import pytest
import torch
from checkpoint_cases import weights
from families import CAUSAL, FAMILIES, build, causal_lm, roughen, run, some_slow, token_ids
from safetensors.torch import load_file, save, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

import sqcompile
from sqcompile.errors import ArtifactError, RecipeError
from sqcompile.files.beside import FLOAT_CONFIG
from sqcompile.files.weights import CODES, Later, write_weights
from sqcompile.process import memory

MAPS = "/proc/self/maps"


def written(family, path, dtype=torch.float32, **kwargs):
    """A tiny checkpoint, and a call of its model."""
    if family == "tied":
        model, call = (
            causal_lm("llama", {**CAUSAL["llama"][1], "tie_word_embeddings": True}),
            {"input_ids": token_ids()},
        )
    else:
        model, call = build(family)
    roughen(model.eval()).to(dtype).save_pretrained(path, **kwargs)
    make = (
        AutoModelForCausalLM if family in CAUSAL or family == "tied" else AutoModel if family == "bert" else type(model)
    )
    return make, {n: t.to(dtype) if t.is_floating_point() else t for n, t in call.items()}


def in_files(t):
    """Whether the memory of a tensor is that of a file."""
    with open(MAPS) as f:
        for line in f:
            first, last = (int(x, 16) for x in line.split()[0].split("-"))
            if first <= t.data_ptr() < last:
                return len(line.split()) > 5 and line.split()[5].startswith("/")
    return False


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["tied", *FAMILIES])
def test_the_same_model_as_from_pretrained_bit_by_bit(family, dtype, tmp_path):
    make, call = written(family, tmp_path, dtype, max_shard_size="60KB")
    ours, theirs = sqcompile.open_checkpoint(tmp_path, make), make.from_pretrained(tmp_path)
    assert type(ours) is type(theirs) and not ours.training
    assert all(same(a, b) for a, b in zip(run(ours, call), run(theirs, call), strict=True))
    for a, b in ((ours.state_dict(), theirs.state_dict()), (dict(ours.named_buffers()), dict(theirs.named_buffers()))):
        assert list(a) == list(b) and all(same(a[n], b[n]) for n in a)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]  # those that are tied
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert all(in_files(p) for p in ours.parameters())


@pytest.mark.parametrize("family", ["llama", "qwen2_moe", "bert"])
def test_another_dtype_is_written_once_to_a_file_without_a_name(family, tmp_path):
    make, call = written(family, tmp_path / "model")
    (tmp_path / "spool").mkdir()
    ours = sqcompile.open_checkpoint(tmp_path / "model", make, dtype=torch.bfloat16, temporary=tmp_path / "spool")
    theirs = make.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert all(same(a, b) for a, b in zip(run(ours, call), run(theirs, call), strict=True))
    assert all(in_files(p) for p in ours.parameters())
    assert not os.listdir(tmp_path / "spool")
    with open(MAPS) as f:
        assert str(tmp_path / "spool") in f.read()
    del ours
    gc.collect()
    with open(MAPS) as f:
        assert str(tmp_path / "spool") not in f.read()


def test_a_class_or_a_function_makes_the_model(tmp_path):
    _, call = written("llama", tmp_path)
    want = run(AutoModelForCausalLM.from_pretrained(tmp_path), call)
    for make in (LlamaForCausalLM, lambda config: LlamaForCausalLM(config)):
        assert all(same(a, b) for a, b in zip(run(sqcompile.open_checkpoint(tmp_path, make), call), want, strict=True))
    with pytest.raises(ArtifactError, match="a _Tied is no model of transformers"):
        sqcompile.open_checkpoint(tmp_path, lambda config: _Tied(2, 2))


class _Tied(nn.Linear):
    def tie_weights(self):
        pass


def test_the_base_of_a_model_with_a_head_and_names_of_old(tmp_path):
    written("bert", tmp_path / "base")
    from transformers import BertForMaskedLM

    whole = BertForMaskedLM(AutoModel.from_pretrained(tmp_path / "base").config).eval()
    whole.save_pretrained(tmp_path / "whole")
    file = tmp_path / "whole" / "model.safetensors"
    old = {n.replace("LayerNorm.weight", "LayerNorm.gamma"): t for n, t in load_file(file).items()}
    old["bert.embeddings.position_ids"] = torch.arange(64)[None]
    save_file(old, file, {"format": "pt"})
    base = AutoModel.from_pretrained(tmp_path / "whole", add_pooling_layer=False)
    for make, theirs in (
        (lambda config: type(base)(config, add_pooling_layer=False), base),
        (BertForMaskedLM, BertForMaskedLM.from_pretrained(tmp_path / "whole")),
    ):
        ours = sqcompile.open_checkpoint(tmp_path / "whole", make).state_dict()
        assert list(ours) == list(theirs.state_dict())
        assert all(same(ours[n], t) for n, t in theirs.state_dict().items())
    with pytest.raises(ArtifactError, match=r"there is no tensor 'pooler.dense.bias' in its files \(2 such\)"):
        sqcompile.open_checkpoint(tmp_path / "whole", AutoModel)


@pytest.mark.parametrize("recipe", ["default", "O3"])
@pytest.mark.parametrize("family", some_slow(["llama", "qwen2_moe", "opt", "bert"], ()))
def test_the_artifact_is_that_of_a_model_in_memory_byte_for_byte(family, recipe, tmp_path):
    make, call = written(family, tmp_path / "model", torch.bfloat16 if family == "llama" else torch.float32)
    batches = [{**call, "input_ids": token_ids(seed=seed)} for seed in range(3)]
    loaded = make.from_pretrained(tmp_path / "model")
    sqcompile.compile(loaded, batches, recipe=recipe, backend="eager", progress=False).save(tmp_path / "saved")
    with sqcompile.memory_limit(2**40):
        mapped = sqcompile.open_checkpoint(tmp_path / "model", make)
        plan = sqcompile.calibrate(mapped, batches, recipe=recipe, progress=False)
        done = sqcompile.export(mapped, plan, "sqcompile", tmp_path / "exported")
    names = sorted(os.listdir(tmp_path / "saved"))
    # What an export takes along of the checkpoint's directory: the configuration, and whatever text needs.
    beside = {n for n in os.listdir(tmp_path / "model") if n == "generation_config.json"} | {FLOAT_CONFIG}
    assert {*names, *beside} == {*os.listdir(tmp_path / "exported")} and len(names) == 3
    assert filecmp.cmp(tmp_path / "model" / "config.json", tmp_path / "exported" / FLOAT_CONFIG, shallow=False)
    assert filecmp.cmpfiles(tmp_path / "saved", tmp_path / "exported", names, shallow=False) == (names, [], [])
    assert done.bytes == os.path.getsize(tmp_path / "exported" / "model-00001-of-00001.safetensors")


@pytest.mark.parametrize("family", some_slow(["llama", "mixtral"], ("llama",)))
@pytest.mark.parametrize("format", ["compressed-tensors", "smoothed"])
def test_checkpoints_are_those_of_a_model_in_memory(family, format, tmp_path):
    make, call = written(family, tmp_path / "model")
    ours, theirs = sqcompile.open_checkpoint(tmp_path / "model", make), make.from_pretrained(tmp_path / "model")
    plan = sqcompile.calibrate(ours, [call], recipe=sqcompile.Recipe(0.5), progress=False)
    for model, name in ((ours, "ours"), (theirs, "theirs")):
        sqcompile.export(model, plan, format, tmp_path / name)
    names = [n for n in sorted(os.listdir(tmp_path / "ours")) if n != "sqcompile_export.json"]
    assert "model.safetensors" in names
    assert filecmp.cmpfiles(tmp_path / "ours", tmp_path / "theirs", names, shallow=False) == (names, [], [])
    assert weights(tmp_path / "ours")


def _config(path, **changes):
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _tensors(path, change):
    file = path / "model.safetensors"
    found = load_file(file)
    change(found)
    save_file(found, file, {"format": "pt"})


def _truncate(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _link(path):
    os.rename(path / "model.safetensors", path / "other")
    os.symlink(path / "other", path / "model.safetensors")


def _index(path, file):
    names = dict.fromkeys(load_file(path / "model.safetensors"), file)
    os.remove(path / "model.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


NORM, HEAD = "model.norm.weight", "lm_head.weight"
DAMAGES = {
    "no such directory": (lambda p: os.rename(p, f"{p}.moved"), "there is no such directory"),
    "no config": (lambda p: os.remove(p / "config.json"), "config.json cannot be read"),
    "a model of nobody": (lambda p: _config(p, model_type="nobody"), "transformers has no model_type 'nobody'"),
    "code of its own": (
        lambda p: _config(p, model_type="mine", auto_map={"AutoConfig": "mine.Config"}),
        "code of a checkpoint is never run",
    ),
    "quantized": (lambda p: _config(p, quantization_config={}), "its weights are quantized already"),
    "absurd sizes": (lambda p: _config(p, hidden_size=2**40), "more than any model has"),
    "another width": (lambda p: _config(p, intermediate_size=96), r"float32 \[64, 112\], and the model has float32 \[64, 96\]"),
    "more layers": (lambda p: _config(p, num_hidden_layers=3), r"there is no tensor 'model.layers.2.input_layernorm.weight'"),
    "fewer layers": (lambda p: _config(p, num_hidden_layers=1), "the model has no place for the tensor 'model.layers.1"),
    "missing": (lambda p: _tensors(p, lambda t: t.pop(HEAD)), r"there is no tensor 'lm_head.weight' in its files \(1 such\)"),
    "too many": (lambda p: _tensors(p, lambda t: t.update(more=torch.ones(3))), "has no place for the tensor 'more'"),
    "integers": (lambda p: _tensors(p, lambda t: t.update({NORM: torch.ones(64, dtype=torch.int8)})), "is int8"),
    "truncated": (_truncate, "is of no dtype and place that a file has"),
    "a link": (_link, "model.safetensors is a link"),
    "elsewhere": (lambda p: _index(p, "../model.safetensors"), "is no file of the directory"),
    "not there": (lambda p: _index(p, "other.safetensors"), "other.safetensors cannot be read"),
    "a pickle": (lambda p: os.rename(p / "model.safetensors", p / "pytorch_model.bin"), "which is not read: load it in"),
    "nothing": (lambda p: os.remove(p / "model.safetensors"), "only weights in safetensors are read"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_refused_in_one_sentence(damage, tmp_path):
    written("llama", tmp_path / "model")
    change, message = DAMAGES[damage]
    change(tmp_path / "model")
    with pytest.raises(ArtifactError, match=message) as e:
        sqcompile.open_checkpoint(tmp_path / "model")
    assert "\n" not in str(e.value) and str(e.value).startswith(f"{tmp_path / 'model'} cannot be opened")


def test_an_expert_that_is_missing_is_refused(tmp_path):
    written("mixtral", tmp_path)
    _tensors(tmp_path, lambda t: t.pop("model.layers.1.block_sparse_moe.experts.2.w1.weight"))
    with pytest.raises(ArtifactError, match="transformers cannot make"):
        sqcompile.open_checkpoint(tmp_path)


def test_wrong_arguments_are_refused(tmp_path):
    written("llama", tmp_path)
    with pytest.raises(ArtifactError, match=r"dtype=torch\.int8: pass torch\.float32"):
        sqcompile.open_checkpoint(tmp_path, dtype=torch.int8)
    with pytest.raises(ArtifactError, match="the path of a checkpoint is 3"):
        sqcompile.open_checkpoint(3)
    with pytest.raises(ArtifactError, match="make room, or name a directory on another disk with temporary="):
        sqcompile.open_checkpoint(tmp_path, dtype=torch.float16, temporary=tmp_path / "nowhere")
    for most in (0, -1, 1.5, True, "6GiB"):
        with pytest.raises(RecipeError, match="pass a number of bytes"), sqcompile.memory_limit(most):
            pass


def resident_bytes(mapped):
    """Bytes of a mapping that are in the process's memory."""
    with open("/proc/self/smaps") as f:
        lines = f.read().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(f"{mapped.address:x}-"))
    return next(int(line.split()[1]) * 1024 for line in lines[at:] if line.startswith("Rss:"))


def test_dropped_pages_come_back_and_written_ones_stay(tmp_path):
    values = torch.arange(2**20, dtype=torch.int32)
    values.numpy().tofile(tmp_path / "file")
    with open(tmp_path / "file", "rb") as f:
        mapped = memory.Mapped.of(f.fileno(), values.nbytes)
    t = mapped.tensor(0, torch.int32, (2**10, 2**10))
    assert torch.equal(t.flatten(), values) and resident_bytes(mapped) == values.nbytes
    t[100, 7] = -5
    memory.give_back()
    assert resident_bytes(mapped) == 4096
    values[100 * 2**10 + 7] = -5
    assert torch.equal(t.flatten(), values)
    t[:] = 1
    memory.give_back()
    assert bool((t == 1).all())
    assert torch.equal(torch.frombuffer(bytearray((tmp_path / "file").read_bytes()), dtype=torch.int32)[:5], values[:5])


def test_files_of_weights_are_those_of_safetensors(tmp_path):
    generator = torch.Generator().manual_seed(0)
    names = ["b", 'ä"\\\n', "a", *(str(d) for d in CODES)]
    tensors = {n: torch.randint(0, 2, (3, 5), generator=generator).to(d) for n, d in zip(names, [torch.float32, torch.int8, torch.float32, *CODES], strict=True)}  # fmt: skip
    tensors |= {"none": torch.ones(0, 3), "scalar": torch.tensor(2.5)}
    made = []

    def make(name):
        made.append(name)
        return tensors[name]

    later = {n: Later(t.dtype, tuple(t.shape), lambda n=n: make(n)) for n, t in tensors.items()}
    for i, metadata in enumerate((None, {"format": "pt"})):
        write_weights(str(tmp_path / f"now{i}"), tensors, metadata)
        write_weights(str(tmp_path / f"later{i}"), later, metadata)
        assert (tmp_path / f"now{i}").read_bytes() == (tmp_path / f"later{i}").read_bytes() == save(tensors, metadata)
    assert made == 2 * list(tensors)
    with pytest.raises(ArtifactError, match=r"x is of torch\.complex128, which safetensors files do not have"):
        write_weights(str(tmp_path / "no"), {"x": torch.ones(1, dtype=torch.complex128)})


_LARGE = """
import sys, torch, sqcompile, transformers.models.llama.modeling_llama
from sqcompile.bench.large import generate, llama_config, quantize
batches = [torch.randint(0, 1000, (1, 32))]
small, large, most = sys.argv[1], sys.argv[2], int(sys.argv[3])
before = quantize(small, "alpha=0.5", 2**34, 1, 64)["peak"]          # what is imported and compiled stays
print(before, quantize(large, "alpha=0.5", before + most, 1, 64)["peak"])
"""


@pytest.mark.slow
def test_the_process_stays_within_its_limit(tmp_path):
    from sqcompile.bench.large import generate, llama_config

    most = 100 * 2**20
    sizes = []
    for name, hidden, layers in (("small", 128, 12), ("large", 1024, 12)):
        (tmp_path / name).mkdir()
        sizes.append(generate(str(tmp_path / name), llama_config(hidden, layers, 1000)))
    assert sizes[1] > 2.5 * most
    command = [sys.executable, "-c", _LARGE, str(tmp_path / "small"), str(tmp_path / "large"), str(most)]
    before, peak = map(int, subprocess.run(command, check=True, capture_output=True).stdout.split()[-2:])
    assert peak < before + most + 100 * 2**20  # of weights at hand, and what is not worth to be looked for
