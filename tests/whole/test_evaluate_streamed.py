"""Models in directories are evaluated piece by piece: the numbers of models in memory, each weight made once, and a bound on memory."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, token_ids

import sqcompile
from sqcompile.checkpoints.float_model import Checkpoint
from sqcompile.errors import ArtifactError, EvaluationError
from sqcompile.evaluation.streamed import Streamed
from sqcompile.passes.ir import pieces
from sqcompile.passes.ir.about import about

NOT_COMPARED = ("tokens_per_second", "float_tokens_per_second", "without_layers")


def data_of(call: dict[str, Any]) -> list[dict[str, Any]]:
    """Batches of two sizes; the last one has padding, where the model takes a mask."""
    found = [{**call, "input_ids": token_ids(shape, seed)} for seed, shape in enumerate([(2, 11), (3, 11), (2, 9)])]
    for batch in found:
        if "attention_mask" in call:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if "attention_mask" in call:
        found[-1]["attention_mask"][:, 7:] = 0
    return found


def saved(family: str, folder: Path, format: str, recipe: Any = None) -> list[dict[str, Any]]:
    """Writes the float model and the one in INT8, and gives data for them."""
    model, call = build(family)
    if format == "compressed-tensors":
        call = {**call, "attention_mask": torch.ones_like(call["input_ids"])}
    data = data_of(call)
    model.save_pretrained(folder / "float")
    plan = sqcompile.calibrate(model, data, recipe=recipe or sqcompile.Recipe(0.5), progress=False)
    sqcompile.export(model, plan, format, folder / "int8")
    return data


def assert_same(found: sqcompile.Evaluation, want: sqcompile.Evaluation) -> None:
    for field in dataclasses.fields(want):
        if field.name not in NOT_COMPARED:
            a, b = getattr(found, field.name), getattr(want, field.name)
            assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b, field.name


@pytest.mark.parametrize(
    ("family", "format", "recipe"),
    [
        ("llama", "sqcompile", None),
        ("llama", "sqcompile", "O3"),
        ("llama", "compressed-tensors", None),
        ("gpt2", "sqcompile", None),
        ("qwen2_moe", "sqcompile", None),
        ("bert", "sqcompile", None),
    ],
)
def test_the_numbers_are_those_of_models_in_memory(family, format, recipe, tmp_path, monkeypatch):
    """To the bit: the operators, their order and where the weights lie are the same."""
    data = saved(family, tmp_path, format, recipe)
    model, beside = sqcompile.load(tmp_path / "int8", backend="eager"), Checkpoint.open(str(tmp_path / "float")).load()
    want = sqcompile.evaluate(model, data, against=beside, layers=False, progress=False)
    assert want.kl or want.relative_error
    monkeypatch.setattr(pieces, "PIECE", 3)
    monkeypatch.setattr(pieces, "_SMALL", 1)
    for most in (pieces.MOST, 0, 3000) if family == "llama" and recipe is None else (0,):
        monkeypatch.setattr(pieces, "MOST", most)
        with sqcompile.memory_limit(2**40):
            found = sqcompile.evaluate(tmp_path / "int8", data, against=tmp_path / "float", progress=False)
        assert_same(found, want)
        assert found.tokens_per_second is None and found.without_layers.startswith("only what sqcompile.compile gave")
    if family == "llama" and recipe is None:
        assert_same(sqcompile.evaluate(str(tmp_path / "int8"), data, against=beside, progress=False), want)
        alone = sqcompile.evaluate(beside, data, progress=False)
        assert_same(sqcompile.evaluate(tmp_path / "float", data, progress=False), alone)


def test_a_weight_is_packed_once_and_is_gone_with_its_piece(tmp_path, monkeypatch):
    data = saved("llama", tmp_path, "sqcompile")
    model, made, alive = Streamed(tmp_path / "int8"), [], []
    gm = model._graph[0]
    lazy = about(gm).lazy

    def watched(name, make):
        tensors = make()
        made.append((name, weakref.ref(tensors[1])))  # the scales; a packed weight has no weak references
        alive.append(sum(ref() is not None for _, ref in made))
        return tensors

    for name, entry in lazy.items():
        lazy[name] = dataclasses.replace(entry, make=partial(watched, name, entry.make))
    assert len(lazy) > 6 and all(b.is_meta for n, b in gm.named_buffers() if n in lazy)
    monkeypatch.setattr(pieces, "PIECE", 3)
    sqcompile.evaluate(model, data, progress=False)
    assert sorted(n for n, _ in made) == sorted(lazy) and max(alive) == 3
    assert all(ref() is None for _, ref in made[:-3])


def test_pieces_are_bounded_by_the_bytes_of_their_weights(tmp_path, monkeypatch):
    saved("llama", tmp_path, "sqcompile")
    gm = Streamed(tmp_path / "int8")._graph[0]
    of = [[str(n.target) for n in piece if str(n.target) in about(gm).lazy] for piece in pieces._cut(gm)]
    assert max(map(len, of)) > 1
    monkeypatch.setattr(pieces, "MADE", 1)
    assert len(pieces._cut(gm)) >= len(about(gm).lazy)


def test_a_limit_ends_the_loader(tmp_path):
    data, taken = saved("llama", tmp_path, "sqcompile"), []

    def loader():
        for batch in data:
            taken.append(batch)
            yield batch

    found = sqcompile.evaluate(tmp_path / "int8", loader(), limit=4, progress=False)
    assert found.windows == 5 and len(taken) == 2
    assert_same(found, sqcompile.evaluate(tmp_path / "int8", data[:2], progress=False))


def test_what_cannot_be_evaluated_is_refused(tmp_path):
    data = saved("llama", tmp_path, "sqcompile")
    with pytest.raises(EvaluationError, match="against is quantized itself"):
        sqcompile.evaluate(tmp_path / "int8", data, against=tmp_path / "int8", progress=False)
    with pytest.raises(ArtifactError, match="is no directory: pass that of a model"):
        sqcompile.evaluate(tmp_path / "none", data, progress=False)
    with pytest.raises(EvaluationError, match="there is no data"):
        sqcompile.evaluate(tmp_path / "int8", [], progress=False)
    wrong = [*data[:1], {"input_ids": torch.full((2, 11), 10**6)}]
    with pytest.raises(EvaluationError, match="the model refuses batch 1: "):
        sqcompile.evaluate(tmp_path / "float", wrong, progress=False)
    with pytest.raises(sqcompile.SQCompileError, match="input_ids"):
        sqcompile.evaluate(tmp_path / "int8", wrong, progress=False)


# Of 16 layers of 1024 channels and a vocabulary of 16384: 500 MB in bf16.
_MADE = """
import sys, torch, sqcompile
from sqcompile.bench.large import generate, llama_config
generate(sys.argv[1], llama_config(1024, 16, 16384))
model = sqcompile.open_checkpoint(sys.argv[1])
plan = sqcompile.calibrate(model, [torch.arange(64)[None]], recipe=sqcompile.Recipe(0.5), progress=False)
sqcompile.export(model, plan, "sqcompile", sys.argv[1] + "/out")
"""
_EVALUATED = """
import json, sys, torch, sqcompile, transformers.models.llama.modeling_llama
from sqcompile.passes.ir import pieces
def memory(what):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(what))
pieces.MOST = 2**22
ids = torch.randint(0, 16384, (8, 64), generator=torch.Generator().manual_seed(0))
folder, most = sys.argv[1], int(sys.argv[2])
small = sqcompile.evaluate(sys.argv[3] + "/int8", ids[:1] % 50, against=sys.argv[3] + "/float", progress=False)
start = memory("VmRSS")
if most:
    with sqcompile.memory_limit(start + most):
        found = sqcompile.evaluate(folder + "/out", ids, against=folder, batch_size=2, progress=False)
