"""end_to_end: whether smoothing helps a model as a whole, by its outputs on a few calibration calls.

A site's own error does not say it. Roundings of weights are the same for every token, and those of several layers may add
up although each became smaller: seldom in wide layers, where many channels average, now and then in narrow ones. In the
backend of torch.compile each graph is judged by its own outputs.
"""

from __future__ import annotations

import itertools
import logging
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.plan.plan import Plan
from sqcompile.process.parallel import ALONE, Parallel
from sqcompile.statistics.sample import Sample

log = logging.getLogger("sqcompile")

# Smoothing is left out unless a loss of so much can be ruled out. The sample is small, and smoothing guards against larger
# outliers than it holds: so it needs no gain.
TOLERANCE_DB = 0.5

# Calls after which a gain of so much is sure are enough, and so many rows at once: making a plan's weights takes as long.
FEW, FEW_ROWS = 2, 512

# Linears that only smoothing keeps from losing their weight stay in float where the outputs are better by so much.
FLOAT_DB = 6.0

WHY = "smoothing would make the outputs worse, if not of this layer alone"

EXACT = 1e-12  # relative energy of an error that is none: float32's own
MOST_DB = 20.0  # that a row says: where a threshold is crossed, or a value met by luck, it would say anything


def smoothed_or_not(
    choose: Callable[..., Plan],
    sample: Sample,
    quantize: Callable[[Plan], fx.GraphModule],
    parallel: Parallel = ALONE,
) -> Plan:
    """The plan that `choose` makes, or the one without any smoothing where the model's outputs are better for it.

    What cannot be compared stays smoothed, with a warning.

    Args:
        choose: as `passes.planning.choose.choose`, all but whose ``unsmoothed``, ``lost`` and ``on_trial`` are given.
        sample: of the graph's calls.
        quantize: gives the quantized stage of a plan. It is asked for one plan at a time, as each has its own weights.
        parallel: the processes that hold the model together; what is worst in one of them decides.
    """
    plan: Plan = choose()
    if not sample.calls or not (plan.scales or any(a.smoothing != "none" for a in plan.attention)):
        return plan
    with parallel.attempt() as errors:
        instead: dict[str, Any] = {"unsmoothed": WHY}
        other: Plan = choose(**instead, on_trial=True)
        quantized, most = {l.name for l in plan.layers if l.quantized}, TOLERANCE_DB
        lost = {l.name: l.reason for l in other.layers if not l.quantized and l.name in quantized}
        if lost:  # without smoothing, outliers of their weights leave nothing of them (`weight_outliers`)
            instead, most = {"lost": lost}, FLOAT_DB
            other = choose(**instead, on_trial=True)
        worst = _at_worst(sample, quantize, plan, other, parallel)
    if errors:  # memory, say; neither plan is wrong for it
        warnings.warn(
            f"whether smoothing helps the outputs was not compared: {errors[0]}. The model is smoothed as the recipe says; "
            "evaluate it, or calibrate with smaller batches if it is memory that lacks",
            stacklevel=2,
        )
        return plan
    log.debug("the smoothed outputs' noise is %.1f dB above that of the other plan, at worst", worst)
    return choose(**instead) if worst > most else plan


def _at_worst(
    sample: Sample, quantize: Callable[[Plan], fx.GraphModule], plan: Plan, plain: Plan, parallel: Parallel
) -> float:
    """How much worse one plan's outputs may be than another's, in dB: by a few calls where they tell, or by all."""
    noise: tuple[list[Tensor], list[Tensor]] = ([], [])
    worst = math.inf
    rows = itertools.accumulate(max(len(which) for which, _ in call.rows.values()) for call in sample.calls)
    few = max(FEW, sum(total <= FEW_ROWS for total in rows))
    for calls in (slice(few), slice(few, None)):
        if not sample.calls[calls] or worst <= -TOLERANCE_DB:
            break
        for found, p in zip(noise, (plan, plain), strict=True):
            found += _noise(sample, quantize(p), calls)
        worst = parallel.most([at_worst(*noise)])[0]
    return worst


def _noise(sample: Sample, quantized: fx.GraphModule, calls: slice) -> list[Tensor]:
    try:
        with torch.no_grad():
            return sample.noise(quantized, calls)
    finally:
        quantized.graph.owning_module = None  # a cycle, which would keep the weights until garbage is collected


def at_worst(noise: list[Tensor], other: list[Tensor]) -> float:
    """How much worse one noise (see `Sample.noise`) may be than another, in dB: the mean over calls and a standard error.

    Tokens of one call are not independent of each other, so calls are what is averaged. In a call each row of an output
    counts as much: one for each token of a hidden state beside one for each sequence of a pooled output. Rows that are exact
    either way say nothing. Noise that is not finite is the worst.
    """
    calls = []
    for a, b in zip(noise, other, strict=True):
        if not bool(b.isfinite().all()):
            continue
        if not bool(a.isfinite().all()):
            return math.inf
        told = (a > EXACT) | (b > EXACT)
        if bool(told.any()):
            decibels = 10 * ((a[told] + EXACT) / (b[told] + EXACT)).log10()
            calls.append(decibels.clamp(-MOST_DB, MOST_DB).mean())
    if not calls:
        return -math.inf
    means = torch.stack(calls)
    return float(means.mean() + (means.std() / math.sqrt(len(calls)) if len(calls) > 1 else 0.0))
