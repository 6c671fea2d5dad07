"""Plan: everything decided about a model, without its weights or its data. Serializable.

Keyed by parameter names, so that a plan applies to any graph captured from the same model.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sqcompile.errors import PlanError
from sqcompile.recipe import AttentionProducts, Recipe

FORMAT = 2

_HEADS = "attention: "  # before the names of ``Plan.heads`` in a file
_COLUMNS = "columns: "  # and of ``Plan.columns``

Smoothing = Literal["folded", "multiplied", "none"]


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
        input_scale: Δx where activations are static, else None.
        shape: of the weight, (N, K) or (E, N, K).
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
        q_scale, k_scale: Δ of Q and K where they are static, else None.
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


@dataclass(frozen=True)
class Plan:
    """Decisions for one model.

    Attributes:
        recipe: what was asked for.
        call: shapes and dtypes of the call the model was captured with.
        scales: smoothing scale by site name, float32 [C].
        layers: every linear, in graph order.
        attention: every attention, in graph order; empty where the recipe leaves attention alone.
        heads: tensors of attentions, by attention name and what they are, float32: "<name>/scale" [classes] (smoothing),
            "<name>/query_by" [H, D] and "<name>/key_by" [G, D] (what the scale comes to, for graphs that cannot fold it),
            "<name>/key_mean" [G, D] (subtracted from the smoothed K), "<name>/value_scale" [G, Dv] (static Δ of V in the folded graph).
        columns: s of each smoothed linear's input channels, float32 [K], by linear name: for graphs that hold a linear
            and not all of its site, where it is multiplied explicitly.
    """

    recipe: Recipe
    call: Any
    scales: dict[str, Tensor]
    layers: tuple[LayerPlan, ...]
    attention: tuple[AttentionPlan, ...] = ()
    heads: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as one safetensors file: the scales, and all else as JSON in its header."""
        meta = {
            "format": FORMAT,
            "recipe": dataclasses.asdict(self.recipe),
            "call": self.call,
            "layers": [dataclasses.asdict(l) for l in self.layers],
            "attention": [dataclasses.asdict(a) for a in self.attention],
        }
        tensors = self.scales | {_HEADS + k: v for k, v in self.heads.items()}
        tensors |= {_COLUMNS + k: v for k, v in self.columns.items()}
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, path, {"sqcompile_plan": json.dumps(meta)})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """Reads a plan.

        Raises:
            PlanError: if the file is no plan, or of a newer format.
        """
        try:
            with safe_open(path, "pt") as f:
                meta = json.loads((f.metadata() or {})["sqcompile_plan"])
                tensors = {
                    k: f.get_tensor(k)
                    for k in f.keys()  # noqa: SIM118 - a safetensors file is no dict
                }
        except (OSError, SafetensorError, KeyError, ValueError) as e:
            raise PlanError(f"{os.fspath(path)} is not a sqcompile plan ({e!r}): make one with Plan.save") from e
        if meta["format"] != FORMAT:
            raise PlanError(
                f"{os.fspath(path)} has plan format {meta['format']}, this version reads {FORMAT}: calibrate again"
            )
        recipe: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in meta["recipe"].items()}
        return Plan(
            Recipe(**recipe),
            meta["call"],
            {k: v for k, v in tensors.items() if not k.startswith((_HEADS, _COLUMNS))},
            tuple(LayerPlan(**{**l, "shape": tuple(l["shape"])}) for l in meta["layers"]),
            tuple(AttentionPlan(**{**a, "shape": tuple(a["shape"])}) for a in meta["attention"]),
            {k.removeprefix(_HEADS): v for k, v in tensors.items() if k.startswith(_HEADS)},
            {k.removeprefix(_COLUMNS): v for k, v in tensors.items() if k.startswith(_COLUMNS)},
        )
