"""Plans of tiny models that tests of checkpoints share, and what is read of the directories."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import torch
from families import build
from safetensors.torch import load_file
from torch import Tensor, nn

import sqcompile
from sqcompile import Plan, Recipe
from sqcompile.checkpoints.export import Exported, export

PLAIN = Recipe(0.5)
STATIC = Recipe(0.5, activation="per_tensor_static")


@functools.cache
def planned(family: str, recipe: Recipe = PLAIN) -> tuple[Any, dict[str, Tensor], Plan]:
    """A tiny model, a call of it and a plan. Exports leave models as they are, so that tests share them."""
    model, call = build(family)
    return model, call, sqcompile.calibrate(model, [call], recipe=recipe, progress=False)


def exported(family: str, format: str, path: Path, recipe: Recipe = PLAIN) -> Exported:
    """An export of `planned`; its own plan is one that can be saved."""
    model, _, plan = planned(family, recipe)
    done = export(model, plan, format, path)
    done.plan.check()
    return done


def with_layers(plan: Plan, recipe: Recipe | None = None, **changes: dict[str, Any]) -> Plan:
    """The plan with other fields for some linears, by a part of their names, and of another recipe."""
    layers = tuple(
        dataclasses.replace(l, **{k: v for part, c in changes.items() if part in l.name for k, v in c.items()})
        for l in plan.layers
    )
    return dataclasses.replace(plan, layers=layers, recipe=recipe or plan.recipe)


def masked(call: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a loaded checkpoint is called with."""
    ids = call["input_ids"]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def logits(model: nn.Module, call: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**call, use_cache=False).logits


def quantized_stage(model: nn.Module, plan: Plan) -> Any:
    """The quantized graph of what was exported."""
    return sqcompile.compile(model, plan=plan, backend="eager", progress=False).stages["quantized"]


def weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a directory."""
    found: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found


def quantization(path: Path) -> dict[str, Any]:
    """``quantization_config`` of a directory."""
    return json.loads((path / "config.json").read_text())["quantization_config"]


def equal(a: Any, b: Any) -> bool:
    """Whether two things are the same, bit by bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if dataclasses.is_dataclass(a):
        return all(equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b
