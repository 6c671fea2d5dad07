"""FP8 linears, ``torch.ops.sqcompile.fp8_linear``: ``torch._scaled_mm`` on GPUs that have it, plain PyTorch elsewhere.

A compiler sees the product: Inductor fuses the quantization with what makes its input, and chooses the product's tiles.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sqcompile.kernels import reference
from sqcompile.pytorch.core import scaled_mm

ALIGNED = 16  # elements: sizes that the tensor cores' kernels take


@functools.cache
def available(device: torch.device) -> bool:
    """Whether a GPU has FP8 tensor cores that ``torch._scaled_mm`` serves (sm_89 and later)."""
    found = device.type == "cuda" and torch.version.cuda is not None
    return found and torch.cuda.get_device_capability(device) >= (8, 9)


def fp8_linear(q: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`reference.fp8_linear`, by tensor cores where there are some."""
    n, k = w.shape
    if not available(q.device) or n % ALIGNED or k % ALIGNED:
        return reference.fp8_linear(q, scale, w, w_scale, bias, dtype)
    rows = q.reshape(-1, k).contiguous()  # what quantization made of a transposed input lies as that does
    if dtype == torch.bfloat16 and (bias is None or bias.dtype == dtype):  # scales by row and column in the kernel
        by_row = scale.expand((*q.shape[:-1], 1)).reshape(-1, 1)
        y = scaled_mm(rows, w.t(), by_row.contiguous(), w_scale.view(1, n), bias, out_dtype=dtype, use_fast_accum=True)
        return y.reshape(*q.shape[:-1], n)
    one = scale.new_ones(())
    y = scaled_mm(rows, w.t(), one, one, out_dtype=torch.float32).reshape(*q.shape[:-1], n)
    return reference.scale_output(y * w_scale, scale, bias, dtype)
