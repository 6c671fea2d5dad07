"""`rotation.rotate_quantize` on CPUs, by a kernel of our own (rotate.cpp): bit for bit the plain one."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from sqcompile.kernels import rotation
from sqcompile.kernels.cpu.build import built


def rotate_quantize(x: Tensor, block: int, scale: Tensor | None, zero_point: int) -> tuple[Tensor, Tensor]:
    """As `rotation.rotate_quantize`."""
    kernels = library()
    if kernels is None or x.numel() == 0 or x.dtype == torch.float64:
        return rotation.rotate_quantize(x, block, scale, zero_point)
    x = x.contiguous() if x.dtype in (torch.float32, torch.bfloat16) else x.to(torch.float32).contiguous()
    k = x.shape[-1]
    q = torch.empty(x.shape, dtype=torch.uint8 if zero_point else torch.int8)
    factors = torch.empty((*x.shape[:-1], 1), dtype=torch.float32)
    kernels.sqcompile_rotate(
        x.data_ptr(), None if scale is None else scale.data_ptr(), q.data_ptr(), factors.data_ptr(),
        factors.numel(), k, block, x.dtype == torch.bfloat16, zero_point, torch.get_num_threads(),
    )  # fmt: skip
    return q, factors


@functools.cache
def library() -> Any | None:
    """The compiled kernel; None where it does not build."""
    lib = built("rotate.cpp")
    if lib is not None:
        lib.sqcompile_rotate.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 6
        lib.sqcompile_rotate.restype = None
    return lib
