"""quantize: a directory with a float model -> a directory, or a file, with an INT8 one."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from sqcompile.api import calibrate
from sqcompile.capture.inputs import as_call
from sqcompile.capture.trace import trace
from sqcompile.checkpoints.export import Exported
from sqcompile.checkpoints.float_model import Checkpoint, dtype_of
from sqcompile.cli.batches import Asked, batches
from sqcompile.cli.ranks import follows, process_group
from sqcompile.cli.terminal import CommandError, Terminal
from sqcompile.large import RESUMABLE, quantize_checkpoint
from sqcompile.models import device_named
from sqcompile.passes.attention.chains import find_attentions
from sqcompile.passes.ir.graph import find_linears, get_tensor, nodes_by_name
from sqcompile.passes.planning.overrides import check_patterns
from sqcompile.passes.planning.stay_float import wanted
from sqcompile.pipeline import check_plan
from sqcompile.plan.plan import Plan
from sqcompile.plan.recipe import Recipe
from sqcompile.process.memory import memory_limit
from sqcompile.programs.export import FORMATS, check_target, export
from sqcompile.show.load import example_of
from sqcompile.show.summary import Summary

_WHILE = 10.0  # seconds of a dry run for the time that calibration will take


@dataclass(frozen=True)
class Job:
    """What is to be done.

    Attributes:
        model: the directory of the float model.
        out: where to; a dry run may have none.
        format: of what is written.
        recipe: how; with ``plan`` it is the plan's.
        plan: the path of a saved plan, in the place of data.
        data: what to calibrate on.
        dtype: of the model: "auto" for that of its files.
        memory: bytes that the process may take; None for no limit.
        device: where the plan is made; None for a GPU, if there is one.
        dry: whether it is only said what would be done.
    """

    model: str
    out: str | None
    format: str
    recipe: Recipe
    plan: str | None
    data: Asked | None
    dtype: str
    memory: int | None = None
    device: str | None = None
    dry: bool = False


def quantize(job: Job, terminal: Terminal) -> None:
    """Does it, and prints what was done.

    Raises:
        SQCompileError: one sentence; nothing was written then.
    """
    if follows():
        terminal.hush()
    if job.format not in FORMATS:
        raise CommandError(f"--format {job.format}: choose one of {', '.join(FORMATS)}")
    dtype_of(job.dtype)
    device_named(job.device)
    if not job.dry and job.data is None and job.plan is None:
        raise CommandError(
            "no calibration data: pass --calib with real inputs of the model (text, token ids, pictures or sound), or --plan"
        )
    checkpoint = Checkpoint.open(job.model)
    if job.out:
        check_target(job.format, job.out, read=[job.model, job.plan, job.data.path if job.data else None])
    if job.dry:
        with _limited(job.memory):
            return _dry_run(job, checkpoint, terminal)
    start = time.perf_counter()
    terminal.say(f"loading {job.model} ({checkpoint.architecture.__name__})")
    with process_group(terminal.ended) as first:
        resumable = job.data is not None and job.format in RESUMABLE
        done = _resumable(job, checkpoint, terminal) if resumable else _exported(job, checkpoint, first, terminal)
    if done is None:
        return  # another rank writes
    seconds = time.perf_counter() - start
    layers = done.plan.layers
    dtype = done.plan.recipe.dtype
    found = {
        "path": done.path,
        "format": done.format,
        "linears": len(layers),
        f"{dtype}_linears": sum(l.quantized for l in layers) if job.format != "smoothed" else 0,
        "smoothed": sum(l.smoothing != "none" for l in layers),
        "rotated": sum(bool(l.rotation) for l in layers),
        "bytes": done.bytes,
        "seconds": round(seconds, 3),
        "notes": [line.strip() for line in str(done).splitlines()[1:]],
    }
    terminal.result(found, f"{done}\n{seconds:.1f} s")


def _resumable(job: Job, checkpoint: Checkpoint, terminal: Terminal) -> Exported:
    """In a run that goes on where an earlier one was cut off."""
    assert job.out is not None
    with _limited(job.memory):
        data = _data(job, checkpoint, lambda: checkpoint.load(job.dtype), terminal)
    work = f"{os.path.realpath(job.out)}.work"
    if os.path.isdir(work):
        terminal.say(f"going on with what {work} has of an earlier run")
    terminal.left = lambda: (
        f"the same command goes on with what {work} has" if os.path.isdir(work) else "nothing was written"
    )
    return quantize_checkpoint(
        checkpoint.folder, data, job.out, recipe=job.recipe, format=job.format, model=checkpoint.architecture,
        dtype=dtype_of(job.dtype), memory=job.memory, work=work, device=_device(job), progress=terminal.progress,
    )  # fmt: skip


def _device(job: Job) -> str | None:
    """Where the plan is made; None for the CPU. Processes of one machine are spread over its GPUs."""
    if job.device is not None or not torch.cuda.is_available():
        return job.device
    return f"cuda:{int(os.environ.get('LOCAL_RANK') or 0) % torch.cuda.device_count()}"


def _limited(most: int | None) -> AbstractContextManager[None]:
    return nullcontext() if most is None else memory_limit(most)


def _exported(job: Job, checkpoint: Checkpoint, first: bool, terminal: Terminal) -> Exported | None:
    """By a plan that is there, or in another format. Of several ranks the first one writes."""
    assert job.out is not None
    with _limited(job.memory):
        model = checkpoint.load(job.dtype)
        if job.plan is not None:
            plan = Plan.load(job.plan)
        else:
            data = _data(job, checkpoint, lambda: model, terminal)
            plan = calibrate(
                model, data, recipe=job.recipe, max_batches=len(data), device=_device(job), progress=terminal.progress
            )
        return export(model, plan, job.format, job.out, progress=terminal.progress) if first else None


def _data(job: Job, checkpoint: Checkpoint, model: Callable[[], nn.Module], terminal: Terminal) -> list[dict[str, Any]]:
    assert job.data is not None
    data = batches(job.data, checkpoint, model)
    terminal.say(f"calibrating on {_rows(data)} rows of {job.data.path}")
    return data


def _dry_run(job: Job, checkpoint: Checkpoint, terminal: Terminal) -> None:
    """Prints what would be found, and what it would take. Nothing is calibrated, and nothing is written."""
    model = checkpoint.load(job.dtype)
    total = None
    if job.data is None:
        example = example_of(model)
    else:
        few = batches(dataclasses.replace(job.data, samples=2, batch_size=2), checkpoint, lambda: model)
        example, total = few[0], job.data.samples
    gm = trace(model, as_call(model, example))
    summary, nodes, linears = Summary.of(gm), nodes_by_name(gm), find_linears(gm)
    if job.plan is None:
        check_patterns(gm, linears, job.recipe)
        chosen = {l.name for l in wanted(gm, linears, job.recipe)}
        recipe = job.recipe
    else:
        plan = Plan.load(job.plan)
        check_plan(gm, plan, linears, [a for a in find_attentions(gm) if not a.refused])
        chosen, recipe = {l.name for l in plan.layers if l.quantized}, plan.recipe
    weights = {
        l.weight: get_tensor(gm, str(n.target))
        for l in linears
        if l.name in chosen and (n := nodes[l.weight]).op == "get_attr"
    }
    saved = sum(t.numel() * (t.element_size() - 1) for t in weights.values())
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    name = recipe.dtype
    found: dict[str, Any] = {
        **summary.as_dict(),
        f"{name}_linears": len(chosen),
        "float_bytes": held,
        f"{name}_bytes": held - saved,
        "seconds": None,
    }
    lines = [
        str(summary),
        f"{held / 1e6:.1f} MB of weights, {(held - saved) / 1e6:.1f} MB with {len(chosen)} of {len(linears)} linears in "
        f"{name.upper()}",
    ]
    if total is None:
        lines.append("how long calibration takes is measured with --calib")
    else:
        found["seconds"] = round(_seconds(model, example) / _rows([example]) * total, 1)
        lines.append(f"about {found['seconds']:.0f} s for the forward passes of at most {total} calibration rows")
    terminal.result(found, "\n".join([*lines, "nothing was written"]))


class _Enough(Exception):
    """A call has taken long enough to tell how long all of it would take."""


@torch.no_grad()
def _seconds(model: nn.Module, example: dict[str, Any]) -> float:
    """Of a call: the second one, as the first reads the weights from the disk; or by the part of one that a while is for."""
    of = {m: sum(p.numel() for p in m.parameters(recurse=False) if p.dim() > 1) for m in model.modules()}
    of |= {m: 0 for m in of if isinstance(m, nn.Embedding)}
    start, seen = time.perf_counter(), 0

    def see(module: nn.Module, args: Any, out: Any) -> None:
        nonlocal seen
        seen += of.get(module, 0)
        if seen and time.perf_counter() - start > _WHILE:
            raise _Enough

    hook = register_module_forward_hook(see)
    try:
        model(**example)
        seen, start = 0, time.perf_counter()
        model(**example)
        return time.perf_counter() - start
    except _Enough:
        return (time.perf_counter() - start) * max(1.0, sum(of.values()) / seen)
    finally:
        hook.remove()


def _rows(data: list[dict[str, Any]]) -> int:
    return sum(len(next(iter(batch.values()))) for batch in data)
