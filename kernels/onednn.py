"""INT8 linears on x86 CPUs through oneDNN (AVX512-VNNI, AMX).

oneDNN multiplies uint8 activations by int8 weights; with int8 activations it falls to a reference loop on CPUs without
AMX, four orders of magnitude slower. So the activations carry a zero point of 128, which oneDNN takes out of the int32
sum again: exactly the sum of `reference.int8_matmul`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sqcompile.kernels.reference import UINT8_ZERO_POINT


def available() -> bool:
    """Whether this CPU multiplies u8 by s8 without saturating between (VNNI); plain AVX2 does not."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()


def pack(w: Tensor) -> Tensor:
    """int8 [N, K] in oneDNN's blocked layout. The result is opaque: it has no storage and cannot be saved."""
    return torch.ops.onednn.qlinear_prepack(w.contiguous(), None)


def matmul(q: Tensor, packed: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(q - 128) wᵀ · w_scale for uint8 q [..., K], packed w, float32 w_scale [N]: float32 or bfloat16 [..., N]."""
    zero = _zeros(w_scale.numel())
    return torch.ops.onednn.qlinear_pointwise(
        q, 1.0, UINT8_ZERO_POINT, packed, w_scale, zero, None, 1.0, 0, dtype, "none", [], ""
    )


@functools.cache
def _zeros(n: int) -> Tensor:
    """The weight's zero points, which oneDNN wants spelled out."""
    return torch.zeros(n, dtype=torch.int64)
