"""From one INT8 linear to the next on CPUs: what stands between them, in one operator that reads and writes each value once.

The plain versions are the definition. The linear's product is still to be scaled by its rows' factors; its bias, an
activation, or a residual and a norm, and the next quantization follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sqcompile.kernels import reference
from sqcompile.kernels.rotation import rotate

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


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
    """The quantization of act(h[gate : gate + k]) · h[up : up + k] · multiplier, with h = y · scale + bias.

    Args:
        y: float32 or bfloat16 [..., N].
        scale: of y's rows, float32 [..., 1] or of one element, or None.
        bias: any float dtype [N], or None.
        gate, up: the first columns of both; up is -1 for none.
        k: how many columns.
        activation: a name of `ACTIVATIONS`.
        multiplier: float32 [k], or None.
        rotation: the size of the blocks in which channels are rotated before quantization; 0 for none.
        static: Δ, float32 of one element, or None for one per token.
        zero_point: 0 for int8, 128 for uint8.

    Returns:
        int8 or uint8 [..., k], and the rows' factors, float32 [..., 1]: Δ, or `reference.finite_rows` with a static one.
    """
    h = _output(y, scale, bias)
    x = ACTIVATIONS[activation](h[..., gate : gate + k])
    x = x if up < 0 else x * h[..., up : up + k]
    return quantized(scaled(x, multiplier, rotation), static, zero_point)


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
    """A norm of h = y · scale + bias + residual, and its quantization.

    Args:
        y: float32 or bfloat16 [..., K].
        scale, bias: as of `linear_act_quantize`.
        residual: of y's dtype and number of rows [..., K], or None.
        weight, shift: [K] or None, of the norm.
        eps, rms, round_first: as of `fused.norm_quantize`.
        multiplier, rotation, static, zero_point: as of `linear_act_quantize`.
        keep_sum, keep_norm: whether h, and the norm's own output, are wanted.

    Returns:
        int8 or uint8 [..., K], the rows' factors [..., 1], and in y's dtype h and the norm's output, [0] unless kept. Their
        dims are those of residual, where there is one.
    """
    h = _output(y, scale, bias)
    h = h if residual is None else h.reshape(residual.shape) + residual
    x = normed(h, weight, shift, eps, rms, round_first)
    q, factors = quantized(scaled(x, multiplier, rotation), static, zero_point)
    return q, factors, h if keep_sum else h.new_empty(0), x if keep_norm else h.new_empty(0)


def normed(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool, round_first: bool) -> Tensor:
    """The norm of `norm_quantize`, in x's dtype."""
    if not rms:
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    h = x.float()
    y = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    y = y.to(x.dtype) if round_first else y
    return (y if weight is None else weight * y).to(x.dtype)


def scaled(x: Tensor, multiplier: Tensor | None, rotation: int = 0) -> Tensor:
    """x · multiplier, rotated in blocks."""
    x = x if multiplier is None else x.float() * multiplier
    return rotate(x, rotation) if rotation else x


def quantized(x: Tensor, scale: Tensor | None, zero_point: int = 0) -> tuple[Tensor, Tensor]:
    """The integers of x, and its rows' factors, by a static scale or one per token."""
    rows = reference.token_scale(x) if scale is None else reference.finite_rows(x)
    return reference.quantize(x, rows if scale is None else scale, zero_point), rows


def _output(y: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    return y.clone() if scale is None else reference.scale_output(y, scale, bias, y.dtype)


def linear_act_quantize_fake(y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _fake((*y.shape[:-1], args[4]), y, args[-1])


def linear_norm_quantize_fake(y: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    residual, zero_point, *keep = args[2], *args[-3:]
    shape = y.shape if residual is None else residual.shape
    total, normed = (y.new_empty(shape if kept else (0,)) for kept in keep)
    return *_fake(shape, y, zero_point), total, normed


def _fake(shape: Sequence[Any], y: Tensor, zero_point: int) -> tuple[Tensor, Tensor]:
    q = y.new_empty(shape, dtype=torch.uint8 if zero_point else torch.int8)
    return q, y.new_empty((*shape[:-1], 1), dtype=torch.float32)
