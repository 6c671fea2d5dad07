"""What the kernels share: scale and rounding arithmetic on the device, rows and launches on the host.

Most kernels of rows have memory to wait for, and few instructions to spare: what is done for each value is spelled in as
few as there are.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sqcompile.kernels import reference

QMAX = tl.constexpr(float(reference.QMAX))
INVERSE_QMAX = tl.constexpr(1.0 / reference.QMAX)
ABSMAX_FLOOR = tl.constexpr(reference.ABSMAX_FLOOR)
# A float32 near it has no fraction bits left: adding it rounds, and the low byte of the sum is the integer.
ROUND = tl.constexpr(1.5 * 2**23)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # NumPy runs the kernels, without PTX
# Four of y as int8 in one word: to the nearest even integer, NaN to 0, and what is above 127 to 127. In one line: Inductor
# copies the kernels and what they name, and would break a string where it has another.
_PACK = tl.constexpr(
    "{ .reg .s32 a, b, c, d; "
    "cvt.rni.s32.f32 a, $1; cvt.rni.s32.f32 b, $2; cvt.rni.s32.f32 c, $3; cvt.rni.s32.f32 d, $4; "
    "cvt.pack.sat.s8.s32.b32 c, d, c, 0; cvt.pack.sat.s8.s32.b32 $0, b, a, c; }"
)

ONE_BLOCK = 16384  # up to this many columns a row is read once and kept in registers
_LOOP_BLOCK = 4096  # wider rows are read in pieces of this size


@triton.jit
def larger(a, b):
    """The maximum, NaN where one is NaN: tl.maximum without a word takes the operand that is a number."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def absmax(x, axis: tl.constexpr):
    """max|x| of float32 along an axis; NaN where there is a NaN."""
    if INTERPRETED:  # whose own loop over values is slow; their bits order like them, with NaN above infinity
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        return tl.max(bits, axis).to(tl.float32, bitcast=True)
    return tl.reduce(tl.abs(x), axis, larger)


@triton.jit
def scale_of(absmax):
    """Δ float32 of an absmax, as `reference.absmax_scale`: NaN for what is not finite."""
    scale = tl.where(absmax < ABSMAX_FLOOR, ABSMAX_FLOOR, absmax) * INVERSE_QMAX
    return tl.where(absmax < float("inf"), scale, float("nan"))


@triton.jit
def finite_of(absmax):
    """1, or NaN for the absmax of what is not finite, as `reference.finite_rows`."""
    return tl.where(absmax < float("inf"), 1.0, float("nan"))


@triton.jit
def reciprocal(scale):
    """1/Δ correctly rounded, as torch's; plain division would be an approximation of two more ulps."""
    return tl.div_rn(1.0, scale)


@triton.jit
def to_int8(x, inverse):
    """clamp(round_half_even(x · 1/Δ), -127, 127), as `reference.quantize`: NaN becomes 0."""
    y = x * inverse
    if INTERPRETED:
        y = tl.where(y == y, y, 0.0)
        y = tl.minimum(tl.maximum(y, -QMAX), QMAX)
        return (y + ROUND).to(tl.int32, bitcast=True).to(tl.int8)
    y = tl.maximum(y, -QMAX, propagate_nan=tl.PropagateNan.ALL)
    return tl.inline_asm_elementwise(_PACK, "=r,f,f,f,f", [y], tl.int8, is_pure=True, pack=4)


@triton.jit
def activate(x, ACT: tl.constexpr):
    """An activation of float32 x: "none", "relu", "silu", "gelu" (erf) or "gelu_tanh"."""
    if ACT == "relu":
        x = tl.where(x < 0, 0.0, x)  # keeps NaN
    elif ACT == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif ACT == "gelu":
        # relu(x) - |x| erfc(|x| / sqrt 2) / 2, by Abramowitz and Stegun 7.1.26, which is 1.5e-7 off at most: half the
        # instructions of tl.erf, which would bound a kernel that has only memory to wait for
        size = tl.minimum(tl.abs(x), 30.0)  # infinity times the tail's zero is NaN
        t = 1.0 / (1.0 + 0.2316418882663604 * size)
        tail = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))))
        x = tl.where(x < 0, 0.0, x) - size * (tail * tl.exp2(-0.7213475204444817 * size * size))
    elif ACT == "gelu_tanh":
        # 0.5 (1 + tanh u) = 1 / (1 + e^-2u)
        x = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        tl.static_assert(ACT == "none", "unknown activation")
    return x


@triton.jit
def paired(x, STEP: tl.constexpr, SIZE: tl.constexpr):
    """(a, b) -> (a + b, a - b) for values STEP apart of float32 x [SIZE].

    Each value meets its partner by a sum of their bits, of which its own are taken away again: what the compiler makes of
    that is one exchange between lanes, or nothing where one thread has both, and never a detour through shared memory.
    """
    y = tl.reshape(x, (SIZE // (2 * STEP), 2, STEP))
    bits = y.to(tl.int32, bitcast=True)
    other = (tl.sum(bits, 1, keep_dims=True) - bits).to(tl.float32, bitcast=True)
    sign = (1 - 2 * tl.arange(0, 2)).to(tl.float32)
    return tl.reshape(other + sign[None, :, None] * y, (SIZE,))


@triton.jit
def rotate(x, BLOCK: tl.constexpr, SIZE: tl.constexpr, NORM: tl.constexpr):
    """x H in float32, for SIZE values of float32, rows one after the other; BLOCK 0 leaves x as it is (`kernels.rotation`)."""
    if BLOCK != 0:
        flat = tl.reshape(x, (SIZE,))
        flat = paired(flat, 1, SIZE)
        flat = paired(flat, 2, SIZE)
        flat = paired(flat, 4, SIZE)
        flat = paired(flat, 8, SIZE)
        if BLOCK >= 32:
            flat = paired(flat, 16, SIZE)
        if BLOCK >= 64:
            flat = paired(flat, 32, SIZE)
        if BLOCK >= 128:
            flat = paired(flat, 64, SIZE)
        x = tl.reshape(flat, x.shape) * NORM
    return x


def rotation_of(block: int) -> dict[str, Any]:
    """The constants of `rotate` for blocks of a size; 0 for none."""
    return {"ROTATE": block, "NORM": block**-0.5 if block else 1.0}


def block_of(k: int) -> tuple[int, int]:
    """(columns per block, warps) for rows of k elements: 16 elements a thread, which are two 16-byte accesses of bf16."""
    block = triton.next_power_of_2(k) if k <= ONE_BLOCK else _LOOP_BLOCK
    return block, min(16, max(1, block // 512))


def as_rows(x: Tensor) -> Tensor:
    """x [..., K] as [M, K] with contiguous columns; rows may be strided. A view where there is one."""
    rows = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def launchable(kernel: Any, x: Tensor) -> Any:
    """The kernel, as a compiler that traces its launch records it: x is no plain tensor then."""
    return kernel if type(x) in (Tensor, torch.nn.Parameter) else torch.library.wrap_triton(kernel)


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The context to launch in: Triton launches on the current device, whatever device its arguments are on."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
