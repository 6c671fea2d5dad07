"""analysis: a model and calibration data -> the traced graph, and its Plan. The first half of the pipeline, top to bottom.

trace -> calibrate -> match -> plan
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from sqcompile.capture.batches import first_batches
from sqcompile.capture.call_spec import to_spec
from sqcompile.capture.inputs import Reader, length
from sqcompile.capture.small_sizes import refuse_small_sizes
from sqcompile.capture.traced_call import example_call, traced_call
from sqcompile.checkpoints.act_scales import given_act_scales
from sqcompile.compiled.degradation import by_value
from sqcompile.errors import CalibrationError, RecipeError
from sqcompile.kernels.targets import Target
from sqcompile.models import check_recipe
from sqcompile.passes.attention.chains import find_attentions
from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import find_linears
from sqcompile.passes.ir.placed import placed
from sqcompile.passes.labels.match import match
from sqcompile.passes.planning.absmax_alone import calibration_of, settled
from sqcompile.passes.planning.budget import by_divergence, within_budget
from sqcompile.passes.planning.choice import Known
from sqcompile.passes.planning.choose import choose
from sqcompile.passes.planning.dearest import leave_dearest
from sqcompile.passes.planning.end_to_end import smoothed_or_not
from sqcompile.passes.planning.evidence import with_evidence
from sqcompile.passes.planning.feel import feel
from sqcompile.passes.planning.finite import check_weights
from sqcompile.passes.planning.overrides import check_patterns
from sqcompile.passes.planning.sharing import Sharing, help_first, shared
from sqcompile.passes.planning.shifts import choose_shifts, shifted
from sqcompile.passes.planning.stay_float import wanted
from sqcompile.pipeline import on_trial
from sqcompile.plan.plan import Plan
from sqcompile.plan.recipe import Recipe
from sqcompile.process.lock import analysing, compiling
from sqcompile.process.progress import Enter
from sqcompile.process.ranks import ALONE, Ranks
from sqcompile.statistics.exchange import in_common
from sqcompile.statistics.observe import Calibration
from sqcompile.statistics.observe import calibrate as observe

ANALYSES = ("trace", "calibrate", "match", "plan")


def analyse(
    model: nn.Module,
    loader: Any,
    recipe: Recipe,
    example: Any,
    dynamic_shapes: Any,
    enter: Enter,
    evaluate: Callable[[nn.Module], float] | None = None,
    target: Target | None = None,
    act_scales: Any = None,
    max_batches: int | None = None,
    ranks: Ranks = ALONE,
    observed: Callable[[Callable[[], Calibration]], Calibration] = lambda make: make(),
    mapped: bool = False,
    device: torch.device | None = None,
) -> tuple[fx.GraphModule, Plan]:
    """The traced graph, and the plan made from the data, or from activation scales: by rank 0, for all ranks.

    ``observed`` is given what makes the statistics of data, and gives them: those, or others that are the same. A model whose
    weights are ``mapped`` from files is not run itself, which would read all of them. The plan is made on ``device``, and None
    is where the model is; the graph stays there.
    """
    if loader is None and act_scales is None:
        raise CalibrationError(
            "pass calib_loader (an iterable of real batches, or a callable), act_scales with example_inputs, or a plan"
        )
    if max_batches is not None and (type(max_batches) is not int or max_batches < 1):
        raise CalibrationError(f"max_batches={max_batches!r}: a number of batches, at least 1, or None for 512 rows")
    scales = None
    if act_scales is not None:
        if loader is not None:
            raise CalibrationError("calib_loader and act_scales: either is a calibration, leave one of them out")
        if max_batches is not None:
            raise CalibrationError("max_batches with act_scales, which take no batches: leave it out")
        if evaluate is not None:
            raise RecipeError("evaluate with act_scales, which have no tokens: leave it out, or pass calib_loader")
        recipe, scales = settled(recipe), given_act_scales(act_scales)
    if evaluate is not None and recipe.max_degradation is None:
        raise RecipeError("evaluate without a limit: pass Recipe(max_degradation=...), in percent of what it gives")
    if evaluate is not None and device is not None:
        raise RecipeError("evaluate with device, whose models would be in two places: move the model there instead")
    if evaluate is not None and not callable(evaluate):
        raise RecipeError(f"evaluate={evaluate!r}: pass a function of a model that gives a number, lower being better")
    call, data = example_call(model, example), loader
    reader = Reader(model, call.kwargs if call else ())
    with analysing(model):
        if scales is None:
            first, data = reader.first(loader)
            call = call or first
            if isinstance(data, Iterable):
                data = first_batches(data, max_batches, reader.rows)
        elif call is None:
            raise CalibrationError("act_scales without example_inputs: pass a batch to capture the model with")
        enter("trace")
        with compiling():
            traced, call = traced_call(model, call, dynamic_shapes, reader.forward)
            if not mapped:
                refuse_small_sizes(traced, model, call)
            enter("calibrate")
            attentions = find_attentions(traced) if recipe.attention != "none" else []
            linears = find_linears(traced)
            check_patterns(traced, linears, recipe)
            check_weights(traced, wanted(traced, linears, recipe))
        check_recipe(about(traced).parallel, recipe, scales is not None, device)
        of_model, traced = traced, traced if device is None else placed(traced, device)
        if ranks.count > 1:
            ranks.agree(in_common(model, call, scales, recipe))
        if scales is not None:
            with compiling():
                calibration = calibration_of(traced, scales, recipe)
        else:
            total = length(loader)
            total = max_batches if max_batches is not None and (total is None or total > max_batches) else total
            make = partial(observe, traced, model, data, attentions, total, reader, None, ranks)
            calibration = observed(make)
    with compiling(), torch.no_grad():
        enter("match")
        sites, refusals = match(traced)
        if not ranks.plans:
            del calibration  # of this rank's batches alone
            return of_model, help_first(traced, sites, refusals, recipe, ranks)
        if about(traced).parallel.count > 1:
            found = [(s.name, s.channels) for s in sites] + [(r.linear.name, r.linear.shape) for r in refusals]
            ranks.agree({"another graph": (repr(found), "shard the model alike on every rank")})
        enter("plan")
        felt, known = feel(traced, sites, refusals, calibration, recipe), Known()
        shifts = choose_shifts(traced, sites, calibration, recipe, known)
        calibration, felt = shifted(shifts, calibration, felt)
        sharing = shared(Sharing(traced, sites, refusals, calibration, recipe, felt, ranks))
        given = (traced, sites, refusals, calibration, recipe, to_spec(call), attentions)
        plan_of = partial(choose, *given, felt=felt, sharing=sharing, known=known, shifts=shifts)
        quantized = partial(on_trial, traced)
        plan = smoothed_or_not(plan_of, calibration.sample, quantized, about(traced).parallel)
        if recipe.max_degradation is not None:
            if evaluate is None:
                loses = by_divergence(traced, calibration.sample, quantized)
            else:
                loses = by_value(model, traced, evaluate, target)
            plan = within_budget(traced, plan, calibration, loses)
        plan = leave_dearest(traced, plan, calibration)
        plan = with_evidence(traced, sites, refusals, calibration, plan, type(model).__name__, known)
        if sharing is not None:
            sharing.end(plan)
    return of_model, plan
