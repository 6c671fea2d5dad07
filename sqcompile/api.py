"""The pipeline, top to bottom: trace -> calibrate -> match -> plan -> fold -> insert_qdq -> lower -> emit."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from sqcompile.capture.batches import TARGETS
from sqcompile.capture.call_spec import from_spec, to_spec
from sqcompile.capture.captured import unread
from sqcompile.capture.inputs import Call, Forward, Reader, length
from sqcompile.capture.models import check_model
from sqcompile.capture.trace import trace
from sqcompile.compiled.emit import BACKENDS, CompiledModel, emit
from sqcompile.compiled.stages import Stages
from sqcompile.errors import CalibrationError, PlanError, RecipeError
from sqcompile.passes.attention.chains import Attention, find_attentions
from sqcompile.passes.ir.graph import Linear, find_linears, nodes_by_name, value
from sqcompile.passes.ir.verify import verify
from sqcompile.passes.labels.head_sites import match_heads
from sqcompile.passes.labels.match import input_sites, match
from sqcompile.passes.labels.split import split_attention, split_sites
from sqcompile.passes.lowering.lower import lower
from sqcompile.passes.planning.choose import choose
from sqcompile.passes.planning.end_to_end import smoothed_or_not
from sqcompile.passes.planning.finite import check_vectors, check_weights
from sqcompile.passes.planning.stay_float import wanted
from sqcompile.passes.planning.uses import as_used
from sqcompile.passes.rewrite.fold import fold
from sqcompile.passes.rewrite.insert_qdq import insert_qdq, quantize_weights
from sqcompile.passes.rewrite.weight_store import Shared
from sqcompile.plan.plan import Plan, given_plan
from sqcompile.plan.recipe import Recipe, resolve_recipe
from sqcompile.process.interrupts import deferred
from sqcompile.process.lock import analysing, compiling
from sqcompile.process.progress import Enter, silent, stages
from sqcompile.show import show_stage
from sqcompile.statistics.observe import calibrate as observe

_ANALYSES = ("trace", "calibrate", "match", "plan")
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
    progress: bool = True,
) -> CompiledModel:
    """Compiles a float model to W8A8 INT8 with SmoothQuant. The model itself is never changed.

    Args:
        model: an nn.Module in eval mode that torch.export can capture.
        calib_loader: calibration batches (tensors, tuples of arguments, dicts of keyword arguments), or a callable
            that runs the model itself. An ``attention_mask`` among the inputs excludes padding. Labels are left out, and
            with a warning what the model does not take, such as y of ``(x, y)`` or a column of text.
        recipe: "default" (what None stands for), "O1", "O2", "O3" or a Recipe.
        plan: from `calibrate` or an earlier compilation, or the path of a saved one: instead of data and recipe. A
            recipe that is passed with it must be the plan's.
        example_inputs: a batch to capture the model with, labels included; the first calibration batch by default.
        dynamic_shapes: "auto" (batch and sequence dynamic), None (static), or as for torch.export.
        backend: "inductor", or "eager" to run the lowered graph as it is.
        regional: whether Inductor compiles one of the repeated blocks for all of them, so that its part does not grow
            with the number of layers. Nothing is fused across blocks, and each is a call of its own.
        progress: whether to show progress bars: the stage that runs, and the calibration batches.

    Returns:
        A CompiledModel: call it as the model.

    Raises:
        SQCompileError: RecipeError, CaptureError, CalibrationError, NothingToQuantizeError or PlanError; the message
            names what to do.
        KeyboardInterrupt: for Ctrl-C, when the step at hand is done; a second one is raised at once.
    """
    if backend not in BACKENDS:
        raise RecipeError(f"backend={backend!r}: choose one of {', '.join(BACKENDS)}")
    check_model(model)
    with deferred(), stages((*_ANALYSES, *_REWRITES) if plan is None else ("trace", *_REWRITES), progress) as enter:
        if plan is None:
            how = resolve_recipe(recipe)
            traced, plan = _analyse(model, calib_loader, how, example_inputs, dynamic_shapes, progress, enter)
        else:
            plan = given_plan(plan, recipe, None if calib_loader is None else "calib_loader")
            call = _example(model, example_inputs) or from_spec(plan.call, _device(model))
            enter("trace")
            with analysing(model), compiling():
                traced = trace(model, call, dynamic_shapes)
        with compiling():
            history = Stages(model, traced, plan)
            lowered = rewrite(traced, plan, until="lowered", enter=enter)
            enter("emit")
            return emit(lowered, Forward.of(model), plan, history, backend, regional)


def calibrate(
    model: nn.Module,
    calib_loader: Any,
    *,
    recipe: str | Recipe = "default",
    example_inputs: Any = None,
    dynamic_shapes: Any = "auto",
    progress: bool = True,
) -> Plan:
    """Makes the Plan that `compile` would make; ``compile(model, plan=plan)`` then needs no data.

    Args and errors: as `compile`.
    """
    check_model(model)
    how = resolve_recipe(recipe)
    with deferred(), stages(_ANALYSES, progress) as enter:
        return _analyse(model, calib_loader, how, example_inputs, dynamic_shapes, progress, enter)[1]


def rewrite(
    traced: fx.GraphModule,
    plan: Plan,
    until: str,
    shared: Shared | None = None,
    enter: Enter = silent,
    shown: bool = True,
) -> fx.GraphModule:
    """The rewrites in their order, up to a stage: "traced", "folded", "quantized" or "lowered".

    With ``shared``, the graph is one of several of a model: it may lack sites of the plan, and shares INT8 weights.
    ``enter`` is told which rewrite begins. ``shown`` is whether SQCOMPILE_SHOW=1 prints the stages.
    """
    show = show_stage if shown else (lambda *_: None)
    gm = verify(traced, "traced")
    text = show(gm, "traced", None)
    if until == "traced":
        return gm
    enter("fold")
    linears = find_linears(gm)
    every = find_attentions(gm) if any(a.quantized != "none" for a in plan.attention) else []
    attentions = [a for a in every if not a.refused]
    if shared is not None:
        plan = split_attention([a.name for a in attentions], as_used(plan, linears, every))
    _check_plan(gm, plan, linears, attentions)
    sites, refusals = match(gm)
    quantized = {l.name for l in plan.layers if l.quantized}
    sites = sites + input_sites(refusals, quantized)
    if shared is not None:
        sites, plan = split_sites(linears, sites, plan)
    check_vectors(gm, [l for l in linears if l.name in quantized])
    folded = {a.name for a in plan.attention if a.quantized != "none" and a.smoothing == "folded"}
    heads, _ = match_heads(gm, [a for a in attentions if a.name in folded])
    gm = verify(fold(gm, sites, plan, heads), "folded")
    text = show(gm, "folded", text)
    if until == "folded":
        return gm
    enter("insert_qdq")
    gm = verify(insert_qdq(gm, plan, shared), "quantized")
    text = show(gm, "quantized", text)
    if until == "quantized":
        return quantize_weights(gm)
    enter("lower")
    gm.graph.owning_module = None  # a cycle, which would keep the plain weights until garbage is collected
    handed_over = [gm]
    del gm  # lower frees each plain int8 weight as it packs it, which no other reference may prevent
    gm = verify(lower(handed_over.pop(), shared), "lowered")
    show(gm, "lowered", text)
    return gm


def _check_plan(gm: fx.GraphModule, plan: Plan, linears: list[Linear], attentions: list[Attention]) -> None:
    planned = {l.name: l.shape for l in plan.layers}
    for l in linears:
        if planned.get(l.name) != l.shape:
            shape = " x ".join(map(str, l.shape))
            raise PlanError(f"the plan has no linear {l.name!r} of shape {shape}: calibrate this model")
    have = {a.name: a for a in attentions}
    nodes = nodes_by_name(gm)
    for p in plan.attention:
        if p.quantized == "none":
            continue
        a = have.get(p.name)
        if a is None or (a.heads, a.groups, a.width) != p.shape:
            raise PlanError(
                f"the plan quantizes the attention {p.name!r}, which this model lacks: calibrate this model"
            )
        step = plan.heads.get(f"{p.name}/value_scale")
        if step is not None and step.shape[-1] != value(nodes[a.v]).shape[-1]:
            raise PlanError(f"the plan's values of the attention {p.name!r} are of another width: calibrate this model")


def _analyse(
    model: nn.Module, loader: Any, recipe: Recipe, example: Any, dynamic_shapes: Any, progress: bool, enter: Enter
) -> tuple[fx.GraphModule, Plan]:
    """The traced graph, and the plan made from the data."""
    if loader is None:
        raise CalibrationError("pass calib_loader (an iterable of real batches, or a callable), or a plan")
    given = _example(model, example)
    reader = Reader(model, given.kwargs if given else ())
    with analysing(model):
        first, data = reader.first(loader)
        call = given or first
        enter("trace")
        with compiling():
            traced = trace(model, call, dynamic_shapes)
            if idle := unread(traced, reader.forward):
                left = {n: v for n, v in call.kwargs.items() if n not in idle}
                call = replace(call, kwargs=left, ignored=tuple(sorted(idle)))
                traced = trace(model, call, dynamic_shapes)
            enter("calibrate")
            attentions = find_attentions(traced) if recipe.attention != "none" else []
            check_weights(traced, wanted(traced, find_linears(traced), recipe))
        calibration = observe(traced, model, data, progress, attentions, length(loader), reader)
    with compiling(), torch.no_grad():
        enter("match")
        sites, refusals = match(traced)
        enter("plan")
        plan_of = partial(choose, traced, sites, refusals, calibration, recipe, to_spec(call), attentions)
        plan = smoothed_or_not(plan_of, calibration.sample, lambda p: rewrite(traced, p, "quantized", shown=False))
        return traced, plan


def _example(model: nn.Module, example: Any) -> Call | None:
    return None if example is None else Reader(model, TARGETS).call(example)


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
