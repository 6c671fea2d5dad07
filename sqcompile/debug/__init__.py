"""debug: which step of the pipeline makes a compiled model wrong, and where in the model.

sqcompile.debug.bisect(model, inputs)
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from sqcompile.analysis import analyse
from sqcompile.capture.captured import contiguous, flatten_like
from sqcompile.capture.inputs import Call, as_call
from sqcompile.capture.trace import trace
from sqcompile.compiled.walk import without_autocast
from sqcompile.debug.folds import Part, compare_folds
from sqcompile.debug.lowering import compare_lowering
from sqcompile.debug.result import Bisection, NodeError, SiteError
from sqcompile.errors import CalibrationError
from sqcompile.kernels.targets import Target
from sqcompile.models import check_model, target_for
from sqcompile.passes.attention.chains import find_attentions
from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import find_linears
from sqcompile.passes.ir.verify import verify
from sqcompile.passes.lowering.lower import lower
from sqcompile.pipeline import check_plan, rewrite
from sqcompile.plan.names import linear_labels
from sqcompile.plan.plan import Plan, given_plan
from sqcompile.plan.recipe import Recipe, resolve_recipe
from sqcompile.process.interrupts import deferred
from sqcompile.process.lock import analysing, compiling
from sqcompile.process.progress import Enter, Show, each, stages

__all__ = ["Bisection", "NodeError", "SiteError", "bisect"]


def bisect(
    model: nn.Module,
    inputs: Any,
    *,
    recipe: str | Recipe | None = None,
    plan: Plan | str | os.PathLike[str] | None = None,
    dynamic_shapes: Any = "auto",
    progress: Show = True,
    target: str | Target | None = None,
) -> Bisection:
    """Finds the smoothing site whose fold changes the model, and the lowered operator that computes something else.

    Folding must leave the function as it is, so each site is folded alone, and the outputs are compared with the traced
    graph's. This is done in float64, whatever the model's dtype, so that rounding hides nothing: a right fold is off by
    1e-15 or so, a wrong one by about as much as its scales are from 1. (An operator or a device without float64 gets
    float32, or the model's own dtype.) Sites that the plan leaves alone are folded, too, by scales drawn at random. Where
    every site is right alone and all together are wrong, sets of sites are bisected.

    Lowering must keep the quantized stage's values. Each INT8 linear and attention is computed from that stage's own
    inputs, so an error is the operator's own. Fused into one operator, it is compared where the operator ends.

    With a rule that lets scales pass gelu, of two layers with relu and gelu:

        >>> sqcompile.debug.bisect(model, x)
        folds: relative error of the outputs with one site folded, in float64
          layers.0: norm -> a  1.1e-16  drawn scales
          layers.0: a -> b     1.3e-16  drawn scales
          layers.1: norm -> a  5.6e-17  drawn scales
          layers.1: a -> b     4.2e-02  drawn scales  <- wrong, worst
          all 4 sites          4.2e-02  <- wrong
        first wrong fold: layers.1: a -> b (rounding may cost 1.0e-09)

        lowering: relative error of each INT8 result, computed from the quantized stage's values
          layers.0: a  0.0e+00  int8_linear_packed
          layers.0: b  0.0e+00  int8_linear_packed
          layers.1: a  0.0e+00  int8_linear_packed
          layers.1: b  0.0e+00  int8_linear_packed
        every lowered node is right, to 1.0e-05

    Args:
        model: as for `sqcompile.compile`; it is never changed.
        inputs: one call of the model, as a calibration batch: a tensor, a tuple of arguments or a dict of keyword
            arguments. A few tokens are enough. It is what calibrates, where no plan is given.
        recipe: as for `sqcompile.compile`. Attentions are examined where it quantizes them.
        plan: the plan to examine, or the path of a saved one, instead of a recipe.
        dynamic_shapes: as for `sqcompile.compile`.
        progress: as for `sqcompile.compile`; True prints the result, too.
        target: as for `sqcompile.compile`.

    Returns:
        A Bisection. Its text has an error for each site and each INT8 operator, and names the first wrong ones, which are
        its ``first_wrong_fold`` and ``first_wrong_node``.

    Raises:
        SQCompileError: as `sqcompile.compile`; CalibrationError for inputs that are no single call.
    """
    check_model(model)
    target = target_for(model, target)
    _check_inputs(inputs)
    with deferred(), stages(("trace", "calibrate", "match", "plan", "fold", "lower"), progress) as enter:
        call = as_call(model, inputs)
        if plan is None:
            traced, plan = analyse(model, [inputs], resolve_recipe(recipe), None, dynamic_shapes, enter)
        else:
            plan = given_plan(plan, recipe, None)
            enter("trace")
            with analysing(model), compiling():
                traced = trace(model, call, dynamic_shapes)
        with compiling(), torch.no_grad(), without_autocast(model.parameters()):
            found = _compare(traced, plan, _arguments(call, traced), enter, target)
    if progress is True:
        print(found)
    return found


def _compare(
    traced: fx.GraphModule, plan: Plan, arguments: list[Any], enter: Enter, target: Target | None
) -> Bisection:
    linears = find_linears(traced)
    attentions = find_attentions(traced) if any(a.quantized != "none" for a in plan.attention) else []
    check_plan(traced, plan, linears, [a for a in attentions if not a.refused])
    enter("fold")

    def counted(parts: list[Part]) -> Iterable[Part]:
        return each(parts, "sites")

    folds, together, wrong_together, dtype = compare_folds(traced, plan, arguments, counted)
    nodes: tuple[NodeError, ...] = ()
    if not together.failure:
        enter("lower")
        quantized = rewrite(traced, plan, until="quantized", shown=False)
        lowered = verify(lower(quantized, target=target), "lowered")
        nodes = compare_lowering(quantized, lowered, arguments, linear_labels(l.name for l in linears))
    return Bisection(folds, together, wrong_together, nodes, dtype)


def _arguments(call: Call, traced: fx.GraphModule) -> list[Any]:
    return contiguous(flatten_like(call, about(traced).calls))


def _check_inputs(inputs: Any) -> None:
    """Refuses what holds calls, and is none.

    Raises:
        CalibrationError: saying what to pass.
    """
    if isinstance(inputs, (list, tuple)) and any(isinstance(x, Mapping) for x in inputs):
        raise CalibrationError("inputs is a list of batches: pass one of them, inputs=batches[0]")
    if not isinstance(inputs, (Tensor, list, tuple, Mapping)):
        kind = type(inputs).__name__
        remedy = "pass one batch of it, next(iter(...))" if isinstance(inputs, Iterable) else "pass one call"
        raise CalibrationError(
            f"inputs is a {kind}: {remedy}: a tensor, a tuple of arguments or a dict of keyword arguments"
        )
