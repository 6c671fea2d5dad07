"""load: a saved model, compiled for this machine. No float weights, no source of the model, and nothing is executed."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch import fx, nn

from sqcompile.artifact.code import taken
from sqcompile.artifact.directory import MANIFESTS, Saved, path_name, read
from sqcompile.artifact.sharded import as_artifact, shard_in
from sqcompile.capture.inputs import Forward
from sqcompile.capture.sharded import parallel_on
from sqcompile.capture.trace import register_kv_cache_pytree
from sqcompile.checkpoints.read_model import ReadModel, is_checkpoint, read_model
from sqcompile.compiled.emit import BACKENDS, CompiledModel, emit
from sqcompile.compiled.stages import Stages
from sqcompile.errors import ArtifactError, RecipeError, SQCompileError, StageError
from sqcompile.files.regular import said
from sqcompile.kernels.ops import sqcompile_ops
from sqcompile.kernels.targets import Target
from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import set_tensor, value
from sqcompile.passes.ir.verify import STAGES, verify
from sqcompile.passes.lowering.lower import lower
from sqcompile.passes.rewrite.insert_qdq import quantize_weights
from sqcompile.passes.rewrite.weight_store import Lazy, Shared
from sqcompile.plan.plan import Plan
from sqcompile.process.interrupts import deferred
from sqcompile.process.lock import compiling
from sqcompile.process.parallel import ALONE, Parallel
from sqcompile.process.ranks import together


def load(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    backend: str = "inductor",
    regional: bool = False,
    target: str | Target | None = None,
    code: bool = False,
    device_mesh: Any = None,
) -> CompiledModel:
    """Loads what `CompiledModel.save` wrote, or an INT8 checkpoint, and compiles it for this machine.

    Neither the model's class nor its source is needed. Every tensor's SHA-256 is looked at. Weights are packed one at a
    time, and what is not packed stays in the file, mapped into memory: keep the file as long as the model.

    A checkpoint is a directory of transformers with INT8 W8A8 weights in the format of compressed-tensors, as llm-compressor
    and `export` write it: a causal language model, called with ``input_ids`` and ``attention_mask``, int64 [batch, seq]. Its
    int8 weights are used as they are. The model's source is transformers', and no code of the directory is run.

    Args:
        path: the directory.
        device: where the model is to run, such as "cpu" or "cuda"; None for where it ran when it was saved. A checkpoint
            is loaded for the CPU; save the result, and load that for another device.
        backend, regional, target: as for `compile`.
        code: uses the code that ``save(path, code=True)`` kept, for the backend "inductor" and whole models. That is running
            what is in the directory: pass True for what you or somebody you trust saved. Where versions, processor or GPU are
            others, a warning says so, and the model is compiled here.
        device_mesh: for what `CompiledModel.save` wrote of a sharded model: a mesh of one dim, of as many processes as saved
            it. Each of them calls it, and loads its own shard.

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
    if backend not in BACKENDS:
        raise RecipeError(f"backend={backend!r}: choose one of {', '.join(BACKENDS)}")
    if code and (backend != "inductor" or regional):
        raise RecipeError("code=True is Inductor's code of a whole model: leave out backend and regional, or code")
    parallel = parallel_on(device_mesh)
    if parallel.count == 1:
        return loaded(path, device, backend, regional, target, code)
    with as_artifact(), together(device_mesh=device_mesh) as ranks:
        if code:
            raise ArtifactError("code=True with device_mesh: code is kept of whole models, leave code out")
        return loaded(shard_in(path, parallel, ranks), device, backend, regional, target, parallel=parallel)


def loaded(
    path: str | os.PathLike[str],
    device: Any = None,
    backend: str = "inductor",
    regional: bool = False,
    target: Any = None,
    code: bool = False,
    constants: bool = True,
    parallel: Parallel = ALONE,
) -> CompiledModel:
    """As `load`, of a whole model or one shard.

    Without ``constants`` the compiled code is one that other processes can use, as that of ``code`` is.
    """
    where, on = device_of(device), Target.given(target)
    with deferred(), compiling(), torch.no_grad():
        register_kv_cache_pytree()
        if _is_checkpoint(path):
            if code:
                raise ArtifactError(f"{os.fsdecode(path)} is a checkpoint, which has no code: leave code out")
            return _checkpoint(path_name(path), where, backend, regional, on)
        saved = read(path, where, parallel)
        if code and (why := taken(path, saved.code)):
            warnings.warn(
                f"the code of {os.fsdecode(path)} is not used, and the model is compiled: {why}. Save it again here, with "
                "code=True, to have it used",
                stacklevel=3,
            )
        try:
            history = SavedStages(path, where, on, parallel)
            whole = constants and not code
            return emit(_lowered(saved, on), saved.call, saved.plan, history, backend, regional, whole)
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
    where, on = device_of(device), Target.given(target)
    with deferred(), compiling(), torch.no_grad():
        register_kv_cache_pytree()
        if _is_checkpoint(path):
            found = _read_checkpoint(path_name(path), where)
            return _lower(found.graph, on, lazy=True), found.call, found.plan
        saved = read(path, where)
        return _lower(_filled(saved, _weights(saved)), on, lazy=True), saved.call, saved.plan


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
        register_kv_cache_pytree()
        if _is_checkpoint(path):
            name = path_name(path)
            return read_model(name).plan, CheckpointStages(name, None, None)
        return read(path, None).plan, SavedStages(path, None, None)


