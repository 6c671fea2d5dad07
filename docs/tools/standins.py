"""What pages take for granted: a small language model, its directory, its data. Setups of pages import them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from sqcompile.lm import calibration_texts, evaluation_texts, load_lm, token_windows


def language_model(layers: int = 1) -> tuple[PreTrainedModel, Any]:
    """The first layer, or more, of the shipped language model, and its tokenizer: quick to compile, and of trained values."""
    model, tokenizer = load_lm()
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    model.config.layer_types = ["full_attention"] * layers
    return model, tokenizer


def windows(tokenizer: Any, length: int = 128, count: int = 8) -> Tensor:
    """Token ids int64 [count, length] of calibration texts."""
    return token_windows(calibration_texts(), tokenizer, length, count)


def held_out(tokenizer: Any, length: int = 128, count: int = 8) -> Tensor:
    """Token ids int64 [count, length] of text that is in no calibration."""
    return token_windows(evaluation_texts(), tokenizer, length, count)


def texts(count: int = 20, characters: int = 400) -> list[str]:
    """Pieces of the calibration text."""
    whole = "\n\n".join(calibration_texts())
    return [whole[i * characters : (i + 1) * characters] for i in range(count)]


def directory(model: PreTrainedModel, tokenizer: Any, path: str = "MODEL_DIR") -> None:
    """The model as a directory of transformers, and beside it texts.jsonl, texts.txt and held_out.txt."""
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    Path("texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts()))
    Path("texts.txt").write_text("\n\n".join(texts()))
    Path("held_out.txt").write_text("\n\n".join(evaluation_texts())[:4000])
