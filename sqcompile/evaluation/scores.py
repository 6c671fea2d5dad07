"""scores: losses, divergences and errors of rows, summed window by window; a mean with its standard error.

Nothing is copied whole: rows of logits are turned to float32 some at a time, and what is kept is a number a window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

NUMBERS = 2**21  # of a part of the rows, in float32


def parts(rows: Tensor, width: int) -> Iterator[Tensor]:
    """Indices int64 [n] cut so that rows of ``width`` numbers each have about `NUMBERS` together."""
    yield from rows.split(max(1, NUMBERS // width))


def add_to(sums: Tensor, windows: Tensor, values: Tensor) -> None:
    """Adds values [n] to the sums float64 [W] of their windows int64 [n]."""
    sums.index_add_(0, windows, values.to(torch.float64))


def mean_and_error(sums: Tensor, weights: Tensor) -> tuple[float, float]:
    """Σ sums / Σ weights, and its standard error over windows; NaN of one window.

    Args:
        sums: of each window, float64 [W].
        weights: of each window, such as its number of tokens, float64 [W].

    Windows of one weight give the mean of their means, and std / √W. Of others it is the error of a ratio of two sums, by
    what each window's sum has more than its weight would have it.
    """
    total, count = float(weights.sum()), len(weights)
    mean = float(sums.sum()) / total
    if count < 2:
        return mean, math.nan
    spread = float((sums - mean * weights).square().sum())
    return mean, math.sqrt(spread * count / (count - 1)) / total


def vectors(x: Tensor) -> tuple[Tensor, int]:
    """A tensor of an output as vectors [n, C], and how many of them each of its first dim has.

    [batch, tokens, C] has a vector for each token, what has another number of dims one for each of the batch.
    """
    if x.dim() == 3:
        return x.reshape(-1, x.shape[-1]), x.shape[1]
    return (x.reshape(len(x), -1), 1) if x.dim() > 1 else (x.reshape(-1, 1), 1)
