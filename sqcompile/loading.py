"""load: a saved model, compiled for this machine. No float weights, no source of the model, and nothing is executed."""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from typing import Any

import torch
from torch import fx, nn

from sqcompile.artifact.code import taken
from sqcompile.artifact.directory import path_name, read
from sqcompile.artifact.fill import filled, lowered, lowered_graph
from sqcompile.artifact.moved import moved
from sqcompile.artifact.sharded import as_artifact, shard_in
from sqcompile.capture.inputs import Forward
from sqcompile.capture.sharded import parallel_on
from sqcompile.checkpoints.read_model import ReadModel, is_checkpoint, read_model
from sqcompile.compiled.emit import CompiledModel, check_compiler, emit
from sqcompile.compiled.stages import Stages
from sqcompile.errors import ArtifactError, RecipeError, SQCompileError, StageError
from sqcompile.files.directory import MANIFESTS
from sqcompile.files.regular import said
from sqcompile.kernels.targets import Target, begin
from sqcompile.models import device_named
from sqcompile.passes.ir.verify import STAGES
from sqcompile.passes.rewrite.insert_qdq import quantize_weights
from sqcompile.plan.plan import Plan
from sqcompile.process.interrupts import deferred
from sqcompile.process.lock import compiling
from sqcompile.process.parallel import ALONE, Parallel
from sqcompile.process.progress import Enter, Show, silent, stages
from sqcompile.process.ranks import together

_STAGES = ("read", "lower", "emit")


def load(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    backend: str = "inductor",
    regional: bool = False,
    target: str | Target | None = None,
    code: bool = False,
    device_mesh: Any = None,
    progress: Show = True,
) -> CompiledModel:
    """Loads what `CompiledModel.save` wrote, or an INT8 checkpoint, and compiles it for this machine.

    Neither the model's class nor its source is needed. Every tensor's SHA-256 is looked at. Weights are packed one at a
    time, and what is not packed stays in the file, mapped into memory: keep the file as long as the model.

    A checkpoint is a directory of transformers with INT8 W8A8 weights in the format of compressed-tensors, as llm-compressor
    and `export` write it: a causal language model, called with ``input_ids`` and ``attention_mask``, int64 [batch, seq]. Its
    int8 weights are used as they are. The model's source is transformers', and no code of the directory is run.

    Args:
        path: the directory.
        device: where the model is to run, such as "cpu" or "cuda"; None for where it ran when it was saved, and of a
            checkpoint for the CPU.
        backend, regional, target: as for `compile`.
        code: uses the code that ``save(path, code=True)`` kept, for the backend "inductor" and whole models. That is running
            what is in the directory: pass True for what you or somebody you trust saved. Where versions, processor or GPU are
            others, a warning says so, and the model is compiled here.
        device_mesh: for what `CompiledModel.save` wrote of a sharded model: a mesh of one dim, of as many processes as saved
            it. Each of them calls it, and loads its own shard.
        progress: as for `compile`; its stages are "read", "lower" and "emit".

    Returns:
        A CompiledModel. It has the stages "quantized" and "lowered". A result of a class that is not known here, such as a
        dataclass of the model's source, comes as `Outputs`: the same names, as keys and as attributes.

    Raises:
        ArtifactError: if the directory is none, is damaged or of a newer format, or does not fit this machine, or
            ``device_mesh``; in every process of that where it is so in one.
        CaptureError: for a ``device_mesh`` that is no mesh of one dim.
        RecipeError: for an unknown backend or target.
        KeyboardInterrupt: as `compile`.
    """
    check_compiler(backend, regional)
    if code and (backend != "inductor" or regional):
        raise RecipeError("code=True is Inductor's code of a whole model: leave out backend and regional, or code")
    parallel = parallel_on(device_mesh)
    if parallel.count == 1:
        with stages(_STAGES, progress) as enter:
            return loaded(path, device, backend, regional, target, code, enter=enter)
    with as_artifact(), together(device_mesh=device_mesh) as ranks:
        if code:
            raise ArtifactError("code=True with device_mesh: code is kept of whole models, leave code out")
        with stages(_STAGES, progress if ranks.first else False) as enter:
            shard = shard_in(path, parallel, ranks)
            return loaded(shard, device, backend, regional, target, parallel=parallel, enter=enter)


def loaded(
    path: str | os.PathLike[str],
    device: Any = None,
    backend: str = "inductor",
    regional: bool = False,
    target: Any = None,
    code: bool = False,
    constants: bool = True,
    parallel: Parallel = ALONE,
    enter: Enter = silent,
) -> CompiledModel:
    """As `load`, of a whole model or one shard; ``enter`` is told of its stages.

    Without ``constants`` the compiled code is one that other processes can use, as that of ``code`` is.
    """
    where, on = device_named(device), Target.given(target)
    with deferred(), compiling(), torch.no_grad():
        enter("read")
        checkpoint = _is_checkpoint(path)
        ahead = functools.partial(begin, torch.device("cpu") if where is None else where, backend == "inductor")
        if not code:
            ahead()
        if checkpoint:
            if code:
                raise ArtifactError(f"{os.fsdecode(path)} is a checkpoint, which has no code: leave code out")
            return _checkpoint(path_name(path), where, backend, regional, on, enter)
        saved = read(path, where, parallel)
        if code and (why := taken(path, saved.code)):
            warnings.warn(
                f"the code of {os.fsdecode(path)} is not used, and the model is compiled: {why}. Save it again here, with "
                "code=True, to have it used",
                stacklevel=3,
            )
        if code:
            ahead()  # what the directory has of it lies in the cache only now
        try:
            history = SavedStages(path, where, on, saved.identity, parallel)
            whole = constants and not code
            enter("lower")
            gm = lowered(saved, on)
            enter("emit")
            return emit(gm, saved.call, saved.plan, history, backend, regional, whole)
        except SQCompileError:
            raise
        except Exception as e:  # of a graph that no version has saved
            raise ArtifactError(f"{os.fsdecode(path)} cannot be loaded ({said(e)}): save the model again") from e


