"""The shipped language model: its data files, its corpus split, and that it predicts held-out code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path, PurePosixPath

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import sqcompile
from sqcompile.lm import (
    CALIBRATION,
    HELD_OUT,
    calibration_texts,
    corpus,
    evaluation_texts,
    load_lm,
    token_windows,
    train,
    training_files,
)
from sqcompile.lm.load import DATA


@pytest.fixture(scope="module")
def lm() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    return load_lm()


def test_data_folder_is_small() -> None:
    assert {file.name for file in DATA.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    assert sum(file.stat().st_size for file in DATA.iterdir()) <= 6_000_000
    assert {weight.dtype for weight in load_file(DATA / "model.safetensors").values()} == {torch.float16}


def test_architecture(lm: tuple[LlamaForCausalLM, PreTrainedTokenizerFast]) -> None:
    model, tokenizer = lm
    assert sum(p.numel() for p in model.parameters()) == 2_755_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.training and model.dtype == torch.float32
    assert model.config.use_cache and model.generation_config.use_cache  # else `generate` reads every token anew
    assert model.config.num_key_value_heads == 2
    assert model.config.vocab_size == len(tokenizer) == 2048
    assert (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id) == (
        tokenizer.pad_token_id,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    )


def test_training_builds_the_shipped_architecture() -> None:
    fresh = train.build_model(DATA).config.to_dict()
    shipped = json.loads((DATA / "config.json").read_text())
    for key in set(fresh) & set(shipped) - {"transformers_version"}:
        assert fresh[key] == shipped[key], key


def test_dtype() -> None:
    model, _ = load_lm(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_missing_or_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_lm(folder=tmp_path)
    shutil.copyfile(DATA / "config.json", tmp_path / "config.json")
    save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="embed_tokens"):
        load_lm(folder=tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n\treturn x  # two  spaces \n\n\n",
        "naïve Ωmega 漢字 🐍 \u200b \x00 \r\n",
        "    'it''s' , don 't . ?",
        " ",
        "",
    ],
)
def test_tokenizer_round_trip(lm: tuple[LlamaForCausalLM, PreTrainedTokenizerFast], text: str) -> None:
    tokenizer = lm[1]
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokenizer_pads(lm: tuple[LlamaForCausalLM, PreTrainedTokenizerFast]) -> None:
    tokenizer = lm[1]
    assert tokenizer.pad_token_id is not None
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    batch = tokenizer(["import os", "x"], padding=True, return_tensors="pt")
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["input_ids"][1, -1] == tokenizer.pad_token_id
    # The padding just asked for must not reach later windows.
    windows = token_windows(["x\n" * 20, "y"], tokenizer, 8)
    assert not (windows == tokenizer.pad_token_id).any()


def test_held_out_modules_are_not_trained_on() -> None:
    names = {file.as_posix() for file in training_files()}
    assert len(names) > 100
    assert names.isdisjoint(HELD_OUT)
    assert names.issuperset(CALIBRATION)
    assert not any("test_argparse" in name or "test_json" in name or "test_dataclasses" in name for name in names)
    assert not any("site-packages" in name for name in names)
    assert len(evaluation_texts()) == len(HELD_OUT) and len(calibration_texts()) == len(CALIBRATION)
    assert set(evaluation_texts()).isdisjoint(calibration_texts())


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("argparse.py", True),
        ("test/test_argparse.py", True),
        ("test/test_json/test_decode.py", True),
        ("test/test_logging.py", True),
        ("json/encoder.py", False),
        ("asyncio/subprocess.py", False),
        ("test/test_ast.py", False),
    ],
)
def test_is_held_out(path: str, expected: bool) -> None:
    assert corpus.is_held_out(PurePosixPath(path)) is expected


def test_library_without_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path / "python311.zip"))
    with pytest.raises(FileNotFoundError, match="standard library sources not found"):
        evaluation_texts()


def test_token_windows(lm: tuple[LlamaForCausalLM, PreTrainedTokenizerFast]) -> None:
    tokenizer = lm[1]
    windows = token_windows(["a = 1\n" * 50, "b = 2\n" * 50], tokenizer, 16)
    assert windows.dtype == torch.int64 and windows.shape[1] == 16
    assert (windows[:, 0] == tokenizer.bos_token_id).all()
    assert (windows[:, 1:] == tokenizer.eos_token_id).sum() >= 1
    some = token_windows(["a = 1\n" * 50, "b = 2\n" * 50], tokenizer, 16, limit=3)
    assert some.shape == (3, 16) and torch.equal(some[0], windows[0])
    assert "b" in tokenizer.decode(some[-1])
    for bad in ({"length": 1}, {"length": 16, "limit": 0}, {"length": 10_000}):
        with pytest.raises(ValueError, match=r"length|limit|too few"):
            token_windows(["a = 1\n"], tokenizer, **bad)


def test_predicts_held_out_code(lm: tuple[LlamaForCausalLM, PreTrainedTokenizerFast]) -> None:
    model, tokenizer = lm
    windows = token_windows(evaluation_texts(), tokenizer, 512, limit=16)
    # Measured 12.76 with the library of Python 3.11; the held-out modules differ a little between versions.
    found = sqcompile.evaluate(model, windows, progress=False).perplexity
    assert found is not None and 5 < found < 16


def test_training_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(corpus.__file__).read_text()
    monkeypatch.setattr(train, "training_files", lambda: ["a"])
    monkeypatch.setattr(train, "read_texts", lambda files: [source] * 2)
    monkeypatch.setattr(train, "evaluation_texts", lambda: [source])
    arguments = ["--steps", "2", "--batch", "1", "--device", "cpu", "--warmup", "1"]
    for _ in range(2):  # the second time from the cache
        train.main([*arguments, "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache.safetensors")])
    model, tokenizer = load_lm(folder=tmp_path / "out")
    assert tokenizer.decode(tokenizer("π = 3")["input_ids"], skip_special_tokens=True) == "π = 3"
    assert torch.isfinite(model(input_ids=torch.tensor([[1, 2, 3]])).logits).all()
