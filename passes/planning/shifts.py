"""shifts: the means that are taken off linears' inputs, where a norm can do that and a rounding becomes smaller for it.

    Y = X Wᵀ + b = (X - c) Wᵀ + (b + W c)           (Outlier Suppression+, arXiv 2304.09145)

Some channels of a LayerNorm's output lie far from zero for every token, by the norm's bias or by what the model has learned.
The scale of a token has to reach them, though they say nothing: without their mean c the steps of all channels are finer.
The norm's bias takes c, so that nothing is computed for it. Analysis only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, fx

from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import (
    Linear,
    effective_weight,
    evaluate,
    find_linears,
    linear_operands,
    nodes_by_name,
    row_parts,
    value,
)
from sqcompile.passes.labels.match import Site
from sqcompile.passes.labels.shiftable import shiftable
from sqcompile.passes.planning.choice import Known
from sqcompile.passes.planning.feel import Felt, Reads
from sqcompile.passes.planning.overrides import recipe_of
from sqcompile.passes.planning.smoothing import smoothing_scale
from sqcompile.passes.planning.static_scales import has_halves
from sqcompile.passes.planning.stay_float import stay_float
from sqcompile.plan.checks import LARGEST_SHIFT
from sqcompile.plan.recipe import Recipe
from sqcompile.statistics.input_stats import InputStats
from sqcompile.statistics.observe import Calibration

# A norm is changed where the noise of its linears' inputs is expected to become this much smaller.
GAIN = 0.9
# Of fewer different tokens there is no mean: static scales would be too small for any other token.
FEWEST = 16
# With which smoothing that is expected, as none is chosen yet.
_ALPHA = 0.5


def choose_shifts(
    gm: fx.GraphModule,
    sites: Sequence[Site],
    calibration: Calibration,
    recipe: Recipe,
    known: Known,
) -> dict[str, Tensor]:
    """What is taken off the inputs of linears: c by linear name, float32 [K]; the same for all that read one norm.

    c is the mean of the sampled tokens, moved to where the norm's bias less c is a number of the norm's dtype.

    Args:
        gm: a traced graph.
        sites: what `match` found in it.
        calibration: its statistics.
        recipe: the user's choices.
        known: largest values of weights, which are added to it.
    """
    found: dict[str, Tensor] = {}
    linears, nodes, parallel = find_linears(gm), nodes_by_name(gm), about(gm).parallel
    if not any(recipe_of(gm, l, recipe).shift for l in linears):
        return found
    floats = stay_float(gm, linears, calibration, recipe)
    for s in shiftable(gm, sites):
        quantized = [l for l in s.linears if l.name not in floats]
        several = any("#" in l.name or f"{l.name}#2" in calibration.inputs for l in s.linears)
        asked = all(recipe_of(gm, l, recipe).shift for l in s.linears)
        if several or not asked or not quantized or any(parallel.dim(l.name) == 1 for l in s.linears):
            continue
        stats = [calibration.inputs.get(l.name) for l in s.linears]
        first = stats[0]
        told = first is not None and _told(first) and all(_same(x, first) for x in stats)
        if not parallel.every([told])[0]:
            continue
        assert first is not None
        c = _mean(gm, nodes[s.norm], first)
        held = float(c.abs().max()) <= LARGEST_SHIFT  # else no plan holds it
        if not parallel.every([held and all(_bears(gm, l, nodes, c) for l in s.linears if l not in quantized)])[0]:
            continue
        absmax = torch.stack(
            [known.largest_of(l.name, partial(effective_weight, gm, l, nodes)) for l in quantized]
        ).amax(0)
        if any(parallel.dim(l.name) == 0 for l in quantized):
            absmax = parallel.largest(absmax)
        if parallel.every([_shifted_noise(first, c, absmax) < GAIN * _noise(first, first.rows, absmax)])[0]:
            found |= dict.fromkeys((l.name for l in s.linears), c)
    return found


def shifted(
    shifts: Mapping[str, Tensor], calibration: Calibration, felt: Felt | None
) -> tuple[Calibration, Felt | None]:
    """Statistics and gradients where the inputs are shifted; linears that share those share the new ones."""
    stats: dict[tuple[int, int], InputStats] = {}
    reads: dict[Reads, Reads] = {}
    inputs = dict(calibration.inputs)
    for name, c in shifts.items():
        key = id(inputs[name]), id(c)
        if key not in stats:
            stats[key] = inputs[name].shifted(c)
        inputs[name] = stats[key]
        if felt is not None and name in felt.reads and (r := felt.reads[name]) not in reads:
            reads[r] = replace(r, rows=(r.rows.float() - c).to(r.rows.dtype))
    if felt is not None:
        felt = replace(felt, reads={name: reads.get(r, r) for name, r in felt.reads.items()})
    return replace(calibration, inputs=inputs), felt


def _mean(gm: fx.GraphModule, norm: fx.Node, stats: InputStats) -> Tensor:
    mean = stats.rows.float().mean(0)
    bias = norm.args[3] if len(norm.args) > 3 else None
    before = evaluate(gm, bias).float() if isinstance(bias, fx.Node) else torch.zeros_like(mean)
    return before - (before - mean).to(value(norm).dtype).float()


def _bears(gm: fx.GraphModule, l: Linear, nodes: dict[str, fx.Node], c: Tensor) -> bool:
    """Whether b + W c of a linear in float is a number of its dtype. Its rounding is as coarse as that of the linear's results."""
    bias = linear_operands(nodes[l.node])[2]
    w, most = effective_weight(gm, l, nodes).flatten(0, -2), torch.finfo(value(nodes[l.node]).dtype).max
    moved = torch.cat([w[part].float() @ c for part in row_parts(w)])
    new = moved if bias is None else evaluate(gm, bias).float() + moved
    return bool((new.abs() < most).all())


def _told(stats: InputStats) -> bool:
    """Whether there are enough different tokens for a mean: of two of them, what is left is as large by construction."""
    if not has_halves(stats) or stats.unvarying():
        return False
    rows = stats.rows.double()
    mixed = rows @ torch.linspace(1, 2, rows.shape[1], dtype=torch.float64, device=rows.device)
    return len(mixed.unique()) >= FEWEST


def _same(stats: InputStats | None, other: InputStats) -> bool:
    """Whether linears have seen the same tokens: one may read a part of the norm, or other values in another graph."""
    return stats is other or (
        stats is not None and stats.count == other.count and torch.equal(stats.absmax, other.absmax)
    )


def _shifted_noise(stats: InputStats, c: Tensor, w_absmax: Tensor) -> float:
    """`_noise` without a mean, of one half of the tokens, on the other half, which has not made it; of both."""
    rows, less, found = stats.rows.float(), stats.shifted(c), 0.0
    for h in (0, 1):
        mine = stats.half == h
        if not bool(mine.any()) or bool(mine.all()):
            return math.inf
        found += _noise(less, rows[~mine] - rows[mine].mean(0), w_absmax) / 2
    return found


def _noise(stats: InputStats, rows: Tensor, w_absmax: Tensor) -> float:
    """What roundings of rows are expected to cost, but for a constant: squared steps of tokens, times the weight's columns.

    A static step is judged by tokens, too: that of the largest value alone says little of what limits are chosen later.
    """
    s = smoothing_scale(stats.absmax, w_absmax, _ALPHA)
    steps = (rows.float() / s).abs().amax(1)
    return float(steps.square().mean() * (w_absmax * s).square().sum())
