"""quantize_checkpoint: a checkpoint that need not fit in memory -> INT8, in one run, or in several where one is cut off."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.analysis import ANALYSES, analyse
from sqcompile.checkpoints.export import Exported
from sqcompile.checkpoints.export import export as export_checkpoint
from sqcompile.checkpoints.open_checkpoint import open_checkpoint
from sqcompile.checkpoints.read_files import identity_of
from sqcompile.checkpoints.skeleton import transformers_version
from sqcompile.errors import ArtifactError, CalibrationError
from sqcompile.files.regular import said
from sqcompile.files.work import Work
from sqcompile.models import device_for, on_device
from sqcompile.plan.plan import Plan
from sqcompile.plan.recipe import Recipe, resolve_recipe
from sqcompile.process.interrupts import deferred, each_at_once
from sqcompile.process.memory import memory_limit
from sqcompile.process.progress import Enter, Show, stages
from sqcompile.process.ranks import Ranks, together
from sqcompile.programs.export import NATIVE, check_target, export_artifact
from sqcompile.pytorch.core import pytree
from sqcompile.statistics.exchange import digest_of_model
from sqcompile.statistics.file import read_statistics, write_statistics
from sqcompile.statistics.observe import Calibration
from sqcompile.version import VERSION

RESUMABLE = (NATIVE, "compressed-tensors", "smoothed")
_SAME = "pass every rank the same"
_PLAN, _STATISTICS = "plan.safetensors", "statistics.safetensors"


def quantize_checkpoint(
    path: str | os.PathLike[str],
    batches: Iterable[Any],
    target: str | os.PathLike[str],
    *,
    recipe: str | Recipe = "default",
    format: str = "sqcompile",
    model: Any = None,
    dtype: torch.dtype | None = None,
    memory: int | None = None,
    temporary: str | os.PathLike[str] | None = None,
    work: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    progress: Show = True,
) -> Exported:
    """Opens a checkpoint of transformers, calibrates it, and writes it in INT8: `open_checkpoint`, `calibrate` and `export`.

    A run that was cut off, by Ctrl-C, a full disk or a power failure, goes on where it was when it is called again with the
    same arguments, and writes the same bytes. What it has finished, the statistics, the plan, and of "sqcompile" each file of
    weights, is in a directory beside the target until then. That directory is yours alone: what is in it is checked for
    damage, not for malice.

    In an initialized process group of `torch.distributed` it is a collective: every rank calls it with the same arguments.
    They share the calibration, as in `calibrate`, and those that see the target share the files of weights of "sqcompile";
    rank 0 does the rest. The bytes are those of one process.

    Args:
        path: as for `open_checkpoint`.
        batches: as for `calibrate`, but no callable; all of them are kept in memory.
        target: the directory to be written, as for `export`.
        recipe: "default", "O1", "O2", "O3", "fp8" or a Recipe.
        format: "sqcompile", "compressed-tensors" or "smoothed", as for `export`.
        model, dtype, temporary: as for `open_checkpoint`.
        memory: of each process, as for `memory_limit`; None for no limit.
        work: the directory of what is finished; that of the target with ".work" behind it by default. It is on the disk of
            the target.
        device: where the plan is made, as for `calibrate`: each weight is copied there as it is used. None for the CPU. What is
            written is made on the CPU.
        progress: as for `compile`.

    Returns:
        What was written; it prints well.

    Raises:
        ArtifactError: as `open_checkpoint` and `export`; or if the work directory is of other arguments, or in use.
        SQCompileError: as `calibrate`; on several ranks a CalibrationError where another one fails or dies.
        KeyboardInterrupt: for Ctrl-C, when the step at hand is done; a second one is raised at once.
    """
    with together() as ranks:
        how = resolve_recipe(recipe)
        if format not in RESUMABLE:
            raise ArtifactError(f"a checkpoint is not quantized to {format!r}: choose one of {', '.join(RESUMABLE)}")
        if not isinstance(batches, Iterable):
            raise CalibrationError(
                "quantize_checkpoint takes batches, which another run can see again: pass an iterable of them"
            )
        try:
            source, out = (os.path.realpath(os.fsdecode(p)) for p in (path, target))
            place = f"{out}.work" if work is None else os.path.realpath(os.fsdecode(work))
        except (TypeError, ValueError) as e:
            raise ArtifactError(f"a path is none ({said(e)}): pass strings or pathlib.Paths") from e
        if os.path.commonpath([place, out]) in (place, out):
            raise ArtifactError(f"work={place} is the target {out}, in it or above it: pass another directory, or none")
        if ranks.first:
            check_target(format, out, read=[source])
        data = [*each_at_once(batches)]
        limit = nullcontext() if memory is None else memory_limit(memory)
        try:
            with deferred(), limit, stages(("open", *ANALYSES, "write"), progress if ranks.first else False) as enter:
                enter("open")
                net = open_checkpoint(source, model, dtype=dtype, temporary=temporary)
                there = device_for(net, device)
                inputs = {
                    "batches": _of_batches(data),
                    "recipe": repr(how),
                    "model": f"{type(net).__name__} {dtype}",
                    "format": format,
                    "device": there.type if there else "cpu",
                    "versions": f"{VERSION} {torch.__version__} {transformers_version()}",
                }
                ranks.agree({f"other {name}": (found, _SAME) for name, found in inputs.items()})
                inputs = {"files of the checkpoint": identity_of(source), **inputs}
                with Work(place, inputs).held() if ranks.first else nullcontext() as kept:
                    with on_device(there):
                        plan, traced = _plan(kept, net, data, how, enter, ranks, there)
                    enter("write")
                    return _write(kept, net, plan, traced, format, out, ranks)
        except OSError as e:  # a full disk, say; what is finished stays
            on = f", which goes on with what {place} has" if os.path.isdir(place) else ""
            hint = f"mend that and do the same again{on}"
            raise ArtifactError(f"{out} cannot be written ({said(e)}): {hint}") from e


def _plan(
    kept: Work | None,
    net: Any,
    data: list[Any],
    recipe: Recipe,
    enter: Enter,
    ranks: Ranks,
    device: torch.device | None,
) -> tuple[Plan, fx.GraphModule | None]:
    """The plan of an earlier run, or one that is made now, and the traced graph then. It comes from its file either way.

    ``kept`` is rank 0's, and None elsewhere.
    """
    traced = None
    if _finds(kept, _PLAN, ranks):
        if ranks.count > 1:  # `analyse` compares them else
            ranks.agree({"another model": (digest_of_model(net), _SAME)})
    else:
        traced, plan = analyse(
            net, data, recipe, None, "auto", enter, max_batches=max(1, len(data)), ranks=ranks,
            observed=partial(_statistics, kept, ranks, device), mapped=True, device=device,
        )  # fmt: skip
        if kept is not None:
            new = kept.path(_PLAN)
            plan.save(new)
            kept.add(_PLAN, new)
    if kept is None:
        return Plan.decoded(ranks.from_first(b"")), traced
    plan = Plan.load(os.path.join(kept.folder, _PLAN))
    if ranks.count > 1:
        ranks.from_first(plan.encoded())
    return plan, traced


def _statistics(
    kept: Work | None, ranks: Ranks, device: torch.device | None, make: Callable[[], Calibration]
) -> Calibration:
    """The statistics of an earlier run, or those that are made now. All of them are on rank 0 alone."""
    if _finds(kept, _STATISTICS, ranks):
        return Calibration({}, 0) if kept is None else read_statistics(kept.folder, _STATISTICS, device)
    found = make()
    if kept is not None and all(_is_kept(a) for call in found.sample.calls for a in call.arguments):
        new = kept.path(_STATISTICS)
        write_statistics(new, found)
        kept.add(_STATISTICS, new)
    return found


def _finds(kept: Work | None, name: str, ranks: Ranks) -> bool:
    """Whether rank 0 has a file of an earlier run."""
    return bool(ranks.tell(f"find {name}", "yes" if kept is not None and kept.find(name) is not None else "")[0])


def _write(
    kept: Work | None, net: Any, plan: Plan, traced: fx.GraphModule | None, format: str, out: str, ranks: Ranks
) -> Exported:
    if format == NATIVE:
        return export_artifact(net, plan, out, kept=kept, traced=traced, ranks=ranks)
    within = None if kept is None else kept.folder  # where the next run removes what this one leaves
    return export_checkpoint(net, plan, format, out, ranks=ranks, within=within)


def _is_kept(argument: Any) -> bool:
    return argument is None or isinstance(argument, (Tensor, bool, int, float, str))


def _of_batches(data: list[Any]) -> str:
    digest = hashlib.sha256()
    for batch in data:
        leaves, spec = pytree.tree_flatten(batch if not hasattr(batch, "items") else dict(batch.items()))
        digest.update(f"{spec}\n".encode())
        for x in leaves:
            if isinstance(x, Tensor):
                t = x.detach().cpu().contiguous()
                digest.update(f"{t.dtype} {tuple(t.shape)}\n".encode())
                digest.update(t.reshape(-1).view(torch.uint8).numpy().data)
            else:
                digest.update(f"{x!r}\n".encode())
    return digest.hexdigest()