def _is_checkpoint(path: Any) -> bool:
    name = path_name(path)
    try:
        return not any(os.path.lexists(os.path.join(name, m)) for m in MANIFESTS) and is_checkpoint(name)
    except ArtifactError as e:
        raise ArtifactError(f"{name} cannot be loaded: {e}") from e


def _checkpoint(
    name: str, where: torch.device | None, backend: str, regional: bool, target: Target | None
) -> CompiledModel:
    found = _read_checkpoint(name, where)
    try:
        lowered = _lower(found.graph, target)
        return emit(lowered, found.call, found.plan, CheckpointStages(name, None, target), backend, regional)
    except SQCompileError:
        raise
    except Exception as e:  # of a graph that no version has made
        raise ArtifactError(f"{name} cannot be loaded ({said(e)}): export it again") from e


def _read_checkpoint(name: str, where: torch.device | None) -> ReadModel:
    if where is not None and where.type != "cpu":
        raise ArtifactError(
            f"a checkpoint is loaded for the CPU, not for {where}: load it, save the result, and load that with device="
        )
    return read_model(name)


class SavedStages(Stages):
    """The stages of a loaded model, read again when looked at.

    Raises:
        StageError: for a stage that is made of float weights.
        ArtifactError: if the directory is gone.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        device: torch.device | None,
        target: Target | None,
        parallel: Parallel = ALONE,
    ) -> None:
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
            if name == "lowered":
                return _lowered(saved, self._target)
            return _filled(saved, {})


class CheckpointStages(SavedStages):
    """The stages of a loaded checkpoint, read again when looked at; errors as of `SavedStages`."""

    def __getitem__(self, name: str) -> fx.GraphModule:
        if name not in ("quantized", "lowered"):
            return super().__getitem__(name)  # which refuses it
        with compiling(), torch.no_grad():
            gm = read_model(self._path).graph
            return _lower(gm, self._target) if name == "lowered" else quantize_weights(gm)


def device_of(device: Any) -> torch.device | None:
    """The device that a user names; None for None.

    Raises:
        ArtifactError: if this machine has no such device.
    """
    try:
        return None if device is None else torch.empty(0, device=device).device
    except Exception as e:
        raise ArtifactError(f"device={device!r} is none of this machine ({said(e)})") from e


def _lowered(saved: Saved, target: Target | None) -> fx.GraphModule:
    return _lower(_filled(saved, _weights(saved)), target)


def _lower(gm: fx.GraphModule, target: Target | None, lazy: bool = False) -> fx.GraphModule:
    store = Shared(lambda tensor: None, lambda key: None)
    return verify(lower(gm, store, target, lazy), "lowered")


def _filled(saved: Saved, lazy: dict[str, Lazy]) -> fx.GraphModule:
    """The graph over its tensors, less those that are read when they are packed."""
    gm = saved.graph
    later = lazy.keys() | {name for l in lazy.values() for name in l.beside}
    about(gm).lazy = lazy
    for n in gm.graph.find_nodes(op="get_attr"):
        if n.target not in later:
            set_tensor(gm, str(n.target), saved.tensors.map(str(n.target)).to(value(n).device))
    return verify(gm, "quantized")


def _weights(saved: Saved) -> dict[str, Lazy]:
    """By name, the int8 weights of linears: each is read from its file as it is packed, so no other node may read it."""
    found = {}
    for n in saved.graph.graph.nodes:
        if n.target not in (sqcompile_ops.dequantize.default, sqcompile_ops.grouped_dequantize.default):
            continue
        acc, scale = n.args[0], n.args[2]
        cast = acc.args[1]
        weight = cast.args[0]
        scale = scale.args[0] if scale.op == "call_function" else scale
        alone = len(weight.users) == len(cast.users) == len(scale.users) == 1
        if not alone or not weight.op == scale.op == "get_attr":
            raise ArtifactError(f"%{n.name} of its graph is no linear of int8 values")
        found[str(weight.target)] = _lazy(saved, weight, scale)
    return found


def _lazy(saved: Saved, weight: fx.Node, scale: fx.Node) -> Lazy:
    def make() -> tuple[torch.Tensor, torch.Tensor]:
        w, s = (saved.tensors.read(str(n.target)).to(value(n).device) for n in (weight, scale))
        return w, s

    return Lazy(("saved", str(weight.target)), make, (str(scale.target),))
