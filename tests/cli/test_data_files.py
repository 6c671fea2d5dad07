"""Files of data: what is read of them, and what of those that are damaged is said."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from cli_cases import (
    FAST,
    jsonl,
    llama,
    recordings,
    run,
)

import sqcompile
from sqcompile.cli.samples import sounds, texts
from sqcompile.lm import load_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model, and texts."""
    folder = tmp_path_factory.mktemp("made")
    llama(folder / "float")
    jsonl(folder / "texts.jsonl")
    return folder


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": 3}\n', 'line 2 of .* has no "text" and no "messages"'),
        ("a.jsonl", '{"text": "x"}\nx\n', "line 2 of .* is no JSON"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "x"}]}\n', "line 1 of .*: its messages make no text"),
        ("a.jsonl", '{"text": "x"}\n', "has 2 tokens, too few for one window of 64"),
        ("a.jsonl", '{"text": ""}\n' * 99, "has 0 tokens|has no text|has nothing in it"),
        ("a.jsonl", '{"text": "\\ud800 abc"}\n' * 99, "is no text: it has half of a surrogate pair"),
        ("a.txt", b"\xff\xfe\x00", "cannot be read as UTF-8"),
        ("a.npy", b"\x80\x04K\x01.", "cannot be read .* save an array of token ids"),
        ("a.parquet", b"PAR1", "a.parquet (needs pyarrow: pip install pyarrow|cannot be read)"),
    ],
)
def test_damaged_data_is_named(made: Path, tmp_path: Path, name: str, content, says: str):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    found = run("quantize", made / "float", "--calib", tmp_path / name, "-o", tmp_path / "out", "-q")
    assert found.exit_code == 2 and re.search(says, found.output), found.output
    assert found.output.count("\n") == 1


def test_token_ids_are_checked(made: Path, tmp_path: Path):
    for array, says in (
        (np.zeros((2, 65), np.int64), "rows of 65 tokens"),
        (np.full((2, 8), 2048), "token id 2048"),
        (np.full((2, 8), -1), "token id -1"),
        (np.zeros((2, 8)), "2x8 float64"),
        (np.zeros(8, np.int64), "8 int64"),
        (np.array([["a"]], object), "cannot be read"),
    ):
        np.save(tmp_path / "ids.npy", array, allow_pickle=True)
        found = run("quantize", made / "float", "--calib", tmp_path / "ids.npy", "-o", tmp_path / "out", "-q")
        assert found.exit_code == 2 and says in found.output, found.output


def test_messages_become_texts_by_the_chat_template(tmp_path: Path):
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}) + "\n")
    tokenizer = load_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    found = texts(str(tmp_path / "chat.jsonl"), lambda m: tokenizer.apply_chat_template(m, tokenize=False), False, None)
    assert [*found] == ["<user>hi"]


def test_no_more_is_read_than_is_asked_for(made: Path, tmp_path: Path):
    """The second half of the file is no JSON, and nobody notices."""
    (tmp_path / "long.jsonl").write_text((made / "texts.jsonl").read_text() + "no JSON\n")
    args = ("--calib", tmp_path / "long.jsonl", "--seq-len", 16, "-o", tmp_path / "out", *FAST)
    assert run("quantize", made / "float", "--samples", 8, *args).exit_code == 0
    assert "is no JSON" in run("quantize", made / "float", *args).output


def test_sounds_are_read_as_they_are(tmp_path: Path):
    folder = recordings(tmp_path / "wavs", 1, 8000)
    (found,) = sounds(str(folder), 8000, None)
    assert found.dtype == np.float32 and len(found) == 8000 and 0.1 < np.abs(found).max() <= 1.0
    with pytest.raises(sqcompile.SQCompileError, match="has 8000 samples a second, and the model takes 16000"):
        next(sounds(str(folder), 16000, None))
