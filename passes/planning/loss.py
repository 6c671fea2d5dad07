"""loss: what quantizing linears costs the outputs, by `feel`: roundings of inputs and of weights, one value at a time.

    ½ Σ_r w_r Σ_j (X̂ - X)_rj² G_rj²  +  ½ Σ_n Σ_j (Ŵ - W)_nj² o_n m_j

X, W and the gradients G are smoothed and rotated as what is quantized: X diag(1/s) H, W diag(s) H, G diag(s) H. m_j is the
mean of X_j². No product of matrices is computed, and of a large weight only some rows are quantized.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sqcompile.kernels.cpu.rows import rotate
from sqcompile.kernels.qtypes import INT8, QType
from sqcompile.kernels.reference import token_scale, weight_scale
from sqcompile.passes.ir.graph import row_parts, row_step
from sqcompile.passes.planning.feel import Reads

LARGEST = 2**19  # values of a weight that are quantized
AT_ONCE = 2**19  # values of an input: on a CPU, larger temporary tensors are fresh pages of the system, each time


@dataclass(frozen=True, eq=False)
class Transform:
    """How a linear is changed before it is quantized.

    Attributes:
        columns: s of its input channels, float32 [K]; None for ones.
        block: the blocks in which its input is rotated; None without rotation.
        rows: s of its output channels, float32 [N], by which W is divided and the output multiplied; None for ones.
        across: makes scales of a shard of W those of the whole: their largest value of all processes.
    """

    columns: Tensor | None = None
    block: int | None = None
    rows: Tensor | None = None
    across: Callable[[Tensor], Tensor] = lambda scale: scale

    @property
    def whole(self) -> bool:
        """Whether the scales of W are its own, and not those of several shards."""
        return self.across is Transform.across

    def input(self, x: Tensor) -> Tensor:
        """x [..., K] diag(1/s) H in float32."""
        x = x.float() if self.columns is None else x.float() / self.columns
        return self.rotated(x)

    def gradient(self, g: Tensor) -> Tensor:
        """The gradient [..., K] with respect to `input`, of one with respect to x."""
        return self.rotated(g.float() if self.columns is None else g.float() * self.columns)

    def weight(self, w: Tensor, part: slice) -> Tensor:
        """Some rows of W [N, K] diag(s) H, divided by theirs: float32."""
        w = w[part].float() if self.columns is None else w[part].float() * self.columns
        w = self.rotated(w)
        return w if self.rows is None else w / self.rows[part, None]

    def rotated(self, x: Tensor) -> Tensor:
        """x H for x float32 [..., K]; on GPUs a product, which is not the kernels' to the bit, and takes one pass."""
        if self.block is None or x.device.type == "cpu":
            return x if self.block is None else rotate(x, self.block)
        return (x.unflatten(-1, (-1, self.block)) @ _hadamard(self.block, x.device)).flatten(-2)


@functools.cache
def _hadamard(block: int, device: torch.device) -> Tensor:
    return rotate(torch.eye(block, dtype=torch.float32, device=device), block)


def of_input(reads: Reads, transform: Transform, scale: Tensor | None, qtype: QType) -> tuple[float, Tensor]:
    """What rounding an input costs, and the mean of its squares, float32 [K].

    ``scale`` is Δ, None for one of each row.
    """
    cost, moments = 0.0, torch.zeros(reads.rows.shape[-1], dtype=torch.float32, device=reads.rows.device)
    for part in row_parts(reads.rows, AT_ONCE):
        x, g = transform.input(reads.rows[part]), transform.gradient(reads.gradients[part])
        by = token_scale(x, qtype.q_max) if scale is None else scale
        error = rounded(x, by, qtype).sub_(x)
        cost += float((error.mul_(g).square_().sum(-1).double() * reads.weights[part]).sum())
        moments = reads.weights[part] @ x.square() + moments
    return cost / 2, moments / reads.weights.sum()


def moments_of(reads: Reads, transform: Transform) -> Tensor:
    """The mean of an input's squares, float32 [K]."""
    moments = torch.zeros(reads.rows.shape[-1], dtype=torch.float32, device=reads.rows.device)
    for part in row_parts(reads.rows, AT_ONCE):
        moments = reads.weights[part] @ transform.input(reads.rows[part]).square() + moments
    return moments / reads.weights.sum()


def of_weight(
    w: Tensor, outputs: Tensor, moments: Tensor, transform: Transform, per_tensor: bool, qtype: QType
) -> float:
    """What rounding a weight costs.

    Args:
        w: any float dtype [N, K].
        outputs: as `Felt.outputs`, float32 [N].
        moments: the mean of the squares of its input, changed as `transform` does, float32 [K].
        transform: of the linear.
        per_tensor: whether there is one Δ for all rows.
        qtype: the number format.
    """
    parts, common, q_max = row_parts(w), None, qtype.q_max
    if per_tensor:
        common = torch.stack([weight_scale(transform.weight(w, p), False, q_max) for p in parts]).amax().view(1, 1)
        common = transform.across(common)
    step = row_step(w, LARGEST)
    parts = parts if step == 1 else [slice(0, None, step)]
    cost, kept = 0.0, len(range(0, len(w), step))
    for part in parts:
        each = transform.weight(w, part)
        by = transform.across(weight_scale(each, True, q_max)) if common is None else common
        error = rounded(each, by, qtype).sub_(each)
        rows = outputs[part] if transform.rows is None else outputs[part] * transform.rows[part].square()
        cost += float((error.square_() @ moments).double() @ rows.double())
    return cost * len(w) / kept / 2


def rounded(x: Tensor, scale: Tensor, qtype: QType) -> Tensor:
    """What `quantize` makes of x, times the scale again; NaN stays NaN."""
    q = (x * scale.reciprocal()).clamp_(-qtype.q_max, qtype.q_max)
    return (q.round_() if qtype is INT8 else qtype.round(q)).mul_(scale)
