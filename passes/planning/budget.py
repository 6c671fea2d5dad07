"""budget: the fewest linears in float, by their INT8 work, with which a model keeps ``Recipe.max_degradation``.

    a: loss 3e-4, work 1        Recipe(max_degradation=0.02)        a: float
    b: loss 1e-4, work 1                  ->                        b: quantized
    c: loss 1e-4, work 4                                            c: quantized

Linears that read one tensor share its rounding: they are one unit. Units are ranked by what they cost (`loss`, from gradients)
for each multiplication that INT8 makes cheaper. Leaving the first k of them in float leaves a cost that the formula tells to
some percent. The quantized model itself decides: it is run, the formula corrected by what it gives, and k looked for again,
until one unit less in float would be too few.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from sqcompile.errors import CalibrationError, NothingToQuantizeError
from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import find_linears
from sqcompile.passes.planning.feel import logits_of
from sqcompile.plan.edit import in_float
from sqcompile.plan.entries import LayerPlan
from sqcompile.plan.plan import Plan
from sqcompile.statistics.observe import Calibration
from sqcompile.statistics.sample import Sample

GUESSES = 4  # by the corrected formula; then the middle of what is left

_PASS = "pass evaluate=, a function of a model that gives a number (lower is better), to sqcompile.compile or calibrate"


@dataclass(frozen=True)
class Unit:
    """Quantized linears that read one tensor.

    Attributes:
        names: of the linears.
        loss: what they cost the outputs, as `LayerPlan.loss` of all.
        work: multiplications that run in INT8, in all calibration calls and all processes that hold the model together.
    """

    names: tuple[str, ...]
    loss: float
    work: float


def within_budget(
    gm: fx.GraphModule, plan: Plan, calibration: Calibration, degradation: Callable[[Plan], float]
) -> Plan:
    """The plan with as few linears left in float as keep ``Recipe.max_degradation``.

    Args:
        gm: a traced graph.
        plan: of the graph.
        calibration: its statistics.
        degradation: what the model loses with a plan, in percent.

    Raises:
        NothingToQuantizeError: if every linear would be left in float.
    """
    most = plan.recipe.max_degradation
    assert most is not None
    units = ranked(gm, plan, calibration)
    logits, parallel = bool(logits_of(gm)), about(gm).parallel  # processes that hold the model together decide alike

    def left(chosen: Sequence[Unit]) -> Plan:
        return without(plan, {n for u in chosen for n in u.names}, most, logits)

    def loses(chosen: Sequence[Unit]) -> float:
        return parallel.most([degradation(left(chosen))])[0]

    def told(chosen: Sequence[Unit]) -> float:
        return 100 * _grown(sum(u.loss for u in units if u not in chosen))

    low, high, factor, runs = -1, len(units), 1.0, 0  # low units are too few, high are enough
    while high - low > 1:
        enough = (k for k in range(low + 1, high) if factor * told(units[:k]) <= most)
        k = next(enough, high - 1) if runs < GUESSES else (low + high) // 2
        found, runs = loses(units[:k]), runs + 1
        low, high = (low, k) if found <= most else (k, high)
        by_formula = told(units[:k])
        factor = found / by_formula if 0 < by_formula < math.inf and 0 < found < math.inf else factor
    if high == len(units):
        attended = any(a.quantized != "none" for a in plan.attention)
        hint = ", or leave attention in float, which costs something, too" if attended else ""
        raise NothingToQuantizeError(
            f"nothing to quantize: with max_degradation={most} every linear stays in float, as those that cost least in "
            f"{plan.recipe.dtype.upper()} cost more. Raise it{hint}"
        )
    chosen = units[:high]
    # with the last of them, one before it that is larger may be more than is needed
    for u in sorted(chosen[:-1], key=lambda u: -u.work):
        if factor * told(rest := [x for x in chosen if x is not u]) <= most:
            return left(rest if loses(rest) <= most else chosen)
    return left(chosen)


def ranked(gm: fx.GraphModule, plan: Plan, calibration: Calibration) -> list[Unit]:
    """The quantized linears of a plan, those first that cost most for their work.

    Where nothing is known of what the outputs feel, a linear's own relative error stands for it.
    """
    layers = {l.name: l for l in plan.layers if l.quantized}
    known = any(l.loss is not None for l in layers.values())
    groups: dict[tuple[str, str | None], list[str]] = {}
    work: dict[str, float] = {}
    for l in find_linears(gm):
        if l.name in layers:
            groups.setdefault((l.x, l.offsets), []).append(l.name)
            work[l.name] = float(calibration.inputs[l.name].count) * l.out_features * l.in_features
    losses = {n: (l.loss or 0.0) if known else _noise(l) for n, l in layers.items()}
    totals = about(gm).parallel.total([sum(work[n] for n in g) for g in groups.values()])
    units = [Unit(tuple(g), sum(losses[n] for n in g), w) for g, w in zip(groups.values(), totals, strict=True)]
    return sorted(units, key=lambda u: u.loss / max(u.work, 1.0), reverse=True)


def _noise(l: LayerPlan) -> float:
    """The energy of a linear's rounding for that of its output; 0 where nobody knows it."""
    return 0.0 if l.sqnr_db is None else 10 ** (-l.sqnr_db / 10)


