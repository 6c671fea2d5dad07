"""Directories that the command line is tried on: tiny models of transformers with random weights, and data for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from typer.testing import CliRunner, Result

from sqcompile.cli.app import app
from sqcompile.lm import load_tokenizer

ROOT = Path(__file__).parent.parent.parent
TEXTS = [f"def f{i}(x):\n    return x + {i} * len(name[{i}])\n" * 3 for i in range(40)]
FAST = ("--alpha", "0.5", "--rotate", "none", "-q")
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


def run(*arguments: Any) -> Result:
    """The command line in this process."""
    return CliRunner().invoke(app, [str(a) for a in arguments])


def process(*arguments: Any, cwd: Path, ranks: int = 1) -> subprocess.Popen[str]:
    """The command line as a user starts it, by torchrun where it is to have several ranks."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "100"}
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "sqcompile", *map(str, arguments)],
        cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def save(model: Any, folder: Path, *beside: Any) -> Path:
    """Saves a model, and its tokenizer or processor."""
    for part in (model.eval(), *beside):
        part.save_pretrained(folder)
    return folder


def llama(folder: Path, **config: Any) -> Path:
    """A causal language model with the shipped tokenizer."""
    torch.manual_seed(0)
    sizes = {**SMALL, "vocab_size": 2048, "max_position_embeddings": 64, **config}
    return save(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)), folder, load_tokenizer())


def classifier(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=2048, num_labels=3, **SMALL)
    return save(transformers.BertForSequenceClassification(config), folder, load_tokenizer())


def embedder(folder: Path) -> Path:
    """A directory of sentence-transformers, whose transformer is in a directory of its own."""
    torch.manual_seed(0)
    save(
        transformers.BertModel(transformers.BertConfig(vocab_size=2048, **SMALL)),
        folder / "0_Transformer",
        load_tokenizer(),
    )
    parts = [
        {"idx": 0, "name": "0", "path": "0_Transformer", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(parts))
    return folder


def vision(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.ViTConfig(image_size=32, patch_size=8, **SMALL)
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    return save(transformers.ViTForImageClassification(config), folder, processor)


def speech(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=96, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=128, decoder_ffn_dim=128, num_mel_bins=8, max_source_positions=50, max_target_positions=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    processor = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    return save(transformers.WhisperForConditionalGeneration(config), folder, processor)


def translator(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=2048,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return save(transformers.T5ForConditionalGeneration(config), folder, load_tokenizer())


def jsonl(path: Path) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def pictures(folder: Path, count: int = 6) -> Path:
    from PIL import Image

    folder.mkdir()
    for i in range(count):
        values = np.random.default_rng(i).integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{i}.png")
    return folder


def recordings(folder: Path, count: int = 3, rate: int = 16000) -> Path:
    folder.mkdir()
    for i in range(count):
        with wave.open(str(folder / f"{i}.wav"), "wb") as f:
            f.setnchannels(2)
            f.setsampwidth(2)
            f.setframerate(rate)
            f.writeframes((np.random.default_rng(i).standard_normal(2 * rate) * 8000).astype("<i2").tobytes())
    return folder


def quantized(folder: Path) -> Path:
    """A float model, data, and the model quantized by the command: ``float``, ``texts.jsonl`` and ``out`` in a folder."""
    llama(folder / "float")
    jsonl(folder / "texts.jsonl")
    found = run("quantize", folder / "float", "--calib", folder / "texts.jsonl", "-o", folder / "out", *FAST, "--json")
    assert found.exit_code == 0, found.output
    said = json.loads(found.stdout)
    assert said["int8_linears"] == 14 and said["linears"] == 15 and said["format"] == "sqcompile"
    return folder