def unpacked(
    path: str | os.PathLike[str], device: Any = None, target: Any = None
) -> tuple[fx.GraphModule, Forward, Plan]:
    """The lowered graph of what `load` loads, how it is called, and its plan. It need not fit in memory.

    Its weights are read and packed when they are asked for (``About.lazy``); what stays in float is mapped.

    Raises:
        SQCompileError: as `load`.
    """
    where, on = device_named(device), Target.given(target)
    with deferred(), compiling(), torch.no_grad():
        if _is_checkpoint(path):
            found = _read_checkpoint(path_name(path), where)
            return lowered_graph(found.graph, on, lazy=True), found.call, found.plan
        saved = read(path, where)
        return lowered(saved, on, lazy=True), saved.call, saved.plan


def is_saved(folder: str) -> bool:
    """Whether a directory is one that `load` reads, and no float model.

    Raises:
        ArtifactError: if its config.json cannot be read.
    """
    return any(os.path.lexists(os.path.join(folder, name)) for name in MANIFESTS) or is_checkpoint(folder)


def opened(path: str | os.PathLike[str]) -> tuple[Plan, SavedStages]:
    """The plan and the stages of what `load` loads, which is not compiled.

    Raises:
        ArtifactError: as `load`.
    """
    with deferred(), compiling(), torch.no_grad():
        if _is_checkpoint(path):
            name = path_name(path)
            found = read_model(name)
            return found.plan, CheckpointStages(name, None, None, found.identity)
        saved = read(path, None)
        return saved.plan, SavedStages(path, None, None, saved.identity)


def _is_checkpoint(path: Any) -> bool:
    name = path_name(path)
    try:
        return not any(os.path.lexists(os.path.join(name, m)) for m in MANIFESTS) and is_checkpoint(name)
    except ArtifactError as e:
        raise ArtifactError(f"{name} cannot be loaded: {e}") from e


def _checkpoint(
    name: str, where: torch.device | None, backend: str, regional: bool, target: Target | None, enter: Enter
) -> CompiledModel:
    found = _read_checkpoint(name, where)
    try:
        enter("lower")
        gm = lowered_graph(found.graph, target)
        enter("emit")
        return emit(
            gm, found.call, found.plan, CheckpointStages(name, where, target, found.identity), backend, regional
        )
    except SQCompileError:
        raise
    except Exception as e:  # of a graph that no version has made
        raise ArtifactError(f"{name} cannot be loaded ({said(e)}): export it again") from e


def _read_checkpoint(name: str, where: torch.device | None) -> ReadModel:
    found = read_model(name)
    if where is None or where.type == "cpu":
        return found
    try:
        return dataclasses.replace(found, graph=moved(found.graph, where))
    except ArtifactError as e:
        raise ArtifactError(f"{name} cannot be loaded for {where}: {e}") from e


class SavedStages(Stages):
    """The stages of a loaded model, read again when looked at.

    Raises:
        StageError: for a stage that is made of float weights.
        ArtifactError: if the directory is gone, or holds another model by now.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        device: torch.device | None,
        target: Target | None,
        identity: str,
        parallel: Parallel = ALONE,
    ) -> None:
        """``identity``: of what was loaded."""
        self._identity = identity
        self._path, self._device, self._target = os.path.abspath(os.fsdecode(path)), device, target
        self._parallel = parallel
        self.original = frozenset()  # nothing is shared with a model

    def model(self) -> nn.Module:
        raise StageError(
            "a loaded model has no float weights to export: pass the float model to sqcompile.export(model, compiled.plan, ...)"
        )

    def __getitem__(self, name: str) -> fx.GraphModule:
        if name not in STAGES:
            raise KeyError(f"no stage {name!r}: the stages are {', '.join(STAGES)}")
        if name in ("traced", "folded"):
            raise StageError(
                f"a saved model has no stage {name!r}, which holds the float weights: compile the float model with its plan"
            )
        with compiling(), torch.no_grad():
            saved = read(self._path, self._device, self._parallel)
            self._check(saved.identity)
            if name == "lowered":
                return lowered(saved, self._target)
            return filled(saved.graph, saved.tensors.map, {})

    def _check(self, identity: str) -> None:
        if identity != self._identity:
            raise ArtifactError(
                f"{self._path} holds another model than the one that was loaded from it: load it again, or save to other "
                "directories"
            )

    def graph(self, name: str) -> fx.GraphModule:
        """The same: INT8 weights are mapped from their file."""
        return self[name]


class CheckpointStages(SavedStages):
    """The stages of a loaded checkpoint, read again when looked at; errors as of `SavedStages`."""

    def __getitem__(self, name: str) -> fx.GraphModule:
        if name not in ("quantized", "lowered"):
            return super().__getitem__(name)  # which refuses it
        with compiling(), torch.no_grad():
            found = _read_checkpoint(self._path, self._device)
            self._check(found.identity)
            return lowered_graph(found.graph, self._target) if name == "lowered" else quantize_weights(found.graph)
