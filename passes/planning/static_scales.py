"""static_scales: Δ of an input from calibration, with room for tokens that calibration has not seen.

    Δ = (1 + m) · max_j (max_t |X_tj| / s_j) / 127

The largest of n tokens is a poor guess of the largest of all: a new token is beyond it in one channel with a probability
of 1 / (n + 1). Without smoothing one channel with outliers sets the limit, and the others are far below it. Smoothing
takes every channel to the limit, so that a new token is beyond it in about K / (n + 1) channels, and is clipped there.

How far beyond, the calibration tokens tell themselves. They are kept as two halves, of which each has an absmax of its
own: scales made from one half are tried on sampled rows of the other, whose tokens are as new to them as unseen text.
A sample of few rows shows few outliers, though, and a single one can cost more than all rounding. So what is expected of
the tails is added (`clipped`): of an exponential tail, the largest of n values is beyond any limit L above it by a mean
square of 2 β² exp(-(L - M) / β) / n for each new value, M being the largest one so far, and two such maxima differ by
2 ln 2 · β in the mean, from which β is known. The margin m is the candidate with the smallest sum of both, by
the geometric mean over the halves; `choose` compares α by the same sum, s from one half as well. Both vanish with thousands of tokens.

Where the largest values alone are known, of a file of activation scales, there is no margin.

The largest values of rotated channels are known of the sampled rows alone: of so many tokens, and no more, they tell.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sqcompile.kernels.cpu.rows import rotate
from sqcompile.kernels.qtypes import INT8, QType
from sqcompile.kernels.reference import ABSMAX_FLOOR, absmax_scale
from sqcompile.statistics.input_stats import InputStats

MARGINS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5)
# Of one token nothing is known about the next.
ONE_TOKEN = 0.25
# Calibration with fewer tokens is warned of.
FEW_TOKENS = 512


def has_halves(stats: InputStats) -> bool:
    """Whether there are tokens in both halves."""
    return stats.count > 1 and bool((stats.halves.amax(1) > 0).all())


@dataclass(frozen=True, eq=False)
class Quantized:
    """An input as it is quantized: divided by s, and rotated.

    Attributes:
        rows: float32 [R, K], the sampled ones.
        absmax: float32 [K], of the tokens that the scale is made from.
        tokens: how many those are.
        cost: float32 [K], what an error of each channel costs, squared.
    """

    rows: Tensor
    absmax: Tensor
    tokens: float
    cost: Tensor


def as_quantized(
    stats: InputStats, columns: Tensor | None, block: int | None, half: int | None, weight: Tensor
) -> Quantized:
    """An input whose scale is made from one half of the tokens, or from all.

    Args:
        stats: of the input, K channels.
        columns: float32 [K], s, or None.
        block: the size of the blocks in which it is rotated, or None.
        half: whose absmax counts; None for both.
        weight: float32 [K], what an error of each channel of x costs, squared.
    """
    s = torch.ones_like(stats.absmax) if columns is None else columns
    rows, cost = stats.rows.float() / s, weight * s.square()
    if block is None:
        absmax = stats.absmax if half is None else stats.halves[half]
        return Quantized(rows, absmax / s, stats.count / (1 if half is None else 2), cost)
    rows = rotate(rows, block)
    mine = rows if half is None or not bool((stats.half == half).any()) else rows[stats.half == half]
    spread = (
        cost.unflatten(0, (-1, block)).mean(1).repeat_interleave(block)
    )  # what it costs is spread over a block, too
    return Quantized(rows, mine.abs().amax(0), len(mine), spread)


def margin(stats: InputStats, columns: Tensor, weight: Tensor, qtype: QType = INT8, block: int | None = None) -> float:
    """The margin of an input.

    Args:
        stats: of the input, K channels.
        columns: float32 [2, K], what its channels are divided by, chosen from either half.
        weight: float32 [K], what an error of each channel costs, squared.
        qtype: the number format.
        block: the size of the blocks in which it is rotated, or None.

    Returns:
        One of `MARGINS`; `ONE_TOKEN` where halves do not tell, and 0 of the largest values alone, which say nothing of tokens.
    """
    if stats.absmax_alone:
        return 0.0
    if not has_halves(stats):
        return ONE_TOKEN
    errors = torch.zeros(len(MARGINS), dtype=torch.float32, device=columns.device)
    room = 1 + torch.tensor(MARGINS, dtype=torch.float32, device=columns.device)
    for mine, other in ((0, 1), (1, 0)):
        x = as_quantized(stats, columns[other], block, other, weight)
        new = x.rows[stats.half == mine]
        for i, limit in enumerate(x.absmax.max() * room):
            scale = absmax_scale(limit, qtype.q_max)
            rounded = qtype.round((new / scale).clamp(-qtype.q_max, qtype.q_max)) * scale
            error = ((rounded - new).square() @ x.cost).sum() + len(new) * clipped(stats, x, limit)
            errors[i] += error.clamp_min(ABSMAX_FLOOR).log()  # a token like no other decides for its half alone
    return MARGINS[int(errors.argmin())]


def margin_of_channels(stats: InputStats) -> float:
    """The margin of an input whose channels have a static scale each: one β of the mean channel, times what is unseen."""
    return tail(stats) * min(1.0, FEW_TOKENS / stats.count) if has_halves(stats) else ONE_TOKEN


def clipped(stats: InputStats, x: Quantized, limit: Tensor) -> Tensor:
    """The expected cost of clipping a new row at a limit."""
    beta = tail(stats) * x.absmax.clamp_min(ABSMAX_FLOOR)
    beyond = ((limit - x.absmax).clamp_min(0) / beta).neg().exp()
    return (x.cost * 2 * beta.square() * beyond).sum() / x.tokens


def tail(stats: InputStats) -> float:
    """β relative to the largest value, for the mean channel: by how much the halves' maxima differ, over 2 ln 2."""
    absmax = stats.absmax
    relative = (stats.halves[0] - stats.halves[1]).abs()[absmax > 0] / absmax[absmax > 0]
    return max(float(relative.mean()) / (2 * math.log(2)), 0.01)


def warn_of_few(counts: Mapping[str, int]) -> None:
    """Warns once for a plan of whose static scales some come from few tokens; ``counts``: of each linear's, by name."""
    few = [name for name, n in counts.items() if n < FEW_TOKENS]
    if few:
        tokens = min(counts.values())
        which = ""
        if len(few) < len(counts):  # what reads one token of each text, say
            which = f" ({few[0]}{f' and {len(few) - 1} more' if len(few) > 1 else ''})"
        warnings.warn(
            f"static scales from {tokens} calibration token{'s' if tokens != 1 else ''}{which}: larger values on other input "
            f"are clipped. Calibrate with at least {FEW_TOKENS} tokens, better thousands, or take a recipe with dynamic scales",
            stacklevel=2,
        )
