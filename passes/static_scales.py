"""static_scales: Δ of an input from calibration, with room for tokens that calibration has not seen.

    Δ = (1 + m) · max_j (max_t |X_tj| / s_j) / 127

The largest of n tokens is a poor guess of the largest of all: a new token is beyond it in one channel with a probability
of 1 / (n + 1). Without smoothing one channel with outliers sets the limit, and the others are far below it. Smoothing
takes every channel to the limit, so that a new token is beyond it in about K / (n + 1) channels, and is clipped there.

How far beyond, the calibration tokens tell themselves. They are kept as two halves, of which each has an absmax of its
own: scales made from one half are tried on sampled rows of the other, whose tokens are as new to them as unseen text.
The margin m is the candidate with the smallest error there, which is large where rows clip, and zero where either half
knows what the other holds, as with thousands of tokens. Few tokens show few outliers in any sample: then m also covers the
largest value that either half finds beyond the other's. `choose` compares α by the same trial, s from one half as well.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from sqcompile.input_stats import InputStats
from sqcompile.kernels.reference import QMAX, absmax_scale

MARGINS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)
# Of one token nothing is known about the next.
ONE_TOKEN = 0.25
# Up to here the margin covers what is beyond either half by as much as it takes; of ten times as many tokens, a tenth.
RARE = 64
# Calibration with fewer tokens is warned of.
FEW_TOKENS = 512


def has_halves(stats: InputStats) -> bool:
    """Whether there are tokens in both halves."""
    return stats.count > 1 and bool((stats.halves.amax(1) > 0).all())


def margin(stats: InputStats, columns: Tensor, weight: Tensor) -> float:
    """The margin of an input.

    Args:
        stats: of the input, K channels.
        columns: float32 [2, K], what its channels are divided by, chosen from either half.
        weight: float32 [K], what an error of each channel costs, squared.
    """
    if not has_halves(stats):
        return ONE_TOKEN
    errors = torch.zeros(len(MARGINS), dtype=torch.float32, device=columns.device)
    room = 1 + torch.tensor(MARGINS, dtype=torch.float32, device=columns.device)
    for mine, other in ((0, 1), (1, 0)):
        x = stats.rows[stats.half == mine].float() / columns[other]
        scale = absmax_scale((stats.halves[other] / columns[other]).max() * room)
        cost = weight * columns[other].square()
        for i, delta in enumerate(scale):
            rounded = (x / delta).round().clamp(-QMAX, QMAX) * delta
            errors[i] += ((rounded - x).square() @ cost).sum()
    beyond = sum(_beyond(stats.halves[b] / columns[a], stats.halves[a] / columns[a]) for a, b in ((0, 1), (1, 0))) / 2
    rare = min(beyond, 1.0, RARE / stats.count)
    return max(MARGINS[int(errors.argmin())], rare)


def _beyond(new: Tensor, known: Tensor) -> float:
    """By how much the largest of one absmax [K] is beyond another's, relative to that."""
    return max(float(new.max() / known.max()) - 1, 0.0)


def warn_of_few(counts: Iterable[int]) -> None:
    """Warns once for a plan whose static scales come from few tokens; ``counts``: of each linear's."""
    tokens = max(counts, default=FEW_TOKENS)
    if tokens < FEW_TOKENS:
        warnings.warn(
            f"static scales from {tokens} calibration token{'s' if tokens > 1 else ''}: larger values on other input are "
            f"clipped. Calibrate with at least {FEW_TOKENS} tokens, better thousands, or take a recipe with dynamic scales",
            stacklevel=2,
        )
