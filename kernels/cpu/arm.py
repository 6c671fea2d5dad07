"""INT8 linears on ARM CPUs: s8 x s8 by PyTorch's oneDNN operators, which use Arm's Compute Library there.

ARM's dot products take two signed operands (SDOT, I8MM), so activations need no zero point. The operators exist, with the
same results, wherever PyTorch has oneDNN; an x86 CPU without AMX is slow at them.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor

from sqcompile.kernels import reference
from sqcompile.kernels.cpu import onednn


def available() -> bool:
    """Whether this is an ARM CPU, and PyTorch has oneDNN."""
    return platform.machine().lower() in ("aarch64", "arm64") and torch.backends.mkldnn.is_available()


def pack(w: Tensor) -> tuple[Tensor, None]:
    """int8 [N, K] in oneDNN's layout: opaque, and nothing beside it."""
    return onednn.prepack(w), None


@torch.library.custom_op("sqcompile::matmul_s8s8", mutates_args=())
def matmul_s8s8(q: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """q wᵀ · w_scale for int8 q [..., K], w from `pack` and float32 w_scale [N]: dtype (float32 or bfloat16) [..., N]."""
    if q.numel() == 0:
        return _matmul_fake(q, w, w_scale, dtype)
    return onednn.qlinear(q, 0, w, w_scale, dtype)


@matmul_s8s8.register_fake
def _matmul_fake(q: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return q.new_empty((*q.shape[:-1], w_scale.shape[0]), dtype=dtype)


def int8_linear_s8(
    q: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`reference.int8_linear` for a weight from `pack`."""
    wide = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    return reference.scale_output(torch.ops.sqcompile.matmul_s8s8(q, w, w_scale, wide), scale, bias, dtype)


_library = torch.library.Library("sqcompile", "FRAGMENT")
_library.define(
    "int8_linear_s8(Tensor q, Tensor scale, Tensor w, Tensor w_scale, Tensor? bias, ScalarType dtype) -> Tensor"
)
_library.impl("int8_linear_s8", int8_linear_s8, "CompositeImplicitAutograd")
