"""INT8 linears on x86 CPUs through oneDNN (AVX512-VNNI, AMX).

oneDNN multiplies uint8 activations by int8 weights; with int8 activations it falls to a reference loop on CPUs without
AMX, four orders of magnitude slower. So the activations carry a zero point of 128, which oneDNN takes out of the int32
sum again: exactly the sum of `reference.int8_matmul`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sqcompile.kernels.reference import UINT8_ZERO_POINT, scale_output


def available() -> bool:
    """Whether this CPU multiplies u8 by s8 without saturating between (VNNI); plain AVX2 does not."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()


def pack(w: Tensor) -> Tensor:
    """int8 [N, K] in oneDNN's blocked layout. The result is opaque: it has no storage and cannot be saved."""
    return torch.ops.onednn.qlinear_prepack(w.contiguous(), None)


def linear(q: Tensor, scale: Tensor, packed: Tensor, w_scale: Tensor, w_zero: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`reference.int8_linear` for uint8 q [..., K] and a packed weight; w_zero is int64 zeros [N]."""
    # Δx is applied after oneDNN, as it may be one per row, and the compiler fuses it with what follows.
    # A bf16 model gets its product in bf16: half the traffic of the largest tensors.
    wide = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    y = torch.ops.onednn.qlinear_pointwise(
        q, 1.0, UINT8_ZERO_POINT, packed, w_scale, w_zero, None, 1.0, 0, wide, "none", [], ""
    )
    return scale_output(y, scale, bias, dtype)
