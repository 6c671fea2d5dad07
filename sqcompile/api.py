"""The pipeline, top to bottom: trace -> calibrate -> match -> plan -> fold -> insert_qdq -> lower -> emit."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sqcompile.analysis import ANALYSES, analyse
from sqcompile.capture.call_spec import from_spec
from sqcompile.capture.inputs import Forward
from sqcompile.capture.small_sizes import refuse_small_sizes, with_values
from sqcompile.capture.trace import trace
from sqcompile.capture.traced_call import example_call
from sqcompile.compiled.emit import CompiledModel, check_compiler, emit
from sqcompile.compiled.stages import Stages
from sqcompile.errors import PlanError
from sqcompile.kernels.targets import Target, begin, check_format
from sqcompile.models import check_model, device_for, device_of, on_device, target_for
from sqcompile.passes.ir.about import about
from sqcompile.pipeline import rewrite
from sqcompile.plan.plan import Plan, given_plan
from sqcompile.plan.recipe import Recipe, resolve_recipe
from sqcompile.plan.shards import check_given
from sqcompile.process.interrupts import deferred
from sqcompile.process.lock import analysing, compiling
from sqcompile.process.progress import Show, seconds_so_far, stages
from sqcompile.process.ranks import together

_REWRITES = ("fold", "insert_qdq", "lower", "emit")


def compile(
    model: nn.Module,
    calib_loader: Any = None,
    *,
    recipe: str | Recipe | None = None,
    plan: Plan | str | os.PathLike[str] | None = None,
    example_inputs: Any = None,
    dynamic_shapes: Any = "auto",
    backend: str = "inductor",
    regional: bool = False,
    progress: Show = True,
    target: str | Target | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    act_scales: Mapping[str, Tensor] | str | os.PathLike[str] | None = None,
    max_batches: int | None = None,
    device_mesh: Any = None,
) -> CompiledModel:
    """Compiles a float model to W8A8 INT8 with SmoothQuant. The model itself is never changed.

    In a process group of `torch.distributed`, unless a plan is passed, all ranks call it with the same model and data, and
    share the calibration; see `calibrate`. With a ``device_mesh`` they hold one model together, and each compiles its shard.

    Args:
        model: an nn.Module in eval mode that torch.export can capture.
        calib_loader: calibration batches (tensors, tuples of arguments, dicts of keyword arguments), or a callable
            that runs the model itself. An ``attention_mask`` among the inputs excludes padding. Labels are dropped.
            Whatever else the model does not accept (y of ``(x, y)``, a column of text) is dropped with a warning.
        recipe: "default" (what None stands for), "O1", "O2", "O3", "fp8" or a Recipe.
        plan: from `calibrate` or an earlier compilation, or the path of a saved one: instead of data and recipe. A
            recipe that is passed with it must be the plan's.
        example_inputs: a batch to capture the model with, labels included; the first calibration batch by default.
        dynamic_shapes: "auto" (batch and sequence dynamic), None (static), or as for torch.export.
        backend: "inductor", or "eager" to run the lowered graph as it is.
        regional: whether Inductor compiles one of the repeated blocks for all of them, so that its part does not grow
            with the number of layers. Nothing is fused across blocks, and each is a call of its own.
        progress: True for a line on the terminal, if there is one: the stage that runs, what is counted of it and how long
            the rest will take; False for none; or a function, which is called with a `Progress` in the thread that compiles
            as each stage begins and each step of it is done. What it raises is raised, and nothing was changed. It should
            return at once: other compilations wait for it.
        target: another machine to lower for, such as "cuda-sm90" or "arm64" (see `Target.named`), to look at what would run
            there; the compiled model runs here as well, but not by that machine's kernels. None for the devices of the model.
        evaluate: what ``Recipe.max_degradation`` is percent of, instead of perplexity: a function of a model that gives a
            number, lower being better (return the negative of a score). It is called with the float model and, a few
            times, with quantized ones.
        act_scales: in the place of calib_loader, the largest absolute value of each input channel of the linears: float [K]
            by module name, or the path of a file of them, such as those of SmoothQuant's authors (see `read_act_scales`);
            example_inputs is needed then. They have no tokens to try anything on: where the recipe leaves it open, α is
            0.5 and nothing is rotated, static scales have no margin, and what needs tokens is refused.
        max_batches: how many batches of calib_loader are taken, the first ones; None for as many as have 512 rows together.
            A callable is run as it is.
        device_mesh: the mesh, of one dim, that the model is sharded on (tensor parallel: its parameters are DTensors). All
            processes of the mesh call it, and whatever reads or runs the compiled model, with the same data.

    Returns:
        A CompiledModel: call it as the model.

    Raises:
        SQCompileError: RecipeError, CaptureError, CalibrationError, NothingToQuantizeError or PlanError; the message
            names what to do.
        KeyboardInterrupt: for Ctrl-C, when the step at hand is done; a second one is raised at once.
    """
    stage_names = (*ANALYSES, *_REWRITES) if plan is None else ("trace", *_REWRITES)
    with together(plan is None or device_mesh is not None, device_mesh) as ranks:
        check_compiler(backend, regional)
        check_model(model, device_mesh)
        target = target_for(model, target)
        if plan is not None and evaluate is not None:
            raise PlanError("plan and evaluate: a plan needs no calibration, leave one of them out")
        with deferred(), stages(stage_names, progress if ranks.first else False) as enter:
            if plan is None:
                how = resolve_recipe(recipe)
                check_format(how.dtype, device_of(model), target)  # before it calibrates
                begin(device_of(model), inductor=backend == "inductor")
                traced, plan = analyse(
                    model, calib_loader, how, example_inputs, dynamic_shapes, enter, evaluate, target, act_scales,
                    max_batches, ranks,
                )  # fmt: skip
                if ranks.shares:
                    ranks.done()
            else:
                data = {"calib_loader": calib_loader, "act_scales": act_scales, "max_batches": max_batches}
                plan = given_plan(plan, recipe, next((name for name, given in data.items() if given is not None), None))
                call = example_call(model, example_inputs) or with_values(from_spec(plan.call, device_of(model)))
                begin(device_of(model), inductor=backend == "inductor")
                enter("trace")
                with analysing(model), compiling():
                    traced = trace(model, call, dynamic_shapes)
                    refuse_small_sizes(traced, model, call)
                check_given(plan, about(traced).parallel)
            with compiling():
                history = Stages(model, traced, plan, target)
                about(traced).whole = history.whole
                lowered = rewrite(traced, plan, until="lowered", enter=enter, target=target)
                enter("emit")
                compiled = emit(lowered, Forward.of(model), plan, history, backend, regional)
            compiled.report = replace(compiled.report, seconds=seconds_so_far())
            return compiled


def calibrate(
    model: nn.Module,
    calib_loader: Any = None,
    *,
    recipe: str | Recipe = "default",
    example_inputs: Any = None,
    dynamic_shapes: Any = "auto",
    progress: Show = True,
    evaluate: Callable[[nn.Module], float] | None = None,
    act_scales: Mapping[str, Tensor] | str | os.PathLike[str] | None = None,
    max_batches: int | None = None,
    device_mesh: Any = None,
    device: str | torch.device | None = None,
) -> Plan:
    """Makes the Plan that `compile` would make; ``compile(model, plan=plan)`` then needs no data.

    In an initialized process group of `torch.distributed` it is a collective: every rank calls it with the same model,
    recipe and whole loader, each observes its share of the batches, and all return the plan that one process would have
    made.

    Args:
        model: as for `compile`.
        calib_loader: as for `compile`.
        recipe: "default", "O1", "O2", "O3", "fp8" or a Recipe.
        example_inputs: as for `compile`.
        dynamic_shapes: as for `compile`.
        progress: as for `compile`.
        evaluate: as for `compile`.
        act_scales: as for `compile`.
        max_batches: as for `compile`.
        device_mesh: as for `compile`. Each process has the plan of its own shard, which says so (`Plan.shard`): the decisions
            are the same, scales of sharded channels are its own.
        device: where it computes, such as "cuda", for a model that lies elsewhere and need not fit there: each weight is copied
            as it is used. Its batches are kept in memory then. None for where the model is.

    Returns:
        A Plan, which `Plan.save` writes to a file.

    Raises:
        SQCompileError: as `compile`; on several ranks a CalibrationError where another rank fails, dies, does not come, or
            was passed something else.
        KeyboardInterrupt: as `compile`.
    """
    with together(device_mesh=device_mesh) as ranks:
        check_model(model, device_mesh)
        how = resolve_recipe(recipe)
        with deferred(), stages(ANALYSES, progress if ranks.first else False) as enter:
            there = device_for(model, device)
            begin(there or device_of(model), inductor=False)
            with on_device(there):
                return analyse(
                    model, calib_loader, how, example_inputs, dynamic_shapes, enter, evaluate, None, act_scales, max_batches,
                    ranks, device=there,
                )[1]  # fmt: skip
