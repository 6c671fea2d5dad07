"""The operators of `kernels.rows` and `rotation.rotate_quantize` on CPUs, by a kernel of our own (rows.cpp)."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sqcompile.kernels import rotation
from sqcompile.kernels import rows as plain
from sqcompile.kernels.cpu.build import built

FILES = ("crowd.h", "vectors.h", "hadamard.h", "rows.cpp")
_ACTIVATIONS = {name: i for i, name in enumerate(("none", "relu", "silu", "gelu", "gelu_tanh"))}
_NONE, _LAYER, _RMS = range(3)
_LANES = 16  # the kernel takes a multiple of so many channels
_Pointers, _Numbers = ctypes.c_void_p * 12, ctypes.c_int64 * 12


def rotate(x: Tensor, block: int) -> Tensor:
    """As `rotation.rotate`, bit for bit."""
    fits = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and block in rotation.BLOCKS
    if not fits or not x.numel() or x.shape[-1] % block or (kernels := library()) is None:
        return rotation.rotate(x, block)
    x, y = x.contiguous(), torch.empty(x.shape, dtype=torch.float32)
    half = x.dtype == torch.bfloat16
    kernels.sqcompile_rotate(x.data_ptr(), half, y.data_ptr(), x.numel(), block, torch.get_num_threads())
    return y


def rotate_quantize(x: Tensor, block: int, scale: Tensor | None, zero_point: int) -> tuple[Tensor, Tensor]:
    """As `rotation.rotate_quantize`, bit for bit."""
    kernels = library()
    if kernels is None or x.numel() == 0 or x.dtype == torch.float64:
        return rotation.rotate_quantize(x, block, scale, zero_point)
    x = x if x.dtype in (torch.float32, torch.bfloat16) else x.to(torch.float32)
    k = x.shape[-1]
    q, factors = _outputs(x.shape, k, zero_point)
    tensors = x, None, None, None, None, None, None, None, None, scale, q, factors
    _run(kernels, tensors, _halves(x) or 0, (k, 0, -1, block, 0, _NONE), zero_point)
    return q, factors


def quantize(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Rows x [..., K] as int8, and their scales, float32 [..., 1]: `reference.quantize` and `token_scale`, bit for bit.

    None of what the kernel does not take: other devices, dtypes and numbers of channels.
    """
    half, k = _halves(x), x.shape[-1]
    if x.device.type != "cpu" or half is None or not x.numel() or k % _LANES or (kernels := library()) is None:
        return None
    q, scale = _outputs(x.shape, k, 0)
    tensors = x, None, None, None, None, None, None, None, None, None, q, scale
    _run(kernels, tensors, half, (k, 0, -1, 0, 0, _NONE), 0)
    return q, scale


def linear_act_quantize(
    y: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    gate: int,
    up: int,
    k: int,
    activation: str,
    multiplier: Tensor | None,
    rotation: int,
    static: Tensor | None,
    zero_point: int,
) -> tuple[Tensor, Tensor]:
    """As `plain.linear_act_quantize`, but that nothing is rounded to y's dtype on the way."""
    kernels, half = library(), _halves(y, bias)
    if kernels is None or half is None or k % _LANES or y.numel() == 0:
        return plain.linear_act_quantize(
            y, scale, bias, gate, up, k, activation, multiplier, rotation, static, zero_point
        )
    if activation not in _ACTIVATIONS:
        raise ValueError(f"there is no activation {activation}")
    q, factors = _outputs(y.shape, k, zero_point)
    tensors = y, scale, bias, None, None, None, None, None, multiplier, static, q, factors
    _run(kernels, tensors, half, (k, gate, up, rotation, _ACTIVATIONS[activation], _NONE), zero_point)
    return q, factors


def linear_norm_quantize(
    y: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    shift: Tensor | None,
    eps: float,
    rms: bool,
    round_first: bool,
    multiplier: Tensor | None,
    rotation: int,
    static: Tensor | None,
    zero_point: int,
    keep_sum: bool,
    keep_norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `plain.linear_norm_quantize`, but that nothing is rounded to y's dtype on the way."""
    kernels, half, k = library(), _halves(y, bias, residual, weight, shift), y.shape[-1]
    if kernels is None or half is None or k % _LANES or y.numel() == 0:
        return plain.linear_norm_quantize(
            y, scale, bias, residual, weight, shift, eps, rms, round_first, multiplier, rotation, static, zero_point,
            keep_sum, keep_norm,
        )  # fmt: skip
    shape = y.shape if residual is None else residual.shape
    q, factors = _outputs(shape, k, zero_point)
    total, normed = (torch.empty(shape if keep else (0,), dtype=y.dtype) for keep in (keep_sum, keep_norm))
    tensors = (
        y, scale, bias, residual, weight, shift,
        total if keep_sum else None, normed if keep_norm else None, multiplier, static, q, factors,
    )  # fmt: skip
    _run(kernels, tensors, half, (k, 0, -1, rotation, 0, _RMS if rms else _LAYER), zero_point, eps)
    return q, factors, total, normed


def _halves(*tensors: Tensor | None) -> int | None:
    """A bit for each that is bfloat16; None where one is neither that nor float32."""
    found = 0
    for i, t in enumerate(tensors):
        if t is None:
            continue
        if t.dtype is torch.bfloat16:
            found |= 1 << i
        elif t.dtype is not torch.float32:
            return None
    return found


def _outputs(shape: Sequence[int], k: int, zero_point: int) -> tuple[Tensor, Tensor]:
    rows = shape[:-1]
    q = torch.empty((*rows, k), dtype=torch.uint8 if zero_point else torch.int8)
    return q, torch.empty((*rows, 1), dtype=torch.float32)


def _run(
    kernels: Any, tensors: tuple[Tensor | None, ...], half: int, how: tuple[int, ...], zero_point: int, eps: float = 0.0
) -> None:
    tensors = tuple(
        None if t is None else t.contiguous() for t in tensors
    )  # parameters may be views, with steps of their own
    y, scale, factors = tensors[0], tensors[1], tensors[-1]
    assert y is not None and factors is not None
    k, gate, up, block, *_ = how
    if (
        (block and (block not in rotation.BLOCKS or k % block))
        or min(gate, up + 1) < 0
        or max(gate, up) + k > y.shape[-1]
    ):
        raise ValueError(f"columns {gate} and {up} to {k} more, rotated by {block}, of {y.shape[-1]} channels")
    count = factors.numel()
    per_row = scale is not None and scale.numel() == count
    numbers = count, y.shape[-1], *how, per_row, zero_point, half, torch.get_num_threads()
    kernels.sqcompile_rows(_Pointers(*[None if t is None else t.data_ptr() for t in tensors]), _Numbers(*numbers), eps)


@functools.cache
def library() -> Any | None:
    """The compiled kernel; None where it does not build."""
    lib = built(*FILES)
    if lib is not None:
        lib.sqcompile_rows.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_float]
        lib.sqcompile_rotate.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p] + [ctypes.c_int64] * 3
        lib.sqcompile_rows.restype = lib.sqcompile_rotate.restype = None
    return lib
