"""products: the error of a linear's outputs on sampled rows, by the very arithmetic of the quantized graph."""

from __future__ import annotations

import torch
from torch import Tensor

from sqcompile.kernels.cpu.rows import quantize as quantize_rows
from sqcompile.kernels.products import product
from sqcompile.kernels.qtypes import INT8, QType
from sqcompile.kernels.reference import dequantize, quantize, weight_scale
from sqcompile.passes.ir.graph import row_parts, row_step
from sqcompile.passes.planning.loss import Transform

LARGEST = 2**21  # values of a weight that are quantized


def noise_and_signal(
    weight: Tensor,
    how: Transform,
    x: Tensor,
    x_int: Tensor,
    x_scale: Tensor,
    offset: Tensor,
    per_tensor: bool,
    qtype: QType,
) -> tuple[float, float]:
    """|Y_quantized - Y|² and |Y + W c|²; of a large weight by some of its rows, for all.

    Args:
        weight: any float dtype [N, K].
        how: how it is changed before it is quantized.
        x: float32 [R, K].
        x_int: what x is quantized to, changed likewise, in the number format [R, K].
        x_scale: float32 [R, 1] or [], Δx.
        offset: float32 [K], c, what was taken off x.
        per_tensor: whether there is one Δ for all rows of the weight.
        qtype: the number format.
    """
    parts, common = row_parts(weight), None
    if per_tensor:
        common = torch.cat([weight_scale(how.weight(weight, p), False, qtype.q_max) for p in parts]).amax().view(1, 1)
        common = how.across(common)
    noise = signal = 0.0
    step = row_step(weight, LARGEST)
    for part in parts if step == 1 else [slice(0, None, step)]:  # a few rows at a time: no float copy of the weight
        w = how.weight(weight, part)
        w_int, w_scale = _quantized(w, how, common, qtype)
        columns = weight[part].float().t()
        y, constant = x @ columns, offset @ columns
        acc = product(x_int, w_int)
        y_hat = dequantize(acc, x_scale, w_scale.flatten())
        if how.rows is not None:
            y_hat = y_hat * how.rows[part]
        y = y.double()  # squares overflow float32 where the values do not
        signal += float((y + constant).square().sum())
        noise += float((y_hat - y).square().sum())
    share = len(range(0, len(weight), step)) / len(weight)
    return noise / share, signal / share


def _quantized(w: Tensor, how: Transform, common: Tensor | None, qtype: QType) -> tuple[Tensor, Tensor]:
    """Rows of a weight in the number format, and their scales, float32 [N, 1] or [1, 1]; ``common``: those, where there are."""
    if common is None and qtype is INT8 and how.whole and (found := quantize_rows(w.contiguous())) is not None:
        return found  # the same, in one pass over memory
    scale = how.across(weight_scale(w, True, qtype.q_max)) if common is None else common
    return quantize(w, scale, dtype=qtype.dtype), scale


def column_absmax(w: Tensor) -> Tensor:
    """max|W_:j| of w [N, K] or [E, N, K]: float32 [K]; a few rows at a time, no copy of w."""
    rows = w.flatten(0, -2)
    return torch.stack([rows[p].abs().amax(0).float() for p in row_parts(rows)]).amax(0)


def column_energy(w: Tensor, experts: int | None) -> Tensor:
    """|W_:j|² of w [N, K] or [E, N, K]: float32 [K]; of experts, the mean one's."""
    rows = w.flatten(0, -2)
    return torch.stack([rows[p].float().square().sum(0) for p in row_parts(rows)]).sum(0) / (experts or 1)
