"""``sqcompile eval`` and ``sqcompile generate``: what they say of a quantized and of a float model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from cli_cases import FAST, TEXTS, jsonl, quantized, run, save, translator

import sqcompile
from sqcompile.checkpoints.float_model import Checkpoint
from sqcompile.cli.generate import Asked, tokens
from sqcompile.lm import load_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(tmp_path_factory.mktemp("made"))


def test_eval_beside_the_float_model(made: Path):
    held = made / "held.txt"
    held.write_text("\n".join(reversed(TEXTS)))
    found = run("eval", made / "out", "--text", held, "--against", made / "float", "--samples", 8, "--json", "-q")
    assert found.exit_code == 0, found.output
    said = json.loads(found.stdout)
    assert said["windows"] == 8 and said["tokens"] == 8 * 63
    want = sqcompile.evaluate(
        sqcompile.load(made / "out", backend="eager"), "\n".join(reversed(TEXTS)), tokenizer=load_tokenizer(), length=64,
        against=Checkpoint.open(str(made / "float")).load(), layers=False, progress=False,
    )  # fmt: skip
    assert want.kl is not None and 0 < said["kl"] < 3 * want.kl and abs(said["increase"]) < 5
    alone = run("eval", made / "out", "--text", held, "--samples", 4, "--seq-len", 32, "-q")
    assert alone.exit_code == 0 and "perplexity" in alone.output and "4 windows, 124 predictions" in alone.output


@pytest.mark.parametrize("out", ["out", "float"])
def test_eval_within_a_limit_of_memory_says_the_same(out: str, made: Path):
    """Of a quantized model beside the float one, and of either alone."""
    for beside in (["--against", made / "float"] if out == "out" else [], []):
        command = ["eval", made / out, "--text", made / "texts.jsonl", *beside, "--samples", 6, "--json", "-q"]
        want, found = (run(*command, *limit) for limit in ([], ["--max-memory", "1TiB"]))
        assert found.exit_code == want.exit_code == 0, found.output + want.output
        a, b = ({k: v for k, v in json.loads(x.stdout).items() if "second" not in k} for x in (want, found))
        assert a == b and a["perplexity"] > 1
    for wrong, said in ((["--backend", "inductor"], "leave out --backend inductor"), (["--max-memory", "9"], "limit")):
        refused = run("eval", made / out, "--text", made / "texts.jsonl", "--max-memory", "1TiB", *wrong)
        assert refused.exit_code == (2 if "leave" in said else 0) and said in refused.output


@pytest.mark.parametrize("format", ["sqcompile", "compressed-tensors"])
def test_eval_takes_no_more_tokens_than_the_model(format: str, made: Path):
    """A model with rotary positions would compute something beyond them, too."""
    out = made / f"of-{format}"
    alike = ("--calib", made / "texts.jsonl", "--format", format, *FAST)
    assert run("quantize", made / "float", *alike, "-o", out).exit_code == 0
    most = json.loads((made / "float" / "config.json").read_text())["max_position_embeddings"]
    assert (out / "config.json").exists() == (format == "compressed-tensors")
    text = made / "texts.jsonl"
    for length in (most, most + 1):
        found = run("eval", out, "--text", text, "--seq-len", length, "--samples", 2, "-q")
        assert found.exit_code == (0 if length == most else 2), found.output
    assert f"--seq-len {most + 1}: the model takes {most} tokens at most" in found.output
    ids = len(load_tokenizer()("def f")["input_ids"])
    for count in (most - ids + 1, most - ids + 2):  # the last token is not read
        found = run("generate", out, "--prompt", "def f", "-n", count, "-q")
        assert found.exit_code == (0 if ids + count == most + 1 else 2), found.output
    assert f"the model cannot go on after {most} tokens: it takes no more" in found.output
    np.save(made / "long.npy", np.full((2, most + 1), 7))
    found = run("eval", out, "--text", made / "long.npy", "-q")
    beside = out / "float_config.json"
    assert beside.exists() == (format == "sqcompile")
    if beside.exists():
        beside.write_text('{"model_type": "of code that is never run", "max_position_embeddings": [1]}')
        assert run("eval", out, "--text", text, "--seq-len", 32, "--samples", 2, "-q").exit_code == 0
    assert found.exit_code == 2 and f"rows of {most + 1} tokens, and the model takes {most} at most" in found.output


def test_generate_writes_what_the_model_says(made: Path):
    found = run("generate", made / "out", "--prompt", "def f", "-n", 5, "--json", "-q")
    assert found.exit_code == 0, found.output
    said = json.loads(found.stdout)
    tokenizer, model = load_tokenizer(), sqcompile.load(made / "out", backend="eager")
    ids = tokenizer("def f", return_tensors="pt")["input_ids"]
    want = []
    with torch.no_grad():
        for _ in range(5):
            want.append(int(model(input_ids=ids).logits[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor([want[-1:]])], 1)
    assert said["tokens"] == want and said["text"] == tokenizer.decode(want, skip_special_tokens=True)
    streamed = run("generate", made / "out", "--prompt", "def f", "-n", 5, "-q")
    assert streamed.stdout == "def f" + said["text"] + "\n"
    drawn = [
        run("generate", made / "out", "-p", "def", "-n", 6, "--temperature", 5, "--seed", s, "--json", "-q")
        for s in (1, 1, 2)
    ]
    first, same, other = (json.loads(d.stdout)["tokens"] for d in drawn)
    assert first == same != other


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--prompt", "\udcff"), "is no text: it has half of a surrogate pair"),
        (("--prompt", "x", "--temperature", "1e-300"), "--temperature 1e-300: pass 0, or at least 0.0001"),
        (("--prompt", "x", "--seed", str(10**30)), "9223372036854775807"),
    ],
)
def test_what_generate_refuses(made: Path, options, says: str):
    found = run("generate", made / "float", *options, "-n", 2)
    assert found.exit_code == 2 and says in found.output, found.output


def test_generate_beyond_the_table_of_positions(tmp_path: Path):
    """One sentence, with what was written before."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=2048, **sizes))
    save(model, tmp_path / "gpt2", load_tokenizer())
    found = run("generate", tmp_path / "gpt2", "--prompt", "x", "-n", 40)
    assert found.exit_code == 2 and re.search(r"error: the model cannot go on after 1[567] tokens", found.output)


