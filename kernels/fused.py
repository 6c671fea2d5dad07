"""Fused operators of lowered graphs on GPUs: ``torch.ops.sqcompile.*``. Triton on CUDA, plain PyTorch elsewhere.

The plain versions are the definition: what a quantize node and its neighbours compute one after the other. They run
where there is no Triton, and every lowered graph can be checked with them on a CPU.

The operators of rows are ``torch.library.triton_op``: a compiler sees their kernels, or the plain arithmetic. The GEMMs
choose their kernel by the number of rows when they run, which a compiler holds as a symbol, so they are opaque to it.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sqcompile.kernels import reference
from sqcompile.kernels.rows import ACTIVATIONS, normed, quantized, scaled


@functools.cache
def available(device: torch.device) -> bool:
    """Whether the Triton kernels run on a device: CUDA with INT8 tensor cores that Triton serves (sm_80 and later)."""
    found = device.type == "cuda" and torch.version.cuda is not None and importlib.util.find_spec("triton") is not None
    return found and torch.cuda.get_device_capability(device) >= (8, 0)


def quantize_rows(x: Tensor, granularity: str, multiplier: Tensor | None) -> tuple[Tensor, Tensor]:
    """int8 and Δ of x · multiplier, any float dtype [..., K]; one Δ per "token" [..., 1] or per "tensor" []."""
    x = scaled(x, multiplier)
    scale = reference.token_scale(x) if granularity == "token" else reference.tensor_scale(x)
    return reference.quantize(x, scale), scale


def norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    round_first: bool,
    scale: Tensor | None,
    multiplier: Tensor | None,
    keep: bool,
    rotation: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm or LayerNorm of x [..., K] and its quantization.

    Args:
        x: any float dtype [..., K].
        weight, bias: [K] or None.
        rms: RMSNorm, else LayerNorm.
        round_first: the RMSNorm of transformers, which rounds to x's dtype before the weight, too.
        scale: static Δ, or None for one per token.
        multiplier: float32 [K] before quantization, or None.
        keep: whether the norm's own output is wanted.
        rotation: the size of the blocks in which channels are rotated before quantization; 0 for none.

    Returns:
        int8 [..., K], the rows' factors [..., 1] (Δ, or `reference.finite_rows` with a static one), and the norm's output
        in x's dtype, [0] unless kept.
    """
    y = normed(x, weight, bias, eps, rms, round_first)
    q, scale = quantized(scaled(y, multiplier, rotation), scale)
    return q, scale, y if keep else x.new_empty(0)


def act_quantize(
    gate: Tensor, up: Tensor | None, activation: str, scale: Tensor | None, multiplier: Tensor | None, rotation: int = 0
) -> tuple[Tensor, Tensor]:
    """int8 [..., K] and the rows' factors [..., 1] of act(gate) · up · multiplier, rotated in blocks of ``rotation`` channels
    unless 0: Δ, or `reference.finite_rows` with a static ``scale``."""
    y = ACTIVATIONS[activation](gate)
    return quantized(scaled(y if up is None else y * up, multiplier, rotation), scale)


def int8_gemm(
    q: Tensor,
    scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    activation: str,
    residual: Tensor | None,
    out_scale: Tensor | None,
) -> Tensor:
    """act(`reference.int8_linear`) + residual, rounded once to dtype; int8 with the static Δ ``out_scale``.

    The rows of an int8 result have the factors of q's: with a static scale, ``scale`` is `reference.finite_rows`.
    """
    y = reference.int8_linear(q, scale, w, w_scale, bias, torch.float32)
    y = ACTIVATIONS[activation](y)
    y = (y if residual is None else y + residual.float()).to(dtype)
    return y if out_scale is None else reference.quantize(y, out_scale)


def _quantize_rows_triton(x: Tensor, granularity: str, multiplier: Tensor | None) -> tuple[Tensor, Tensor]:
    from sqcompile.kernels.triton.rows.quantize import quantize_rows as kernel

    return kernel(x, granularity, None, multiplier)


def _norm_quantize_triton(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    from sqcompile.kernels.triton.rows.norm import norm_quantize as kernel

    round_first, scale, multiplier, keep, *rotation = rest
    kind = "rms" if rms else "layer"
    _, q, out, y = kernel(
        x, weight, eps, kind=kind, bias=bias, round_first=round_first, scale=scale, multiplier=multiplier, keep=keep,
        rotation=rotation[0] if rotation else 0,
    )  # fmt: skip
    return q, out, x.new_empty(0) if y is None else y


def _act_quantize_triton(
    gate: Tensor, up: Tensor | None, activation: str, scale: Tensor | None, multiplier: Tensor | None, rotation: int = 0
) -> tuple[Tensor, Tensor]:
    from sqcompile.kernels.triton.rows.act import act_quantize as kernel

    return kernel(gate, up, activation, scale=scale, multiplier=multiplier, rotation=rotation)


def rotate_quantize_triton(x: Tensor, block: int, scale: Tensor | None, zero_point: int) -> tuple[Tensor, Tensor]:
    """`rotation.rotate_quantize` on GPUs, whose int8 has the zero point 0."""
    from sqcompile.kernels.triton.rows.quantize import quantize_rows as kernel

    assert zero_point == 0
    return kernel(x, "token", scale, None, block)


def _int8_gemm_triton(q: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor, *epilogue: Any) -> Tensor:
    from sqcompile.kernels.triton.gemm.int8_gemm import int8_gemm as kernel

    bias, dtype, activation, residual, out_scale = epilogue
    return kernel(q, w, scale, w_scale, bias, dtype, activation=activation, residual=residual, out_scale=out_scale)


def _int8_grouped_linear_triton(
    q: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor, offsets: Tensor, dtype: torch.dtype
) -> Tensor:
    from sqcompile.kernels.triton.gemm.grouped import grouped_int8_gemm as kernel

    return kernel(q, w, scale, w_scale, offsets, None, dtype)


def _int8_gemm_fake(q: Tensor, scale: Tensor, w: Tensor, *args: Any) -> Tensor:
    _, _, dtype, _, _, out_scale = args
    return q.new_empty((*q.shape[:-1], w.shape[0]), dtype=dtype if out_scale is None else torch.int8)


# schema: (plain PyTorch, Triton, fake)
OPAQUE: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    "int8_gemm(Tensor q, Tensor scale, Tensor w, Tensor w_scale, Tensor? bias, ScalarType dtype, str activation, "
    "Tensor? residual, Tensor? out_scale) -> Tensor": (int8_gemm, _int8_gemm_triton, _int8_gemm_fake),
    "int8_grouped_linear(Tensor q, Tensor scale, Tensor w, Tensor w_scale, Tensor offsets, ScalarType dtype)"
    " -> Tensor": (
        reference.int8_grouped_linear,
        _int8_grouped_linear_triton,
        lambda q, scale, w, w_scale, offsets, dtype: q.new_empty((q.shape[0], w.shape[1]), dtype=dtype),
    ),
}
# (plain PyTorch, Triton) with the plain one's name and signature
VISIBLE: tuple[tuple[Callable[..., Any], Callable[..., Any]], ...] = (
    (quantize_rows, _quantize_rows_triton),
    (norm_quantize, _norm_quantize_triton),
    (act_quantize, _act_quantize_triton),
)


def on_cuda(plain: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The Triton version where Triton serves the device, else the plain one."""

    @functools.wraps(plain)
    def run(x: Tensor, *args: Any) -> Any:
        return (kernel if x.is_cuda and available(x.device) else plain)(x, *args)

    return run
