"""export: a model and its plan as a checkpoint that other tools read.

    "smoothed"            the float model, with the scales of smoothing in its parameters
    "compressed-tensors"  the same with INT8 weights, as vLLM and transformers read them

The directory is one of transformers, under the names that its checkpoints have. It appears whole or not at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from sqcompile.capture.call_spec import from_spec
from sqcompile.capture.trace import trace
from sqcompile.checkpoints.dealt import Block, dealt
from sqcompile.checkpoints.directory import Weights, write_config, write_json
from sqcompile.checkpoints.engines import for_engines, of_own_forward, refuse
from sqcompile.checkpoints.names import CheckpointNames
from sqcompile.checkpoints.parameters import Parameters
from sqcompile.checkpoints.replan import Changed, lines_of, representable
from sqcompile.checkpoints.w8a8 import Quantized
from sqcompile.errors import ArtifactError, SQCompileError
from sqcompile.files.beside import copy_beside
from sqcompile.files.directory import MARK, check_replaceable, directory_of
from sqcompile.files.regular import said
from sqcompile.passes.ir.about import about
from sqcompile.plan.plan import Plan, given_plan
from sqcompile.plan.said import linears_in
from sqcompile.process.interrupts import checkpoint, deferred
from sqcompile.process.lock import analysing, compiling
from sqcompile.process.progress import Enter, part, silent
from sqcompile.process.ranks import ALONE, Ranks

FORMATS = ("compressed-tensors", "smoothed")


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        format: "smoothed", "compressed-tensors", "pt2", "onnx" or "sqcompile".
        path: of the directory, or of a program's file.
        plan: what the checkpoint says: ``sqcompile.compile(model, plan=...)`` gives the same numbers.
        changed: what is other in it than in the plan that was passed, and why, by linear or attention.
        notes: what else there is to know, in words.
        bytes: of the weights.
    """

    format: str
    path: str
    plan: Plan
    changed: tuple[Changed, ...]
    notes: tuple[str, ...]
    bytes: int

    def __str__(self) -> str:
        count, smoothed = len(self.plan.layers), sum(l.smoothing != "none" for l in self.plan.layers)
        what = f"{smoothed} of {count} linears smoothed"
        if self.format != "smoothed":
            what = f"{linears_in(self.plan.layers, self.plan.recipe.dtype)}, {smoothed} smoothed"
        lines = [f"{self.path}: {self.format}, {what}, {self.bytes / 1e6:.1f} MB"]
        return "\n  ".join([*lines, *lines_of(self.changed, self.plan), *self.notes])


def export(
    model: nn.Module,
    plan: Plan,
    format: str,
    path: str | os.PathLike[str],
    source: Any = None,
    ranks: Ranks = ALONE,
    enter: Enter = silent,
    within: str | None = None,
) -> Exported:
    """Writes a checkpoint directory. The model itself is never changed.

    Args:
        model: of transformers, the one that the plan was made for.
        plan: from `calibrate` or a compilation, or the path of a saved one.
        format: "smoothed" or "compressed-tensors".
        path: of the directory. What is there may be an empty directory, or one of an earlier export, which is replaced.
        source: the directory that has the tokenizer; the one that the model was loaded from by default.
        ranks: the processes that make the weights together; each calls it with the same arguments.
        enter: is told of the stages "trace", "fold" and "write".
        within: the directory of temporary files, on the same disk; that of ``path`` by default.

    Returns:
        What was written, and what of the plan a checkpoint cannot say; it prints well.

    Raises:
        ArtifactError: for another format, a model that is none of transformers, a plan that the format cannot express, or
            a path that cannot be written; nothing is written then.
        SQCompileError: as `compile` of a plan; where another rank has failed or is dead.
    """
    assert format in FORMATS
    given = given_plan(plan, None, None)
    target = target_of(path) if ranks.first else os.path.realpath(os.fsdecode(path))
    names = CheckpointNames(model)
    if format == "compressed-tensors":
        refuse(given, names.model.dtype)
    beside = source_of(model, source)
    with deferred(), analysing(model), compiling(), torch.no_grad():
        enter("trace")
        traced = trace(model, from_spec(given.call, next(iter(model.parameters())).device))
        enter("fold")
        plan, parameters, changed = representable(traced, given, set(names.saved))
        quantized = None
        if format == "compressed-tensors":
            plan, more = for_engines(traced, given, plan, names)
            changed += more
            quantized = Quantized(traced, parameters.folded, plan, names)
        blocks = _blocks(names, traced, parameters, quantized)
        enter("write")
        try:
            with directory_of(ranks, target, within) as folder:
                size, notes = _write(folder, model, blocks, quantized, beside, ranks)
                odd = None if quantized is None else of_own_forward(plan, names)
                notes += () if odd is None else (odd,)
                done = Exported(format, target, plan, tuple(changed), notes, size)
                if ranks.first:
                    write_json(os.path.join(folder, MARK), {"format": format, "summary": str(done).splitlines()[1:]})
        except SQCompileError:
            raise
        except Exception as e:  # of the system, of safetensors, of a configuration that cannot be written
            hint = "pass a path in a directory that exists and may be written to, on a disk with room"
            raise ArtifactError(f"the checkpoint cannot be written to {target} ({said(e)}): {hint}") from e
    return done


