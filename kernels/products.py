"""products: sums of INT8 products for a weight that is used once, and so is not packed to stay.

In integers where this machine is faster at them, else in float32, which rounds sums above 2^24.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sqcompile.kernels.cpu import x86
from sqcompile.kernels.reference import expert_rows


def has_products(device: torch.device) -> bool:
    """Whether `product` is more than a product in float32 on a device of this machine."""
    return device.type == "cpu" and x86.available() and x86.library() is not None


def product(q: Tensor, w: Tensor) -> Tensor:
    """q wᵀ of q [..., K] and w [N, K], int8 or another number format: float32 [..., N]."""
    found = x86.product(q, w) if w.dtype == torch.int8 and has_products(w.device) else None
    return q.float() @ w.float().t() if found is None else found


def grouped_product(q: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """`product` of the rows of each expert: int8 q [T, K], w [E, N, K], and where an expert's rows end, int32 [E]."""
    found = q.new_zeros((len(q), w.shape[1]), dtype=torch.float32)
    for rows, matrix in zip(expert_rows(offsets), w, strict=True):
        found[rows] = product(q[rows], matrix)
    return found
