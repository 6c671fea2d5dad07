"""models: what can be compiled at all, said before anything runs: one sentence for each thing that cannot."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from sqcompile.capture.sharded import check_mesh
from sqcompile.compiled.emit import CompiledModel
from sqcompile.errors import ArtifactError, CalibrationError, CaptureError, RecipeError, first_line
from sqcompile.files.regular import said
from sqcompile.kernels.targets import Target
from sqcompile.plan.recipe import Recipe
from sqcompile.process.parallel import Parallel
from sqcompile.pytorch.core import is_wrapper_subclass
from sqcompile.pytorch.distributed import is_distributed


def check_model(model: Any, device_mesh: Any = None) -> None:
    """Refuses what is no float module with values of its own, or with its shards of them on ``device_mesh``.

    Raises:
        CaptureError: saying what to pass instead.
    """
    from sqcompile.pytorch.dynamo import OptimizedModule  # here, as Dynamo imports triton

    if not isinstance(model, nn.Module):
        raise CaptureError(_no_module(model))
    kind = type(model).__name__
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise CaptureError(f"the model is wrapped in {kind}: pass the model in it, model.module")
    for name, module in model.named_modules():
        what = f"its submodule {name!r}" if name else "the model"
        if isinstance(module, CompiledModel):
            raise CaptureError(f"{what} is compiled by sqcompile already: pass the float model it was made from")
        if isinstance(module, OptimizedModule):
            raise CaptureError(
                f"{what} was made by torch.compile: pass the module it was made from, its _orig_mod (or keep torch.compile, "
                'with backend="smoothquant")'
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError(f"{what} is TorchScript, which cannot be captured: pass the nn.Module it was made from")
        if type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
            raise CaptureError(f"{what} ({type(module).__name__}) is quantized already: pass the float model")
        if type(module).__module__.startswith("torch.distributed.fsdp"):
            raise CaptureError(
                f"{what} shards its parameters ({type(module).__name__}): pass a model that holds them whole"
            )
    check_mesh(model, device_mesh)
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        _check_tensor(name, t)


def _check_tensor(name: str, t: Tensor) -> None:
    kind = type(t).__name__
    if is_lazy(t):
        raise CaptureError(f"{name} is not initialized yet: run the model once on a real batch, then compile it")
    if t.is_meta:
        raise CaptureError(
            f"{name} is on the meta device, and has no values: load the model with its weights (not offloaded: without "
            "device_map, where they do not fit)"
        )
    if is_wrapper_subclass(t) and not is_distributed(t):
        raise CaptureError(
            f"{name} is a {kind}, not a plain tensor (quantized or sharded already): load the float model, whole"
        )
    if isinstance(t, nn.Parameter) and type(t) is not nn.Parameter and not t.dtype.is_floating_point:
        raise CaptureError(f"{name} is a {kind} of {t.dtype}, quantized already: load the float model")


def _no_module(x: Any) -> str:
    if isinstance(x, (str, os.PathLike)):
        return (
            f"the model is given by name, {str(x)!r}: load it, and pass the model itself "
            "(transformers: AutoModelForCausalLM.from_pretrained(name))"
        )
    if isinstance(x, type) and issubclass(x, nn.Module):
        return f"the model is the class {x.__name__}: pass an instance, with its weights"
    if isinstance(x, torch.export.ExportedProgram):
        return "the model is an ExportedProgram: pass the nn.Module it was made from (or its .module())"
    if isinstance(x, fx.Graph):
        return "the model is an fx.Graph: pass its GraphModule"
    inside = [f".{name}" for name, v in getattr(x, "__dict__", {}).items() if isinstance(v, nn.Module)]
    if inside:
        return f"a {type(x).__name__} is no nn.Module: pass one that it holds ({', '.join(inside[:6])})"
    if callable(x):
        return (
            f"the model is a function ({getattr(x, '__name__', type(x).__name__)}): pass an nn.Module that calls it, whose "
            'parameters are its own (torch.compile(function, backend="smoothquant") takes functions)'
        )
    return f"the model is a {type(x).__name__}: pass an nn.Module"


def check_recipe(parallel: Parallel, recipe: Recipe, scales: bool, device: torch.device | None = None) -> None:
    """Refuses what processes that hold a model together do not decide together.

    Args:
        parallel: those processes.
        recipe: what is asked of them.
        scales: whether activation scales are given, in the place of data.
        device: where the plan is made, if not where the model is.

    Raises:
        RecipeError: naming it.
    """
    if parallel.count == 1:
        return
    if recipe.attention != "none":
        raise RecipeError(
            f"attention={recipe.attention!r} with device_mesh: products of attention are not quantized in a sharded model, leave "
            "attention out"
        )
    if scales:
        raise RecipeError("act_scales with device_mesh: they are of whole linears, pass calib_loader")
    if device is not None:
        raise RecipeError("device with device_mesh: the processes compute where their shards are, leave device out")


def target_for(model: nn.Module, target: Any) -> Target | None:
    """The target that a user gives for a model.

    Raises:
        RecipeError: for what is none, or cannot take the model's weights on this machine.
    """
    found = Target.given(target)
    if found is not None:
        found.check(device_of(model))
    return found


def device_named(device: Any) -> torch.device | None:
    """The device that a user names; None for None.

    Raises:
        ArtifactError: if this machine has no such device.
    """
    try:
        return None if device is None else torch.empty(0, device=device).device
    except Exception as e:
        raise ArtifactError(f"device={device!r} is none of this machine ({said(e)})") from e


def device_for(model: nn.Module, device: Any) -> torch.device | None:
    """Where the plan of a model is made, as a user names it; None for where the model is.

    Raises:
        CalibrationError: if nothing can be computed there.
    """
    try:
        found = device_named(device)
    except ArtifactError as e:
        raise CalibrationError(f"the plan cannot be made there: {e}") from e
    if found is not None and found.type == "meta":
        raise CalibrationError("device='meta' computes no values: pass cpu, cuda or none")
    return None if found == device_of(model) else found


@contextlib.contextmanager
def on_device(device: torch.device | None) -> Iterator[None]:
    """Has a device that the user named, or the command line found, lack memory in words.

    Raises:
        CalibrationError: in the place of torch.OutOfMemoryError.
    """
    try:
        yield
    except torch.OutOfMemoryError as e:
        if device is None:
            raise
        raise CalibrationError(
            f"{device} has too little memory for the plan ({first_line(e)}): pass smaller batches, or make it on the CPU "
            '(device="cpu", --device cpu)'
        ) from e


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters are; the CPU for one without."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))
