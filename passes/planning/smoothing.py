"""smoothing: the scales that move outliers from one factor of a product to the other."""

from __future__ import annotations

import torch
from torch import Tensor

from sqcompile.plan.checks import LARGEST_SCALE

# A channel below this fraction of the median absmax says nothing about how large it gets on other text.
SILENT = 0.1


def smoothing_scale(x_absmax: Tensor, w_absmax: Tensor, alpha: float) -> Tensor:
    """The scale s of one site.

    Args:
        x_absmax: float32 [C], max|X_j| at the balance layers' inputs.
        w_absmax: float32 [C], max|W_:j| over all balance layers.
        alpha: migration strength in [0, 1].

    Returns:
        float32 [C], in [1 / LARGEST_SCALE, LARGEST_SCALE]. s is the formula's, except that a channel (nearly) silent in calibration
        counts as one of median absmax: the formula would divide it by almost nothing, and where it wakes up on other
        text it would drown the rest of its row. Where every channel is silent, s = 1.
    """
    x, w = x_absmax.float(), w_absmax.float()
    if not bool((x > 0).any()) or not bool((w > 0).any()):
        return torch.ones_like(x)
    w = w.clamp_min(w.max() * 1e-5)  # a column of zeros: any s will do, but a finite one
    return (awake(x).pow(alpha) / w.pow(1 - alpha)).clamp(1 / LARGEST_SCALE, LARGEST_SCALE)


def awake(absmax: Tensor) -> Tensor:
    """absmax float32 of any shape, where what was (nearly) silent in calibration counts as the median of what was not."""
    active = absmax > 0
    if not bool(active.any()):
        return absmax
    median = absmax[active].median()
    return torch.where(absmax < SILENT * median, median, absmax)
