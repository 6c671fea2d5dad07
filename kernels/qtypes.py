"""QType: a number format of quantized values. What the arithmetic of quantization depends on, from recipe to kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class QType:
    """A format q of values x = Δ q, symmetric, with Δ = max|x| / q_max.

    Attributes:
        name: as in ``Recipe.dtype``.
        dtype: of stored values.
        q_max: the largest value used; its negative is the smallest.
        round: float32 values within ±q_max -> the nearest ones that the format has, still in float32. Ties go to even.
        accumulator: dtype that inner products are exact in, or at least as exact as sums of float32.
    """

    name: str
    dtype: torch.dtype
    q_max: float
    round: Callable[[Tensor], Tensor]
    accumulator: torch.dtype

    def of(self, x: Tensor) -> Tensor:
        """float32 values of any size, rounded and clamped: ``dtype``. NaN stays NaN where the format has it, else 0."""
        x = x.clamp(-self.q_max, self.q_max)
        return (self.round(x) if self.dtype.is_floating_point else self.round(x).nan_to_num(0.0)).to(self.dtype)


def _to_e4m3(x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn).to(torch.float32)


# -128 is never used, so that negation cannot overflow
INT8 = QType("int8", torch.int8, 127.0, torch.round, torch.int32)
# 448 is the largest number of e4m3; a conversion of PyTorch's does not saturate, so values are clamped before
FP8 = QType("fp8", torch.float8_e4m3fn, 448.0, _to_e4m3, torch.float32)

QTYPES = {q.name: q for q in (INT8, FP8)}
BY_DTYPE = {q.dtype: q for q in QTYPES.values()}
