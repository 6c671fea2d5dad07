"""entries: what a plan says of one linear, of one attention, and of whose shard of a model it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sqcompile.plan.recipe import Activation, AttentionProducts, Weight

Smoothing = Literal["folded", "multiplied", "none"]


@dataclass(frozen=True)
class Shard:
    """Whose shard of a model a plan is of, where several processes hold the model together.

    Attributes:
        rank: of the process in their group.
        count: of all of them, at least 2.
    """

    rank: int
    count: int

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.count}"


@dataclass(frozen=True)
class LayerPlan:
    """What is done with one linear, and why.

    Attributes:
        name: the weight's qualified name.
        kind: "linear", or "experts": routed experts, whose weights are one tensor.
        quantized: whether it runs in INT8.
        smoothing: "folded" (1/s absorbed by a parameter), "multiplied" (x·(1/s) before quantization) or "none".
        reason: in words.
        alpha: migration strength of its site, None without smoothing.
        sqnr_db: signal to quantization noise ratio of its output on the calibration sample, in dB; None in float.
        input_scale: Δx where it is static, else None.
        shape: of the weight, (N, K) or (E, N, K).
        rotation: the size of the blocks in which its input is rotated before it is quantized; None without rotation.
        activation: how its input is scaled, where that is not what the recipe says of all; else None.
        weight: how its weight is scaled, likewise.
        loss: what its roundings cost the outputs: nats of KL divergence for every row of logits, else half of the relative
            energy of the error; None where that is not known. Linears that read one input share what that costs.
    """

    name: str
    kind: Literal["linear", "experts"]
    quantized: bool
    smoothing: Smoothing
    reason: str
    alpha: float | None = None
    sqnr_db: float | None = None
    input_scale: float | None = None
    shape: tuple[int, ...] = (0, 0)
    rotation: int | None = None
    activation: Activation | None = None
    weight: Weight | None = None
    loss: float | None = None


@dataclass(frozen=True)
class AttentionPlan:
    """What is done with one attention, and why.

    Attributes:
        name: of the module that holds its projections.
        quantized: which of its products run in INT8.
        smoothing: "folded" (Q·diag(s) and K·diag(1/s) absorbed by parameters), "multiplied" (right before quantization:
            what a graph with a KV cache makes of "folded") or "none".
        reason: in words.
        alpha: migration strength, None without smoothing.
        sqnr_db: signal to quantization noise ratio of its scores on the calibration sample, in dB; None in float.
        q_scale: Δ of Q where it is static, else None.
        k_scale: Δ of K where it is static, else None.
        shape: (H, G, D): heads, key heads, channels of a head.
    """

    name: str
    quantized: AttentionProducts
    smoothing: Smoothing
    reason: str
    alpha: float | None = None
    sqnr_db: float | None = None
    q_scale: float | None = None
    k_scale: float | None = None
    shape: tuple[int, ...] = (0, 0, 0)