def _write(
    folder: str,
    model: Any,
    blocks: Sequence[Block],
    quantized: Quantized | None,
    beside: str | None,
    ranks: Ranks,
) -> tuple[int, tuple[str, ...]]:
    """Writes all but the mark, on rank 0, and gives the bytes of the weights and what there is to know."""
    found: tuple[int, tuple[str, ...]] = (0, ())
    with part("blocks", len(blocks)) as done:
        made = dealt(folder, blocks, ranks)
        if ranks.first:
            weights = Weights(folder)
            for block in made:
                weights.add(block)
                checkpoint()
                done()
            weights.finish()
            found = weights.bytes, _beside(folder, model, quantized, beside)
        else:
            for _ in made:
                pass
    size, notes = json.loads(ranks.tell("weights", json.dumps(found))[0])
    return size, tuple(notes)


def _beside(folder: str, model: Any, quantized: Quantized | None, beside: str | None) -> tuple[str, ...]:
    """Writes the configuration and the tokenizer, and gives what there is to know."""
    copied = copy_beside(beside, folder) if beside else []
    write_config(model, folder, quantized.config() if quantized else None)
    if any(name.startswith("tokenizer") for name in copied):
        return ()
    where = f"{beside} has none" if beside else "the model was not loaded from a directory, pass source"
    return (f"no tokenizer is beside the weights: {where}",)


def _blocks(
    names: CheckpointNames, traced: fx.GraphModule, parameters: Parameters, quantized: Quantized | None
) -> list[Block]:
    """What gives the tensors of the checkpoint, block by block, so that not all are in memory at once."""
    read = {name: leaf for leaf in parameters.changes for name in about(traced).aliases[leaf]}

    def tensors(block: list[str]) -> dict[str, Tensor]:
        weights, scales = {}, {}
        for name in block:
            if quantized is not None and name in quantized.layers:
                weights[name], scales[name] = quantized.tensors(name)
            else:
                weights[name] = parameters.new(read[name]) if name in read else names.every[name]
        return quantized.renamed(weights, scales) if quantized is not None else names.convert(weights)

    return [partial(tensors, block) for block in names.blocks()]


def target_of(path: Any) -> str:
    """The path of a checkpoint's directory.

    Raises:
        ArtifactError: if it is none, or what is there cannot be replaced.
    """
    try:
        target = os.path.realpath(os.fsdecode(path))
    except (TypeError, ValueError) as e:
        raise ArtifactError(f"the path is {path!r}: pass a string or a pathlib.Path of a directory") from e
    try:
        check_replaceable(target)
    except OSError as e:
        raise ArtifactError(f"the checkpoint cannot be written: {e}") from e
    return target


def source_of(model: Any, source: Any) -> str | None:
    """The directory with the tokenizer: the one that is given, or that a model was loaded from; None if there is none.

    Raises:
        ArtifactError: if there is no such directory.
    """
    if source is None:
        name = getattr(getattr(model, "config", None), "name_or_path", None)
        return name if isinstance(name, str) and os.path.isdir(name) else None
    try:
        found = os.fsdecode(source)
    except TypeError as e:
        raise ArtifactError(f"source is {source!r}: pass the path of a directory that has the tokenizer") from e
    if not os.path.isdir(found):
        raise ArtifactError(f"source is {found!r}, and there is no such directory: pass one that has the tokenizer")
    return found
