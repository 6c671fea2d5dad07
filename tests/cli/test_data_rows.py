"""Which rows a model of a directory is calibrated and evaluated on: nothing that is no token of the data's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from cli_cases import FAST, SMALL, embedder, jsonl, llama, run, save, translator

from sqcompile.checkpoints.float_model import Checkpoint
from sqcompile.cli.batches import Asked, batches, windows
from sqcompile.cli.samples import texts
from sqcompile.cli.terminal import CommandError
from sqcompile.errors import ArtifactError
from sqcompile.lm import load_tokenizer


def rows(folder: Path, data: Path, count: int = 8, **asked):
    checkpoint = Checkpoint.open(str(folder))
    return batches(Asked(str(data), count, **asked), checkpoint, checkpoint.load)


@pytest.mark.parametrize("ends", [2, [2, 9]])
def test_a_decoder_reads_no_padding(tmp_path: Path, monkeypatch, ends):
    """Rows that end at one place are a batch of their own."""
    data, folder = jsonl(tmp_path / "texts.jsonl"), translator(tmp_path / "float")
    checkpoint = Checkpoint.open(str(folder))
    model = checkpoint.load()
    written = torch.tensor([[0, 7, 8, 2, 0], [0, 2, 0, 0, 0], [0, 5, 6, 7, 8], [0, 3, 4, 2, 0], [0, 9, 4, 4, 2]])
    model.generation_config.eos_token_id = ends
    monkeypatch.setattr(model, "generate", lambda **inputs: written)
    found = batches(Asked(str(data), 5, batch_size=5), checkpoint, lambda: model)
    tokenizer = load_tokenizer()
    inputs = tokenizer([*texts(str(data), str, True, None)][:5], padding=True, truncation=True, max_length=512)
    want = [(4, [0, 3]), (5, [2, 4]), (2, [1])] if ends == 2 else [(2, [1, 4]), (4, [0, 3]), (5, [2])]
    assert len(found) == len(want)
    for batch, (length, which) in zip(found, want, strict=True):
        assert torch.equal(batch["decoder_input_ids"], written[which][:, :length])
        for name in ("input_ids", "attention_mask"):
            assert batch[name].tolist() == [inputs[name][i] for i in which]


def test_a_seed_takes_windows_of_one_text_at_random(tmp_path: Path):
    (tmp_path / "a.txt").write_text(" ".join(f"name{i}" for i in range(3000)))
    folder = llama(tmp_path / "float")

    def taken(seed):
        return torch.cat([b["input_ids"] for b in rows(folder, tmp_path / "a.txt", 4, seed=seed)]).tolist()

    first, one, other = taken(None), taken(0), taken(1)
    assert one == taken(0) and len({str(x) for x in (first, one, other)}) == 3
    whole = windows(texts(str(tmp_path / "a.txt"), str, False, None), load_tokenizer(), 64, Asked("", 10**6)).tolist()
    assert first == whole[:4] and all(row in whole for row in one + other)


def test_a_chat_that_begins_with_bos_has_one(tmp_path: Path):
    tokenizer = load_tokenizer()
    text = [tokenizer.bos_token + "def f(x): return x\n" * 40]
    found = windows(text, tokenizer, 16, Asked("", 2))
    assert found[:, 0].tolist() == [tokenizer.bos_token_id] * 2 and found[0, 1] != tokenizer.bos_token_id


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_is_a_sentence_without_its_end(tmp_path: Path, end: str):
    (tmp_path / "a.txt").write_bytes(f"one{end}two {end}{end}three".encode())
    assert [*texts(str(tmp_path / "a.txt"), str, True, None)] == ["one", "two ", "three"]
    assert [*texts(str(tmp_path / "a.txt"), str, False, None)] == ["one\ntwo \n\nthree"]


@pytest.mark.parametrize("where", ["tokenizer", "sentence_bert_config.json"])
def test_rows_are_as_long_as_sentence_transformers_has_them(tmp_path: Path, where: str):
    folder, data = embedder(tmp_path / "float"), jsonl(tmp_path / "texts.jsonl")
    longest = max(b["input_ids"].shape[1] for b in rows(folder, data))
    inner = folder / "0_Transformer"
    if where == "tokenizer":
        tokenizer = load_tokenizer()
        tokenizer.model_max_length = 16
        tokenizer.save_pretrained(inner)
    else:
        (inner / where).write_text('{"max_seq_length": 16}')
    assert longest > 16 == max(b["input_ids"].shape[1] for b in rows(folder, data))
    assert max(b["input_ids"].shape[1] for b in rows(folder, data, seq_len=20)) == 20  # who asks for more gets it


def test_the_places_of_a_table_that_no_token_has_do_not_count(tmp_path: Path):
    """RoBERTa's table of positions begins with two of those."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    tokenizer.model_max_length = 64
    config = transformers.RobertaConfig(
        vocab_size=2048, pad_token_id=1, num_labels=3, max_position_embeddings=66, **SMALL
    )
    folder = save(transformers.RobertaForSequenceClassification(config), tmp_path / "float", tokenizer)
    (tmp_path / "a.txt").write_text("def f(x): return x + 1 " * 60)
    assert rows(folder, tmp_path / "a.txt")[0]["input_ids"].shape == (1, 64)
    done = run("quantize", folder, "--calib", tmp_path / "a.txt", "-o", tmp_path / "out", *FAST)
    assert done.exit_code == 0, done.output


def test_options_that_would_do_nothing_are_refused(tmp_path: Path):
    folder, data = llama(tmp_path / "float"), tmp_path / "ids.npy"
    np.save(data, np.random.default_rng(0).integers(3, 2000, (6, 32)))
    with pytest.raises(CommandError, match=r"--seq-len 16: the rows of .*ids.npy have 32 tokens"):
        rows(folder, data, seq_len=16)
    assert rows(folder, data, seq_len=32)[0]["input_ids"].shape == (6, 32)
    with pytest.raises(ArtifactError, match="the dtype 'int8' is none: choose auto"):
        Checkpoint.open(str(folder)).load("int8")
    for command, said in (
        (["quantize", folder, "--calib", data, "-o", tmp_path / "out", "--model-dtype", "bf16"], "the dtype 'bf16' is none"),
        (["eval", folder, "--text", data, "--backend", "tvm"], "--backend tvm: choose eager or inductor"),
        (["generate", folder, "-p", "x", "--backend", "tvm"], "--backend tvm: choose eager or inductor"),
        (["generate", folder, "-p", "x", "--tokenizer", tmp_path / "no"], "there is no such directory"),
        (["generate", tmp_path / "no", "-p", "x"], "there is no directory"),
    ):  # fmt: skip
        found = run(*command, "-q")
        assert found.exit_code == 2 and said in found.output and found.output.count("\n") == 1, found.output