else:
    model = sqcompile.load(folder + "/out", backend="eager")
    found = sqcompile.evaluate(model, ids, against=sqcompile.open_checkpoint(folder), batch_size=2, layers=False, progress=False)
print(json.dumps([memory("VmHWM") - start, found.losses.tolist(), found.float_losses.tolist(), found.kl]))
"""


@pytest.mark.slow
def test_memory_stays_below_the_limit(tmp_path):
    """Of the process, with an INT8 model and a float one that are each larger than the limit leaves room for."""
    saved("llama", tmp_path, "sqcompile")
    folder = tmp_path / "model"
    folder.mkdir()
    subprocess.run([sys.executable, "-c", _MADE, str(folder)], check=True)
    most = 256 * 2**20
    command = [sys.executable, "-c", _EVALUATED, str(folder)]
    within, without = (
        json.loads(subprocess.run([*command, str(m), str(tmp_path)], check=True, stdout=subprocess.PIPE).stdout)
        for m in (most, 0)
    )
    sizes = [sum(f.stat().st_size for f in d.glob("*.safetensors")) for d in (folder, folder / "out")]
    print(f"files of {[s >> 20 for s in sizes]} MiB, within {within[0] >> 20} MiB, without {without[0] >> 20} MiB")
    assert min(sizes) > most and without[0] > sum(sizes)
    assert within[0] < most
    assert within[1:] == without[1:]
