"""oneDNN's INT8 linear, as PyTorch has it, for the CPUs that `x86` and `arm` serve."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def prepack(w: Tensor) -> Tensor:
    """int8 [N, K] in oneDNN's blocked layout. The result is opaque: it has no storage and cannot be saved."""
    return torch.ops.onednn.qlinear_prepack(w.contiguous(), None)


def qlinear(q: Tensor, zero_point: int, packed: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(q - zero_point) wᵀ · w_scale for q [..., K], w from `prepack` and float32 w_scale [N]: ``dtype`` [..., N]."""
    zero = _zeros(w_scale.numel())
    return torch.ops.onednn.qlinear_pointwise(
        q, 1.0, zero_point, packed, w_scale, zero, None, 1.0, 0, dtype, "none", [], ""
    )


@functools.cache
def _zeros(n: int) -> Tensor:
    """The weight's zero points, which oneDNN wants spelled out."""
    return torch.zeros(n, dtype=torch.int64)
