"""evaluate: what a model in INT8 has lost beside the float one, on the user's own data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sqcompile.checkpoints.float_model import Checkpoint
from sqcompile.cli.batches import Asked, batches, check_rows, id_rows, length_of, template_of, windows
from sqcompile.cli.samples import kind_of, texts
from sqcompile.cli.saved import check_backend, is_int8, load_any, longest_in, plan_in, row_length, tokenizer_of
from sqcompile.cli.terminal import CommandError, Terminal
from sqcompile.evaluation import Evaluation, evaluate
from sqcompile.evaluation.runs import original
from sqcompile.evaluation.streamed import Streamed
from sqcompile.process.memory import memory_limit


def evaluate_directory(
    folder: str,
    against: str | None,
    asked: Asked,
    backend: str,
    device: str | None,
    memory: int | None,
    terminal: Terminal,
) -> None:
    """Evaluates the model of a directory, beside that of another one if there is one.

    With ``memory``, bytes that the process may take, the models are not loaded: their weights are read as they are used.

    Raises:
        SQCompileError: one sentence.
    """
    check_backend(backend)
    if memory is not None and backend != "eager":
        raise CommandError(f"--max-memory runs a model as it is read: leave out --backend {backend}")
    with nullcontext() if memory is None else memory_limit(memory):
        _evaluate(
            folder, against, asked, partial(_opened, backend, device, memory is not None, terminal.progress), terminal
        )


def _opened(backend: str, device: str | None, streamed: bool, progress: bool, folder: str) -> nn.Module:
    return Streamed(folder, device) if streamed else load_any(folder, backend, device, progress)


def _evaluate(
    folder: str, against: str | None, asked: Asked, opened: Callable[[str], nn.Module], terminal: Terminal
) -> None:
    source = against if against and not is_int8(against) else None if is_int8(folder) else folder
    reference = opened(against) if against else None
    model = opened(folder)
    data: Any
    if source is not None:
        checkpoint = Checkpoint.open(source)
        data = batches(
            asked, checkpoint, lambda: original(reference if reference is not None and source == against else model)
        )
    else:
        data = _windows(asked, folder, model)
    plan = plan_in(model)
    if plan is not None and "attention_mask" in plan.call["kwargs"]:
        data = [b if "attention_mask" in b else {**b, "attention_mask": torch.ones_like(b["input_ids"])} for b in data]
    found = evaluate(model, data, against=reference, layers=False, progress=terminal.progress)
    terminal.result(as_dict(found), str(found).partition("\nSQNR per layer")[0])


def _windows(asked: Asked, folder: str, model: nn.Module) -> list[dict[str, Tensor]]:
    """Windows of text for a causal language model whose float model is not at hand."""
    kind, longest = kind_of(asked.path), longest_in(folder)
    length = row_length(folder, model) if asked.seq_len is None else length_of(asked, longest)
    if kind not in ("text", "ids"):
        raise CommandError(f"{asked.path} is {kind}: pass --against with the float model, which says what it reads")
    size = asked.batch_size or 4
    if kind == "ids":
        rows = torch.from_numpy(id_rows(asked).astype("int64"))
        check_rows(rows, longest, asked.path)
        return [{"input_ids": part} for part in rows.split(size)]
    tokenizer = tokenizer_of(asked.tokenizer, folder)
    found = windows(texts(asked.path, template_of(tokenizer), False, asked.seed), tokenizer, length, asked)
    return [{"input_ids": part} for part in found.split(size)]


def as_dict(found: Evaluation) -> dict[str, Any]:
    """The numbers of an evaluation, for JSON, which has no NaN."""
    every = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
    plain = {k: v for k, v in every.items() if v is None or isinstance(v, (str, int, float))}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in plain.items()}
