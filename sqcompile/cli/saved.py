"""saved: a directory as a model that runs: one that sqcompile saved, an INT8 checkpoint, or a float model."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from sqcompile.checkpoints.float_model import MODULES, Checkpoint, config_of, load_tokenizer, longest_of
from sqcompile.checkpoints.read_files import CONFIG, read_json
from sqcompile.cli.batches import LENGTH
from sqcompile.cli.terminal import CommandError
from sqcompile.compiled.emit import CompiledModel
from sqcompile.errors import ArtifactError
from sqcompile.evaluation.streamed import Streamed
from sqcompile.files.beside import FLOAT_CONFIG
from sqcompile.files.directory import MANIFEST, MANIFESTS
from sqcompile.loading import is_saved, load
from sqcompile.models import device_named
from sqcompile.plan.plan import Plan

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def is_int8(folder: str) -> bool:
    """Whether a directory has a model in INT8, and not in float.

    Raises:
        CommandError: if there is no such directory, or it has no model.
    """
    if not os.path.isdir(folder):
        raise CommandError(f"there is no directory {folder}: pass one with a model, or what sqcompile quantize wrote")
    if not any(os.path.lexists(os.path.join(folder, name)) for name in (*MANIFESTS, CONFIG, MODULES)):
        raise CommandError(f"{folder} has no model: it has neither {MANIFEST} nor {CONFIG}")
    return is_saved(folder)


def check_backend(backend: str) -> None:
    """Raises CommandError for one that no command takes."""
    if backend not in ("eager", "inductor"):
        raise CommandError(f"--backend {backend}: choose eager or inductor")


def load_any(folder: str, backend: str, device: str | None, progress: bool) -> nn.Module:
    """The model in a directory.

    Args:
        folder: the directory.
        backend: for one in INT8: "inductor" or "eager".
        device: where to run it; None for where it was saved, or for the CPU.
        progress: whether a line is shown while one in INT8 is loaded.

    Raises:
        SQCompileError: as `sqcompile.load` and `Checkpoint.load`.
    """
    if is_int8(folder):
        return load(folder, device=device, backend=backend, progress=progress)
    model: Any = Checkpoint.open(folder).load()
    return model if device is None else model.to(device_named(device))


def plan_in(model: nn.Module) -> Plan | None:
    """The plan of a model in INT8; None of a float one."""
    return model.plan if isinstance(model, (CompiledModel, Streamed)) else None


def row_length(folder: str, model: nn.Module) -> int:
    """Tokens of a row of text where nobody says how many: 512, or as many as the model takes, or was calibrated with."""
    if os.path.exists(os.path.join(folder, CONFIG)):
        return min(LENGTH, longest_in(folder) or LENGTH)
    plan = plan_in(model)
    ids = plan.call["kwargs"].get("input_ids", {}) if plan is not None else {}
    return ids["shape"][1] if len(ids.get("shape", ())) == 2 else LENGTH


def longest_in(folder: str) -> int | None:
    """How many tokens the model of a directory takes at most, as far as its configuration says, or that of its float model."""
    if os.path.exists(os.path.join(folder, CONFIG)):
        return longest_of(config_of(folder))
    try:
        found = read_json(folder, FLOAT_CONFIG)
    except ArtifactError:  # there is none; or nobody can read it, which nothing depends on
        return None
    text = found.get("text_config")
    known = (text if isinstance(text, dict) else found).get("max_position_embeddings")
    return known if type(known) is int and known > 0 else None


def tokenizer_of(given: str | None, folder: str) -> Any:
    """The tokenizer in the directory that is given, or else in that of the model.

    Raises:
        SQCompileError: if there is none.
    """
    if given is None and not any(os.path.exists(os.path.join(folder, name)) for name in _TOKENIZER):
        raise CommandError(f"there is no tokenizer in {folder}: pass a directory that has one with --tokenizer")
    return load_tokenizer(given or folder)
