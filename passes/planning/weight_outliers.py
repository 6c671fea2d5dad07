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
from dataclasses import replace

import torch
from torch import Tensor

from sqcompile.kernels.qtypes import QType
from sqcompile.kernels.reference import weight_scale
from sqcompile.passes.ir.graph import Linear, row_parts, row_step
from sqcompile.passes.planning.error import Chooser
from sqcompile.passes.planning.loss import LARGEST, Transform, rounded

ORDINARY = 16.0  # medians of a row: eleven standard deviations of normal values
LEAST_DB = (
    12.0  # a sixteenth of the energy of ordinary values; trained weights keep 18 dB per tensor, 23 dB per channel
)


def all_lost(chooser: Chooser, linears: Iterable[Linear], floats: Mapping[str, str]) -> dict[str, str]:
    """Of linears that do not stay in float: why too little is left of some, by name."""
    return {l.name: why for l in linears if l.name not in floats and (why := lost(chooser, l))}


def lost(chooser: Chooser, l: Linear) -> str | None:
    """In words, why too little is left of a linear's weight under the scales that were chosen for it, or None."""
    weight, how, qtype = chooser.weight(l), chooser.transform(l, chooser.columns.get(l.name)), chooser.qtype
    matrices = [
        _Matrix(w, how, chooser.own[l.name].weight == "per_tensor", qtype) for w in (weight if l.experts else [weight])
    ]
    largest = chooser.parallel.most([max(m.largest() for m in matrices)])[0]
    if largest <= ORDINARY:  # as nearly all are: nothing is quantized for it
        return None
    sums = [m.signal_and_noise() for m in matrices]
    signal, noise = chooser.parallel.total([sum(x) for x in zip(*sums, strict=True)])
    if not 0 < noise < math.inf:
        return None
    left = 10 * math.log10(signal / noise)
    if left >= LEAST_DB:
        return None
    scale = "one scale for all of it" if matrices[0].per_tensor else "a scale for each row"
    return (
        f"its weight has outliers, up to {largest:.3g} times the median of their row: {scale} leaves {left:.1f} dB of "
        f"the other values in {qtype.name.upper()}"
    )


class _Matrix:
    """A weight [N, K] as it is quantized; of a large one, some rows."""

    def __init__(self, w: Tensor, how: Transform, per_tensor: bool, qtype: QType) -> None:
        self.w, self.how, self.per_tensor, self.qtype = w, how, per_tensor, qtype
        self.plain, step = replace(how, block=None), row_step(w, LARGEST)
        self.every = row_parts(w)
        self.parts = self.every if step == 1 else [slice(0, None, step)]

    def largest(self) -> float:
        """The largest value that a scale is made for, in medians of the row; of rows below `ORDINARY` medians 0."""
        found, limit = 0.0, None
        if self.per_tensor:
            limit = torch.stack([self.plain.weight(self.w, p).abs().amax() for p in self.every]).amax().view(1, 1)
            limit = self.how.across(limit)
        for part in self.parts:
            size = self.plain.weight(self.w, part).abs()
            of = (size.amax(-1, keepdim=True) if limit is None else limit).expand(len(size), 1)
            # where most values reach the largest over `ORDINARY`, so does their median, which takes longer to find; a
            # product counts them faster than a sum of bool
            one = torch.ones(size.shape[-1], dtype=torch.float32, device=size.device)
            rows = (2 * ((size * ORDINARY >= of).float() @ one) <= (size > 0).float() @ one).nonzero().flatten()
            if len(rows):
                median = _medians(size[rows])
                found = max(found, float(torch.where(median > 0, of[rows] / median, 0.0).amax()))
        return found

    def signal_and_noise(self) -> tuple[float, float]:
        """Energy of ordinary values, and of their errors."""
        signal = noise = 0.0
        common, q_max = None, self.qtype.q_max
        if self.per_tensor:
            scales = [weight_scale(self.how.weight(self.w, p), False, q_max) for p in self.every]
            common = self.how.across(torch.stack(scales).amax().view(1, 1))
        for part in self.parts:
            w = self.plain.weight(self.w, part)
            rotated = self.how.rotated(w)
            by = self.how.across(weight_scale(rotated, True, q_max)) if common is None else common
            error = self.how.rotated(rounded(rotated, by, self.qtype) - rotated)  # a rotation is its own inverse
            size = w.abs()
            ordinary = size <= ORDINARY * _medians(size)
            signal += float((w.double().square() * ordinary).sum())
            noise += float((error.double().square() * ordinary).sum())
        return signal, noise


def _medians(size: Tensor) -> Tensor:
    """Of each row [R, K], [R, 1]; zeros, as of pruned weights, are no values."""
    return torch.where(size > 0, size, math.nan).nanmedian(-1, keepdim=True).values.nan_to_num(0.0)
