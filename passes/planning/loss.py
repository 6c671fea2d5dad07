"""loss: what quantizing linears costs the outputs, by `feel`: roundings of inputs and of weights, one value at a time.

    ½ Σ_r w_r Σ_j (X̂ - X)_rj² G_rj²  +  ½ Σ_n Σ_j (Ŵ - W)_nj² o_n m_j

X, W and the gradients G are smoothed and rotated as what is quantized: X diag(1/s) H, W diag(s) H, G diag(s) H. m_j is the
mean of X_j². No product of matrices is computed, and of a large weight only some rows are quantized.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sqcompile.kernels.qtypes import QType
from sqcompile.kernels.reference import quantize, token_scale, weight_scale
from sqcompile.kernels.rotation import rotate
from sqcompile.passes.ir.graph import row_parts
from sqcompile.passes.planning.feel import Reads

LARGEST = 2**20  # values of a weight that are quantized


@dataclass(frozen=True, eq=False)
class Transform:
    """How a linear is changed before it is quantized.

    Attributes:
        columns: s of its input channels, float32 [K]; None for ones.
        block: the blocks in which its input is rotated; None without rotation.
        rows: s of its output channels, float32 [N], by which W is divided and the output multiplied; None for ones.
    """

    columns: Tensor | None = None
    block: int | None = None
    rows: Tensor | None = None

    def input(self, x: Tensor) -> Tensor:
        """x [..., K] diag(1/s) H in float32."""
        x = x.float() if self.columns is None else x.float() / self.columns
        return x if self.block is None else rotate(x, self.block)

    def gradient(self, g: Tensor) -> Tensor:
        """The gradient [..., K] with respect to `input`, of one with respect to x."""
        g = g.float() if self.columns is None else g.float() * self.columns
        return g if self.block is None else rotate(g, self.block)

    def weight(self, w: Tensor, part: slice) -> Tensor:
        """Some rows of W [N, K] diag(s) H, divided by theirs: float32."""
        w = w[part].float() if self.columns is None else w[part].float() * self.columns
        w = w if self.block is None else rotate(w, self.block)
        return w if self.rows is None else w / self.rows[part, None]


def of_input(reads: Reads, transform: Transform, scale: Tensor | None, qtype: QType) -> float:
    """What rounding an input costs; ``scale`` is Δ, None for one of each row."""
    x, g = transform.input(reads.rows), transform.gradient(reads.gradients)
    by = token_scale(x, qtype.q_max) if scale is None else scale
    error = quantize(x, by, dtype=qtype.dtype).float() * by - x
    return float(((error * g).double().square().sum(-1) * reads.weights).sum()) / 2


def of_weight(w: Tensor, outputs: Tensor, reads: Reads, transform: Transform, per_tensor: bool, qtype: QType) -> float:
    """What rounding a weight [N, K] costs.

    Args:
        w: any float dtype.
        outputs: as `Felt.outputs`, [N].
        reads: of its input.
        transform: of the linear.
        per_tensor: whether there is one Δ for all rows.
        qtype: the number format.
    """
    if not reads.weights.numel():
        return 0.0
    moments = (transform.input(reads.rows).square() * reads.weights[:, None]).sum(0) / reads.weights.sum()
    parts, common, q_max = row_parts(w), None, qtype.q_max
    if per_tensor:
        common = torch.stack([weight_scale(transform.weight(w, p), False, q_max) for p in parts]).amax().view(1, 1)
    step = max(1, w.numel() // LARGEST)
    parts = parts if step == 1 else [slice(0, None, step)]
    cost = 0.0
    for part in parts:
        each = transform.weight(w, part)
        by = weight_scale(each, True, q_max) if common is None else common
        error = quantize(each, by, dtype=qtype.dtype).float() * by - each
        rows = outputs[part] if transform.rows is None else outputs[part] * transform.rows[part].square()
        cost += float((error.square() @ moments).double() @ rows.double())
    kept = len(range(0, len(w), step)) if step > 1 else len(w)
    return cost * len(w) / kept / 2
