"""w8a8: INT8 weights, scales and ``quantization_config`` as compressed-tensors has them.

    %w_int8 [N, K], %w_scale [N], %w_input_scale []
->
    q_proj.weight int8 [N, K], q_proj.weight_scale float32 [N, 1], q_proj.input_scale float32 [1]
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, fx, nn

from sqcompile.checkpoints.names import CheckpointNames
from sqcompile.checkpoints.parameters import Undo, undo_layout
from sqcompile.errors import ArtifactError
from sqcompile.kernels.qtypes import INT8
from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import Linear, find_linears, nodes_by_name
from sqcompile.passes.rewrite.insert_qdq import quantized_weight
from sqcompile.plan.entries import LayerPlan
from sqcompile.plan.plan import Plan


class Quantized:
    """The INT8 linears of a model.

    Attributes:
        strategy: of all weights: "tensor" where each has one scale, else "channel", which says that of a tensor as well.
        layers: what the plan says of each, by the name of its weight in memory.
    """

    def __init__(self, traced: fx.GraphModule, folded: fx.GraphModule, plan: Plan, names: CheckpointNames) -> None:
        """What is quantized by ``plan``, one that an engine runs (`for_engines`)."""
        self.names, self.plan, self.folded = names, plan, folded
        self._nodes, before = nodes_by_name(folded), nodes_by_name(traced)
        in_folded = {l.name: l for l in find_linears(folded)}
        layers = {l.name: l for l in plan.layers if l.quantized}
        self.layers: dict[str, LayerPlan] = {}
        self._linears: dict[str, tuple[Linear, Undo]] = {}
        for l in find_linears(traced):
            found = undo_layout(before[l.weight]) if l.name in layers else None
            if found is not None:  # of one weight, all uses are alike
                for name in about(traced).aliases[found[0]]:
                    self.layers[name] = layers[l.name]
                    self._linears[name] = in_folded[l.name], found[1]
        per_tensor = all(not self._per_channel(l) for l in self.layers.values())
        experts = any(l.experts for l, _ in self._linears.values())
        self.strategy = "tensor" if per_tensor and not experts else "channel"

    def tensors(self, name: str) -> tuple[Tensor, Tensor]:
        """The weight as the model has it, in int8, and its scales in float32: [..., N, 1], or [1] by ``strategy``.

        Raises:
            WeightError: for a weight that is not finite.
        """
        linear, undo = self._linears[name]
        q, scale = quantized_weight(self.folded, linear, self._nodes, self._per_channel(self.layers[name]), INT8)
        if self.strategy == "tensor":
            return undo(q), scale
        return undo(q), undo(scale.expand(q.shape[:-1]).unsqueeze(-1))

    def renamed(self, weights: dict[str, Tensor], scales: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a block as a checkpoint holds them, with the scales beside the weights.

        Args:
            weights: of the block, in int8 where they are quantized, by their names in memory.
            scales: of those.

        Raises:
            ArtifactError: if a checkpoint holds no INT8 weight of that form.
        """
        found = self.names.convert(weights)
        if self.strategy == "tensor":
            beside = {self._only(name): scale for name, scale in scales.items()}
        else:
            beside = self.names.convert_rows(scales)
        for name, scale in beside.items():
            w = found.get(name)
            fits = self.strategy == "tensor" or (w is not None and scale.shape == (*w.shape[:-1], 1) and w.dim() == 2)
            if w is None or w.dtype != torch.int8 or not name.endswith(".weight") or not fits:
                raise ArtifactError(
                    f"a checkpoint holds {name} otherwise than as an INT8 matrix: export it as 'smoothed'"
                )
            found[f"{name}_scale"] = scale
        for name in scales:
            if (step := self.layers[name].input_scale) is not None:
                owner = self._only(name).removesuffix(".weight")
                found[f"{owner}.input_scale"] = torch.tensor([step], dtype=torch.float32)
        return found

    def config(self) -> dict[str, Any]:
        """``quantization_config``."""
        dynamic = [name for name, l in self.layers.items() if l.input_scale is None]
        static = [name for name, l in self.layers.items() if l.input_scale is not None]
        kinds = [(dynamic, _int8("token", dynamic=True)), (static, _int8("tensor", dynamic=False))]
        groups: dict[str, Any] = {}
        for members, activations in kinds:
            if members:
                # a class is looked for before the parts of what an engine fuses, so that of two groups neither names one
                targets = self._targets(members) if dynamic and static else ["Linear"]
                groups[f"group_{len(groups)}"] = {
                    "targets": targets,
                    "weights": _int8(self.strategy, dynamic=False),
                    "input_activations": activations,
                    "output_activations": None,
                }
        return {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": self._ignored(),
            "kv_cache_scheme": None,
        }

    def _ignored(self) -> list[str]:
        """Modules that stay in float, as an engine may know them: also those that it makes linears of by itself."""
        found: dict[str, None] = {}
        for name, module in self.names.model.named_modules(remove_duplicate=False):
            weight = getattr(module, "weight", None)
            key = f"{name}.weight"
            matrix = isinstance(weight, Tensor) and weight.dim() > 1 and not isinstance(module, nn.Embedding)
            if matrix and key not in self.layers and key in self.names.every:
                found.update(dict.fromkeys(self.names.modules_of(key)))
            for leaf, _ in module.named_parameters(recurse=False):
                if (key := f"{name}.{leaf}") not in self.layers:
                    found.update(dict.fromkeys(self._experts(key)))
        return list(found)

    def _targets(self, members: list[str]) -> list[str]:
        """Modules by name, and experts by the module around them."""
        found: dict[str, None] = {}
        for name in members:
            found.update(dict.fromkeys(self._experts(name) or self.names.modules_of(name)))
        return list(found)

    def _experts(self, name: str) -> list[str]:
        """Patterns of experts that a checkpoint has one by one, whatever an engine calls their parts; else none."""
        held = self.names.of(name)
        if name not in self.names.every or self.names.every[name].dim() != 3 or name in held:
            return []
        parents = {n.rsplit(".", 3)[0] for n in held if n.endswith(".weight")}
        return [f"re:{re.escape(parent)}[.].*" for parent in sorted(parents)]

    def _only(self, name: str) -> str:
        """The one name that a checkpoint has for a weight."""
        found = self.names.of(name)
        if len(found) != 1:
            raise ArtifactError(f"a checkpoint holds {name} in {len(found)} parts: export it as 'smoothed'")
        return found[0]

    def _per_channel(self, l: LayerPlan) -> bool:
        return (l.weight or self.plan.recipe.weight) == "per_channel"


def _int8(strategy: str, dynamic: bool) -> dict[str, Any]:
    return {"num_bits": 8, "type": "int", "symmetric": True, "strategy": strategy, "dynamic": dynamic}
