"""halves: products of bfloat16 and float16 for analyses, in float32 where an x86 CPU multiplies that faster.

    y = round(sum x w)        both ways: products of 16-bit floats are exact in float32, sums are float32's, and y is rounded once

Without AMX, an Intel makes bfloat16 dot products at half the rate of float32 ones, and CPUs without AVX512-BF16 emulate them.
Only sums may be taken in another order. The model itself is never run so: it is for calibration, which reads a thousand rows
at once.
"""

from __future__ import annotations

import contextlib
import functools
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqcompile.kernels import reference
from sqcompile.kernels.cpu.x86 import amx
from sqcompile.kernels.ops import sqcompile_ops
from sqcompile.passes.ir.graph import row_parts

ROWS = 128  # fewer do not pay for weights in float32


def in_analyses(target: Any) -> Callable[..., Any]:
    """What an analysis calls in the place of a graph's operator."""
    return {torch.ops.aten.linear.default: linear, sqcompile_ops.grouped_linear.default: _grouped}.get(target, target)


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, with a derivative for x alone where it is made in float32.

    Args:
        x: [..., K].
        w: [N, K], and b [N], in the dtype of x.
    """
    fits = x.device.type == "cpu" and w.dim() == 2 and w.numel() and x.shape[:-1].numel() >= ROWS
    if not fits or not _slow(x.dtype):
        return torch.nn.functional.linear(x, w, b)
    y: Tensor = _Linear.apply(x, w, b)
    return y


def _grouped(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    return reference.grouped_linear(x, w, offsets, linear)


class _Linear(torch.autograd.Function):
    """Keeps the weight as it is for the way back. Some rows at a time are in float32, in memory that caches hold."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(w)
        rows, y = x.reshape(-1, x.shape[-1]).float(), x.new_empty(x.shape[:-1].numel(), len(w))
        for part in row_parts(w):
            y[:, part] = torch.nn.functional.linear(rows, w[part].float(), None if b is None else b[part].float())
        return y.view(*x.shape[:-1], len(w))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        [g], [w] = gradients, ctx.saved_tensors
        rows = g.reshape(-1, g.shape[-1])
        x = rows.new_zeros(len(rows), w.shape[1], dtype=torch.float32)  # whatever the user's default dtype
        for part in row_parts(w):
            x.addmm_(rows[:, part].float(), w[part].float())
        return x.to(g.dtype).view(*g.shape[:-1], w.shape[1]), None, None


@functools.cache
def _slow(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies a dtype slower than float32, as far as is known."""
    vendor, flags = _processor()
    if platform.machine() not in ("x86_64", "AMD64") or not flags:
        return False
    if dtype == torch.bfloat16:
        return not (amx() or ("avx512_bf16" in flags and vendor == "AuthenticAMD"))
    return dtype == torch.float16 and not flags & {"avx512_fp16", "amx_fp16"}


def _processor() -> tuple[str, frozenset[str]]:
    """Vendor and instructions, as Linux spells them; nothing of other systems."""
    with contextlib.suppress(OSError):
        lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        first = {key.strip(): words.strip() for key, _, words in reversed([*lines])}
        return first.get("vendor_id", ""), frozenset(first.get("flags", "").split())
    return "", frozenset()
