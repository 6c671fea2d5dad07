"""export: a model and its plan in a form that leaves the process: an artifact, a checkpoint directory, or a program.

    "sqcompile"                        the native artifact, a directory that `sqcompile.load` reads
    "smoothed", "compressed-tensors"   a directory of transformers (`sqcompile.checkpoints`)
    "pt2"                              a file of torch.export, in PyTorch's own quantize and dequantize operators
    "onnx"                             a file of ONNX, opset 21

A program appears whole or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from sqcompile.artifact.directory import check_saved_to, path_name, save
from sqcompile.capture.call_spec import from_spec
from sqcompile.capture.inputs import Forward
from sqcompile.capture.trace import trace
from sqcompile.checkpoints import export as checkpoints
from sqcompile.checkpoints.export import Exported
from sqcompile.errors import ArtifactError, SQCompileError
from sqcompile.files.directory import check_apart
from sqcompile.files.regular import check_file_replaceable, new_file, said
from sqcompile.files.work import Work
from sqcompile.pipeline import rewrite
from sqcompile.plan.plan import Plan, given_plan
from sqcompile.process.interrupts import checkpoint, deferred
from sqcompile.process.lock import analysing, compiling
from sqcompile.process.progress import Enter, Show, silent, stages
from sqcompile.process.ranks import ALONE, Ranks
from sqcompile.programs.onnx import onnx_model, write_onnx
from sqcompile.programs.standard import standard
from sqcompile.programs.traced import Traced, program_of

PROGRAMS = ("onnx", "pt2")
NATIVE = "sqcompile"
FORMATS = (NATIVE, *checkpoints.FORMATS, *PROGRAMS)


def export(
    model: nn.Module,
    plan: Plan,
    format: str,
    path: str | os.PathLike[str],
    source: Any = None,
    *,
    progress: Show = True,
) -> Exported:
    """Writes a checkpoint, a program, or what `load` reads. The model itself is never changed.

    Checkpoints and "sqcompile" are written tensor by tensor, so that neither the INT8 weights nor, of `open_checkpoint`, the
    float ones need fit in memory.

    Args:
        model: the one that the plan was made for; for a checkpoint, of transformers.
        plan: from `calibrate` or a compilation, or the path of a saved one.
        format: "sqcompile" is what `CompiledModel.save` writes, "compressed-tensors" and "smoothed" are checkpoints of
            transformers, "pt2" (torch.export) and "onnx" programs.
        path: of a directory, which may be an empty one, or one of an earlier export, which is replaced; or of a program's
            file.
        source: of a directory: that which has the tokenizer; the one that the model was loaded from by default.
        progress: as for `compile`; its stages are "trace", "fold", "insert_qdq" (not of a checkpoint), "convert" (of a
            program) and "write".

    Returns:
        What was written, and what of the plan a checkpoint cannot say; it prints well.

    Raises:
        ArtifactError: for another format, a plan or a model that the format cannot express, or a path that cannot be written;
            nothing is written then.
        SQCompileError: as `compile` of a plan.
    """
    check_target(format, path, source)
    with stages(stages_of(format), progress) as enter:
        return exported(model, plan, format, path, source, enter)


def stages_of(format: str) -> tuple[str, ...]:
    """Of an `export` in a format, for those who wait."""
    if format in checkpoints.FORMATS:
        return ("trace", "fold", "write")
    return ("trace", "fold", "insert_qdq", *(["convert"] if format in PROGRAMS else []), "write")


def exported(
    model: nn.Module, plan: Plan, format: str, path: str | os.PathLike[str], source: Any = None, enter: Enter = silent
) -> Exported:
    """`export` to what `check_target` has looked at; ``enter`` is told of its stages."""
    if format in checkpoints.FORMATS:
        return checkpoints.export(model, plan, format, path, source, enter=enter)
    if format == NATIVE:
        return export_artifact(model, plan, path, source, enter=enter)
    given = given_plan(plan, None, None)
    with deferred(), analysing(model), compiling(), torch.no_grad():
        quantized = _quantized(model, given, enter)
        enter("convert")
        return write_program(quantized, given, format, path, enter)


def export_artifact(
    model: nn.Module,
    plan: Plan,
    path: str | os.PathLike[str],
    source: Any = None,
    kept: Work | None = None,
    traced: fx.GraphModule | None = None,
    enter: Enter = silent,
    ranks: Ranks = ALONE,
) -> Exported:
    """`export` in the format "sqcompile".

    ``kept`` has files that an earlier run has finished. ``traced`` is the model's traced graph, if the plan was made from it
    just now. ``ranks`` write together, and each calls it.
    """
    given, beside = given_plan(plan, None, None), checkpoints.source_of(model, source)
    with deferred(), analysing(model), compiling(), torch.no_grad():
        quantized = _quantized(model, given, enter, lazy=True, traced=traced)
        enter("write")
        return write_artifact(quantized, given, Forward.of(model), path, beside, kept, ranks)


def _quantized(
    model: nn.Module, plan: Plan, enter: Enter, lazy: bool = False, traced: fx.GraphModule | None = None
) -> fx.GraphModule:
    if traced is None:
        enter("trace")
        traced = trace(model, from_spec(plan.call, next((p.device for p in model.parameters()), torch.device("cpu"))))
    return rewrite(traced, plan, until="quantized", enter=enter, lazy=lazy)


def is_program(format: Any, source: Any) -> bool:
    """Whether a format is that of a program, and not of a directory.

    Raises:
        ArtifactError: for a format that there is none of, or the source of a tokenizer with a program.
    """
    if format not in FORMATS:
        raise ArtifactError(f"there is no format {format!r}: choose one of {', '.join(FORMATS)}")
    if format in PROGRAMS and source is not None:
        raise ArtifactError(f"source has the tokenizer of a checkpoint, and {format!r} has none: leave it out")
    return format in PROGRAMS


def write_artifact(
    quantized: fx.GraphModule,
    plan: Plan,
    call: Forward,
    path: str | os.PathLike[str],
    beside: str | None,
    kept: Work | None = None,
    ranks: Ranks = ALONE,
) -> Exported:
    """Writes the quantized stage of a model as a directory that `load` reads.

    Args:
        quantized: the stage; weights that are not made yet are made one after the other.
        plan: that it was made by.
        call: how the model is called.
        path: of the directory.
        beside: a directory whose tokenizer is copied; None for none.
        kept: has files that an earlier run has finished, and takes new ones; rank 0's.
        ranks: the processes that write together.

    Raises:
        ArtifactError: if it cannot be written; nothing is written then.
        CalibrationError: where another rank has failed or is dead; nothing is written then.
    """
    save(quantized, plan, call, path, beside=beside, kept=kept, ranks=ranks)
    target, size = path_name(path), 0
    if ranks.first:
        size = sum(f.stat().st_size for f in os.scandir(target) if f.name.startswith("model-"))
    return Exported(NATIVE, target, plan, (), (), int(ranks.tell("bytes", str(size))[0]))


def check_target(
    format: str, path: str | os.PathLike[str], source: Any = None, read: Iterable[str | os.PathLike[str] | None] = ()
) -> None:
    """Looks whether something may be written, before hours are spent on it.

    Args:
        format, path, source: as for `export`.
        read: paths of what it is made from; None for what is not there.

    Raises:
        ArtifactError: for a format that there is none of, or a path that cannot be written, or holds what is read.
    """
    try:
        check_apart(os.fsdecode(path), filter(None, read), but=tuple(f".{name}" for name in PROGRAMS))
    except OSError as e:
        raise ArtifactError(str(e)) from e
    except (TypeError, ValueError):
        pass  # no path, which is said below
    if is_program(format, source):
        target_of(path)
    elif format == NATIVE:
        check_saved_to(path)
    else:
        checkpoints.target_of(path)


def write_program(
    quantized: fx.GraphModule, plan: Plan, format: str, path: str | os.PathLike[str], enter: Enter = silent
) -> Exported:
    """Writes the quantized stage of a model as a program.

    Args:
        quantized: the stage.
        plan: that it was made by.
        format: "pt2" or "onnx".
        path: of the file.
        enter: is told of the stage "write", when it is converted.

    Raises:
        ArtifactError: if the format cannot express it, or the path cannot be written; nothing is written then.
    """
    target = target_of(path)
    with deferred(), compiling(), torch.no_grad():
        traced = program_of(standard(quantized, integers=format == "onnx"), apart=format == "onnx")
        checkpoint()
        try:
            size = _write(traced, format, target, enter)
        except SQCompileError:
            raise
        except Exception as e:  # of the system, and of what writes the format
            hint = "pass a path in a directory that exists and may be written to, on a disk with room"
            raise ArtifactError(f"the program cannot be written to {target} ({said(e)}): {hint}") from e
    notes = [str(traced)]
    if format == "onnx" and traced.conditions:
        notes.append(f"not asked at run time, as ONNX asks nothing of sizes: {', '.join(traced.conditions)}")
    return Exported(format, target, plan, (), tuple(notes), size)


def _write(traced: Traced, format: str, target: str, enter: Enter) -> int:
    """Writes the file, and gives its bytes."""
    if format == "onnx":
        model = onnx_model(traced.program, list(traced.outputs))
        enter("write")
        return write_onnx(model, target)
    enter("write")
    with new_file(target) as f:
        torch.export.save(traced.program, f)
    return os.path.getsize(target)


def target_of(path: Any) -> str:
    """The path of a program's file.

    Raises:
        ArtifactError: if it is none, or what is there cannot be replaced.
    """
    try:
        target = os.path.realpath(os.fsdecode(path))
        check_file_replaceable(target)
    except (TypeError, ValueError) as e:
        raise ArtifactError(f"the path is {path!r}: pass a string or a pathlib.Path of a file") from e
    except OSError as e:
        raise ArtifactError(f"the program cannot be written: {e}") from e
    return target