def without(plan: Plan, names: set[str], most: float, logits: bool) -> Plan:
    """The plan with some linears in float: scales of sites that none is quantized of are dropped, others stay."""
    because = f"max_degradation={most}"
    return in_float(plan, {l.name: left_in_float(l, because, logits) for l in plan.layers if l.name in names})


def left_in_float(l: LayerPlan, because: str, logits: bool) -> LayerPlan:
    """What a plan says of a linear that stays in float for what it would cost."""
    if l.loss is None:
        cost = "" if l.sqnr_db is None else f"its own relative error is {100 * 10 ** (-l.sqnr_db / 20):.2g} %, and "
    else:
        cost = f"costs {100 * _grown(l.loss):.2g} % of {'perplexity' if logits else 'the outputs'}, and "
    return LayerPlan(l.name, l.kind, False, "none", f"left in float: {cost}{because}", shape=l.shape, loss=l.loss)


def _grown(loss: float) -> float:
    return math.expm1(loss) if loss < 700 else math.inf


def by_divergence(
    gm: fx.GraphModule, sample: Sample, quantize: Callable[[Plan], fx.GraphModule]
) -> Callable[[Plan], float]:
    """What perplexity grows by on a graph's sampled calls, exp(KL) - 1 in percent, with one standard error added.

    Args:
        gm: a traced graph.
        sample: of its calls.
        quantize: gives the quantized stage of a plan.

    Raises:
        CalibrationError: if the graph has no logits, or no call that can be run again.
    """
    logits = logits_of(gm)
    if not logits:
        raise CalibrationError(f"max_degradation is percent of perplexity, and the model gives no logits: {_PASS}")
    if not any(i in logits for call in sample.calls for i in call.rows):
        raise CalibrationError(f"max_degradation: no calibration call can be run again to see its logits: {_PASS}")

    def degradation(plan: Plan) -> float:
        quantized = quantize(plan)
        try:
            with torch.no_grad():
                calls = sample.divergence(quantized, logits)
        finally:
            quantized.graph.owning_module = None  # a cycle, which would keep the weights until garbage is collected
        return 100 * _grown(at_most(calls))

    return degradation


def at_most(calls: Sequence[Tensor]) -> float:
    """The mean over rows, and one standard error of it: between calls, whose rows depend on each other; else of the rows."""
    rows = torch.cat(list(calls)).double()
    if not bool(rows.isfinite().all()):
        return math.inf
    means = torch.stack([c.double().mean() for c in calls]) if len(calls) > 1 else rows
    error = float(means.std()) / math.sqrt(len(means)) if len(means) > 1 else 0.0
    return float(rows.mean()) + error