def test_generate_of_a_float_model_has_a_cache(made: Path):
    found = run("generate", made / "float", "--prompt", "def f", "-n", 12, "--json", "-q")
    assert found.exit_code == 0, found.output
    model: Any = Checkpoint.open(str(made / "float")).load()
    ids = load_tokenizer()("def f", return_tensors="pt")["input_ids"]
    want = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert json.loads(found.stdout)["tokens"] == want[0, ids.shape[1] :].tolist()
    told = run("generate", made / "float", "--prompt", "def f", "-n", 12, "--temperature", 1, "--seed", 3)
    assert "tokens/s with a KV cache" in told.output
    drawn = tokens(model, ids, Asked("", 12, 1.0, 3), [])  # without one, of the same seed
    assert load_tokenizer().decode(list(drawn), skip_special_tokens=True) in told.output


@pytest.mark.parametrize("out", ["float", "out"])
def test_generate_ends_where_the_model_does(out: str, tmp_path: Path, made: Path):
    """With more than one end, as chat models have them, in generation_config.json."""
    folder = shutil.copytree(made / out, tmp_path / "model")
    command = ("generate", folder, "--prompt", "def f", "-n", 12, "--json", "-q")
    written = json.loads(run(*command).stdout)["tokens"]
    assert len(written) == 12
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, written[4]]}))
    assert json.loads(run(*command).stdout)["tokens"] == written[: written.index(written[4])]


def test_generate_of_a_model_without_a_static_cache_says_each_token_once(tmp_path: Path):
    """ALiBi's mask is another one, so that all text is run again for each token."""
    torch.manual_seed(0)
    config = transformers.BloomConfig(
        vocab_size=2048, hidden_size=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1
    )
    model = transformers.BloomForCausalLM(config)
    folder, tokenizer = save(model, tmp_path / "float", load_tokenizer()), load_tokenizer()
    ids = tokenizer("def f", return_tensors="pt")["input_ids"]
    want = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :].tolist()
    found = run("generate", folder, "--prompt", "def f", "-n", 5, "--json", "-q")
    assert json.loads(found.stdout)["tokens"] == want
    told: list[int] = []
    with pytest.raises(sqcompile.GenerationError, match="ALiBi"):
        sqcompile.generate(model, ids, max_new_tokens=5, do_sample=False, callback=lambda t: told.append(int(t)))
    assert not told


@pytest.mark.slow
def test_generate_wants_a_causal_language_model(tmp_path: Path):
    translator(tmp_path / "float")
    for command in (("generate", tmp_path / "float", "--prompt", "def f", "-q"), ("serve", tmp_path / "float")):
        refused = run(*command)
        assert refused.exit_code == 2 and "T5ForConditionalGeneration is no causal language model" in refused.output
    jsonl(tmp_path / "texts.jsonl")
    command = ("--calib", tmp_path / "texts.jsonl", "--samples", 8, "-o", tmp_path / "out", *FAST)
    assert run("quantize", tmp_path / "float", *command).exit_code == 0
    load_tokenizer().save_pretrained(tmp_path / "out")
    refused = run("generate", tmp_path / "out", "--prompt", "def f", "-q")
    assert refused.exit_code == 2 and refused.output.startswith("error: the model has an encoder and a decoder")
