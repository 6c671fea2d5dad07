"""saved: a directory as a model that runs: one that sqcompile saved, an INT8 checkpoint, or a float model."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from sqcompile.artifact.directory import MANIFEST
from sqcompile.checkpoints.float_model import CONFIG, MODULES, Checkpoint, load_tokenizer
from sqcompile.cli.terminal import CommandError
from sqcompile.loading import is_saved, load

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def is_int8(folder: str) -> bool:
    """Whether a directory has a model in INT8, and not in float.

    Raises:
        CommandError: if there is no such directory, or it has no model.
    """
    if not os.path.isdir(folder):
        raise CommandError(f"there is no directory {folder}: pass one with a model, or what sqcompile quantize wrote")
    if not any(os.path.lexists(os.path.join(folder, name)) for name in (MANIFEST, CONFIG, MODULES)):
        raise CommandError(f"{folder} has no model: it has neither {MANIFEST} nor {CONFIG}")
    return is_saved(folder)


def load_any(folder: str, backend: str, device: str | None) -> nn.Module:
    """The model in a directory.

    Args:
        folder: the directory.
        backend: for one in INT8: "inductor" or "eager".
        device: where to run it; None for where it was saved, or for the CPU.

    Raises:
        SQCompileError: as `sqcompile.load` and `Checkpoint.load`.
    """
    if is_int8(folder):
        return load(folder, device=device, backend=backend)
    model: Any = Checkpoint.open(folder).load()
    return model if device is None else model.to(device)


def tokenizer_of(*folders: str | None) -> Any:
    """The tokenizer in the first directory that has one.

    Raises:
        CommandError: if none has.
    """
    for folder in folders:
        if folder is not None and any(os.path.exists(os.path.join(folder, name)) for name in _TOKENIZER):
            return load_tokenizer(folder)
    raise CommandError(
        f"there is no tokenizer in {' or '.join(f for f in folders if f)}: pass a directory that has one with --tokenizer"
    )
