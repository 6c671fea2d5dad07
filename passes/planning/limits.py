"""limits: the largest value of an input that its static scale stands for, by what the outputs lose (`feel`).

    Δ = L / 127        a larger L rounds coarser, a smaller one clips more: the loss decides

Rounding costs about Δ²/12 a value and clipping (|x| - L)², each weighed by the square of the value's gradient. A histogram of
the sampled values, in bins of a sixteenth of an octave, gives the sum of both for every L at once (`Spread`).

L is made in one of several ways: a factor times the absmax of all tokens, times a percentile of the sampled values, or times
the L of the smallest loss of the sample ("MSE", with errors weighed by gradients). As in `static_scales`, each way is tried
on tokens that it did not see: L made from one half of the calibration tokens, with s of that half, on the rows of the
other; and what larger values than all so far are expected to cost is added. The way that costs least over both halves makes
L of all tokens. Of less than 512 tokens nothing is clipped.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from sqcompile.kernels.qtypes import QType
from sqcompile.kernels.reference import ABSMAX_FLOOR
from sqcompile.passes.planning.feel import Reads
from sqcompile.passes.planning.loss import Transform
from sqcompile.passes.planning.static_scales import FEW_TOKENS, MARGINS, ONE_TOKEN, tail
from sqcompile.statistics.input_stats import InputStats

OCTAVE = 16  # bins
ABOVE, BELOW = 2, 22  # octaves above the largest value, where limits may be, and below it, under which values are zeros
BINS = OCTAVE * (ABOVE + BELOW)
FACTORS = tuple(1 / (1 + m) for m in (0.5, 0.3, 0.2, 0.1)) + tuple(1 + m for m in MARGINS)
PERCENTILES = (99.9, 99.99)
LARGEST = "the largest value"
ALIKE = 1.02  # of ways whose costs differ by no more, the largest limit is taken: it clips least


@dataclass(frozen=True)
class Way:
    """How the limit of a static scale is made: ``str`` of it says so.

    Attributes:
        base: the name of one of `_bases`.
        factor: what that is multiplied by.
        cost: what rounding and clipping then cost the outputs, in the unit of `feel`.
    """

    base: str
    factor: float
    cost: float

    def __str__(self) -> str:
        return self.base if self.factor == 1 else f"{self.factor:.2f} x {self.base}"


@dataclass(frozen=True, eq=False)
class Spread:
    """A histogram of the magnitudes of values; its bins end at ``top`` · 2^((b + 1) / 16 - ABOVE - BELOW).

    Attributes:
        top: the largest value, times 2^ABOVE.
        counts: float64 [B], how many values there are, each as many as its row stands for.
        costs: float64 [B], the same times the squares of their gradients.
    """

    top: float
    counts: Tensor
    costs: Tensor

    @staticmethod
    def of(x: Tensor, gradients: Tensor, weights: Tensor) -> Spread:
        """Of values [R, K] with gradients, in rows that stand for so many."""
        size = x.abs()
        top = max(float(size.amax()) if size.numel() else 0.0, ABSMAX_FLOOR) * 2**ABOVE
        where = (size / top).log2_().add_(ABOVE + BELOW).mul_(OCTAVE).ceil_().sub_(1).clamp_(0, BINS - 1)
        bins = where.long().flatten()
        each = weights[:, None].expand_as(x).flatten()
        squares = (gradients.square() * weights[:, None]).flatten()
        counts, costs = (bins.bincount(w.double(), BINS).cpu() for w in (each, squares))
        return Spread(top, counts, costs)

    def losses(self, qtype: QType) -> Tensor:
        """What a limit at the end of each bin costs: float64 [B]."""
        return (_relative(qtype) @ self.costs) * self.ends().square() / 2

    def ends(self) -> Tensor:
        """float64 [B], the largest value of each bin."""
        return self.top * torch.exp2(torch.arange(1, BINS + 1, dtype=torch.float64) / OCTAVE - ABOVE - BELOW)

    def loss(self, losses: Tensor, limits: Tensor) -> Tensor:
        """Of any limits [C], between those of the bins' ends."""
        where = ((limits.double() / self.top).log2() + ABOVE + BELOW) * OCTAVE - 1
        where = where.clamp(0, BINS - 1)
        low = where.floor().long().clamp_max(BINS - 2)
        return torch.lerp(losses[low], losses[low + 1], where - low)

    def percentile(self, percent: float) -> float:
        """The end of the bin under which so many percent of the values are."""
        total = self.counts.cumsum(0)
        return float(self.ends()[int(torch.searchsorted(total, total[-1] * percent / 100).clamp_max(BINS - 1))])


@functools.cache
def _relative(qtype: QType) -> Tensor:
    """The mean square of what a value of one bin loses under the limit of another, over the limit's: float64 [B, B]."""
    below = torch.arange(BINS, dtype=torch.float64)[:, None]  # from the limit down; in a bin, values as far apart
    x = torch.exp2(-(below + (torch.arange(32) + 0.5) / 32) / OCTAVE).float()
    rounding = (qtype.round(x * qtype.q_max) / qtype.q_max - x).double().square().mean(1)
    clipping = (torch.exp2((torch.arange(BINS, dtype=torch.float64) - 0.5) / OCTAVE) - 1).square()
    far = torch.arange(BINS)[:, None] - torch.arange(BINS)  # the limit's bin less the value's
    return torch.where(far >= 0, rounding[far.clamp_min(0)], clipping[far.neg().clamp_min(0)])


