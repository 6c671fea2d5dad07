"""weight_outliers: weights of which rounding leaves too little, as a few values take the whole range. Analysis only.

A step is 1/127 of a row's largest value (of the whole weight's, per tensor). One value a hundred times as large as any other
leaves nothing of these, and the error of the product tells little of it, which that value dominates, too. So the signal to noise
ratio is that of the other values alone: those of at most `ORDINARY` medians of their row, smoothed, and the error that they
have when they have been rotated, quantized and rotated back. It is 40 dB for normal weights per channel, 30 dB for FP8, and does
not depend on the data.

Outliers in single input channels are taken out by smoothing and spread by rotation, which were tried before. What is still
lost stays in float; so does what is lost without smoothing, where the outputs are much better for it (`end_to_end`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sqcompile.kernels.reference import weight_scale
from sqcompile.passes.ir.graph import Linear, row_parts, row_step
from sqcompile.passes.planning.error import Chooser
from sqcompile.passes.planning.loss import LARGEST, Transform, rounded

ORDINARY = 16.0  # medians of a row: eleven standard deviations of normal values
LEAST_DB = (
    12.0  # a sixteenth of the energy of ordinary values; trained weights keep 18 dB per tensor, 23 dB per channel
)


@dataclass
class _Sums:
    """Over rows of a weight.

    Attributes:
        signal: energy of ordinary values.
        noise: energy of their errors.
        largest: the largest value that a scale is made for, in medians of the row.
    """

    signal: float = 0.0
    noise: float = 0.0
    largest: float = 0.0

    def add(self, w: Tensor, error: Tensor, limit: Tensor) -> None:
        """Adds rows w [R, K], their errors, and the largest values that have their scales, [R, 1] or [1, 1].

        Zeros, as of pruned weights, are no values.
        """
        size = w.abs()
        median = torch.where(size > 0, size, math.nan).nanmedian(-1, keepdim=True).values.nan_to_num(0.0)
        ordinary = size <= ORDINARY * median
        self.signal += float((w.double().square() * ordinary).sum())
        self.noise += float((error.double().square() * ordinary).sum())
        self.largest = max(self.largest, float(torch.where(median > 0, limit / median, 0.0).amax()))


def all_lost(chooser: Chooser, linears: Iterable[Linear], floats: Mapping[str, str]) -> dict[str, str]:
    """Of linears that do not stay in float: why too little is left of some, by name."""
    return {l.name: why for l in linears if l.name not in floats and (why := lost(chooser, l))}


def lost(chooser: Chooser, l: Linear) -> str | None:
    """In words, why too little is left of a linear's weight under the scales that were chosen for it, or None."""
    weight, how = chooser.weight(l), chooser.transform(l, chooser.columns.get(l.name))
    per_tensor, sums = chooser.own[l.name].weight == "per_tensor", _Sums()
    for w in weight if l.experts else [weight]:
        _add(sums, w, how, per_tensor, chooser)
    sums.signal, sums.noise = chooser.parallel.total([sums.signal, sums.noise])
    sums.largest = chooser.parallel.most([sums.largest])[0]
    if sums.largest <= ORDINARY or not 0 < sums.noise < math.inf:
        return None
    left = 10 * math.log10(sums.signal / sums.noise)
    if left >= LEAST_DB:
        return None
    scale = "one scale for all of it" if per_tensor else "a scale for each row"
    return (
        f"its weight has outliers, up to {sums.largest:.3g} times the median of their row: {scale} leaves {left:.1f} dB of "
        f"the other values in {chooser.qtype.name.upper()}"
    )


def _add(sums: _Sums, w: Tensor, how: Transform, per_tensor: bool, chooser: Chooser) -> None:
    """Adds one matrix [N, K]; of a large one, some rows."""
    parts, common, q_max = row_parts(w), None, chooser.qtype.q_max
    plain = replace(how, block=None)
    if per_tensor:
        common = torch.stack([weight_scale(how.weight(w, p), False, q_max) for p in parts]).amax().view(1, 1)
        largest = torch.stack([plain.weight(w, p).abs().amax() for p in parts]).amax().view(1, 1)
        common, largest = how.across(common), how.across(largest)
    step = row_step(w, LARGEST)
    for part in parts if step == 1 else [slice(0, None, step)]:
        each = plain.weight(w, part)
        rotated = how.rotated(each)
        by = how.across(weight_scale(rotated, True, q_max)) if common is None else common
        error = how.rotated(rounded(rotated, by, chooser.qtype) - rotated)  # a rotation is its own inverse
        sums.add(each, error, each.abs().amax(-1, keepdim=True) if common is None else largest)
