"""speed: how fast the model of a directory is on this machine."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sqcompile.bench.timing import interleaved, machine
from sqcompile.checkpoints.float_model import Checkpoint
from sqcompile.cli.saved import is_int8, load_any, row_length
from sqcompile.cli.terminal import CommandError, Terminal, table
from sqcompile.compiled.emit import CompiledModel


def bench(folder: str, against: str | None, seconds: float, terminal: Terminal) -> None:
    """Prints milliseconds of a forward pass, beside ``torch.compile`` of the float model if there is one.

    Raises:
        SQCompileError: one sentence.
    """
    if not is_int8(folder):
        raise CommandError(f"{folder} is a float model: quantize it first, and pass it as --against")
    terminal.say(f"loading and compiling {folder}")
    models: dict[str, nn.Module] = {"INT8": load_any(folder, "inductor", None, terminal.progress)}
    if against is not None:
        models["float"] = Checkpoint.open(against).load()
    int8 = models["INT8"]
    assert isinstance(int8, CompiledModel)
    names = int8.plan.call["kwargs"]
    if "input_ids" not in names or set(names) - {"input_ids", "attention_mask"}:
        raise CommandError(f"{folder} is called with {', '.join(names) or 'arguments by position'}: only text is timed")
    rows, length = [], row_length(folder, int8)
    for shape in ((1, 1), (1, length), (4, length)):
        call: dict[str, Any] = {"input_ids": torch.ones(shape, dtype=torch.int64)}
        if "attention_mask" in names:
            call["attention_mask"] = torch.ones(shape, dtype=torch.int64)
        torch.compiler.reset()  # the float model is compiled for the very shape it is timed at
        run: dict[str, Callable[..., Any]] = {
            name: functools.partial(m if name == "INT8" else torch.compile(m, dynamic=False), **call)
            for name, m in models.items()
        }
        with torch.no_grad():
            rows.append({"batch": shape[0], "tokens": shape[1], **interleaved(run, seconds)})
    names_of = [*models]
    found = table(
        ["batch x tokens", *(f"{n}, ms" for n in names_of), *(["gain"] if against else [])],
        [
            [
                f"{r['batch']} x {r['tokens']}",
                *(f"{r[n]:.2f}" for n in names_of),
                *([f"{r['float'] / r['INT8']:.2f}x"] if against else []),
            ]
            for r in rows
        ],
    )
    terminal.say(machine())
    terminal.result({"machine": machine(), "milliseconds": rows}, found)