@dataclass(frozen=True, eq=False)
class _Part:
    """Tokens that a limit is made from, or tried on: of a half, or all of them. Smoothed and rotated.

    Attributes:
        absmax: float32 [K], of all tokens; of the sampled ones where inputs are rotated.
        spread: of the sampled values.
        cost: float32 [K], what an error of a channel costs, squared.
    """

    absmax: Tensor
    spread: Spread
    cost: Tensor


def choose_way(reads: Reads, stats: InputStats, columns: Tensor | None, block: int | None, qtype: QType) -> Way:
    """The way that costs least.

    Args:
        reads: sampled rows of the input.
        stats: its statistics, K channels.
        columns: float32 [2, K], s of either half of the tokens; None without smoothing.
        block: the blocks in which it is rotated; None without rotation.
        qtype: the number format.
    """
    both = all(bool((reads.half == h).any()) and bool(stats.halves[h].any()) for h in (0, 1))
    if not both:  # nothing to try it on
        every = _part(reads, stats, Transform(None if columns is None else columns[0], block), None)
        value = torch.tensor([_bases(every, qtype)[LARGEST] * (1 + ONE_TOKEN)])
        return Way(LARGEST, 1 + ONE_TOKEN, float(every.spread.loss(every.spread.losses(qtype), value)))
    factors = torch.tensor(FACTORS, dtype=torch.float64)
    total, size = torch.zeros(2, 2 + len(PERCENTILES), len(FACTORS), dtype=torch.float64)
    for h in (0, 1):
        how = Transform(None if columns is None else columns[h], block)
        mine, new = (_part(reads, stats, how, x) for x in (h, 1 - h))
        found = _bases(mine, qtype)
        limits = (torch.tensor(list(found.values()), dtype=torch.float64)[:, None] * factors).flatten()
        cost = new.spread.loss(new.spread.losses(qtype), limits) + _beyond(stats, mine, new, limits)
        total, size = total + cost.view_as(total), size + limits.view_as(size)
    alike = total <= float(total.min()) * ALIKE
    if stats.count < FEW_TOKENS:  # that clip nothing yet: too few to tell what is rare
        alike = torch.zeros_like(alike)
        alike[0] = (factors >= 1) & (total[0] <= float(total[0][factors >= 1].min()) * ALIKE)
    best = int(torch.where(alike, size, -1.0).argmax())
    return Way([*found][best // len(FACTORS)], FACTORS[best % len(FACTORS)], float(total.flatten()[best]))


def limit_of(
    way: Way, reads: Reads, stats: InputStats, columns: Tensor | None, block: int | None, qtype: QType
) -> tuple[float, float]:
    """L of all tokens, and over the largest value. Arguments as for `choose_way`, but s of all tokens, [K]."""
    bases = _bases(_part(reads, stats, Transform(columns, block), None), qtype)
    limit = max(bases[way.base] * way.factor, ABSMAX_FLOOR)
    return limit, limit / max(bases[LARGEST], ABSMAX_FLOOR)


def _part(reads: Reads, stats: InputStats, how: Transform, half: int | None) -> _Part:
    """Tokens of a half, or all."""
    which = torch.ones_like(reads.half, dtype=torch.bool) if half is None else reads.half == half
    rows = stats.rows if half is None else stats.rows[stats.half == half]
    largest = stats.absmax if half is None else stats.halves[half]
    x, g, weights = how.input(reads.rows[which]), how.gradient(reads.gradients[which]), reads.weights[which]
    if how.block is None:
        absmax = largest if how.columns is None else largest / how.columns
    else:
        absmax = torch.cat([x, how.input(rows)]).abs().amax(0)
    return _Part(absmax.cpu(), Spread.of(x, g, weights), (weights @ g.square()).cpu())


def _bases(part: _Part, qtype: QType) -> dict[str, float]:
    """What limits are multiples of, by its name."""
    least = part.spread.ends()[int(part.spread.losses(qtype).argmin())]
    bases = {LARGEST: float(part.absmax.max()), "the limit of least loss": float(least)}
    return bases | {f"the {p}th percentile": part.spread.percentile(p) for p in PERCENTILES}


def _beyond(stats: InputStats, mine: _Part, new: _Part, limits: Tensor) -> Tensor:
    """What values larger than all of one part are expected to cost in the other, by limit [C].

    A new row is beyond the largest value M of n tokens with a probability of 1 / n, by β in the mean. Of rotated channels M is
    that of the sampled rows, which the largest are among.
    """
    n = stats.count / 2
    most = mine.absmax.double().clamp_min(ABSMAX_FLOOR)
    beta = tail(stats) * most
    cut = (most - limits[:, None]).clamp_min(0)
    beyond = (limits[:, None] - most).clamp_min(0) / beta
    squares = cut.square() + 2 * cut * beta + 2 * beta.square() * beyond.neg().exp()
    return squares @ new.cost.double() / n / 2
