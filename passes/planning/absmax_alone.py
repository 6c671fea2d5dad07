"""absmax_alone: a calibration of the largest values of linears' inputs, as files of activation scales have them.

    {"up": float32 [K], "gate": float32 [K]}        # %up and %gate read one tensor
->
    %up.weight, %gate.weight: InputStats(highest=[2, K] of the larger of both, count=0)

    Recipe(alpha="auto", rotate="auto", shift=True, float_work=0.1)
->
    Recipe(alpha=0.5, rotate="none")

There are no tokens, so nothing can be tried: of what a recipe leaves open, SmoothQuant's own is taken. From there the plan
is made as any other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.errors import CalibrationError, RecipeError
from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import Linear, find_linears, module_of, nodes_by_name, value
from sqcompile.passes.planning.overrides import recipe_of
from sqcompile.passes.planning.stay_float import stay_float
from sqcompile.plan.recipe import Recipe
from sqcompile.statistics.input_stats import InputStats
from sqcompile.statistics.observe import Calibration

ALPHA = 0.5  # SmoothQuant's own
_NAMED = 3  # linears in a message


def settled(recipe: Recipe) -> Recipe:
    """The recipe with what only tokens could choose decided: α is 0.5, nothing is rotated, shifted or
    left in float for its cost. Fixed values stay.

    Raises:
        RecipeError: for a wish that needs tokens.
    """
    if recipe.attention != "none":
        raise RecipeError(
            f"attention={recipe.attention!r} with act_scales, which say nothing of queries, keys and values: pass a Recipe "
            "with attention='none', or calib_loader"
        )
    if recipe.max_degradation is not None:
        raise RecipeError(
            f"max_degradation={recipe.max_degradation!r} with act_scales, which have no tokens to measure it on: leave it "
            "out, or pass calib_loader"
        )
    chosen = _decided({"alpha": recipe.alpha, "rotate": recipe.rotate, "shift": recipe.shift})
    overrides = {pattern: _decided(dict(fields)) for pattern, fields in recipe.by_pattern}
    return dataclasses.replace(recipe, **chosen, overrides=overrides, float_work=0.0)


def _decided(fields: dict[str, Any]) -> dict[str, Any]:
    alpha = fields.get("alpha")
    if alpha == "auto" or (isinstance(alpha, tuple) and len(set(alpha)) > 1 and ALPHA in alpha):
        fields["alpha"] = ALPHA
    elif isinstance(alpha, tuple) and len(set(alpha)) > 1:
        raise RecipeError(f"alpha={alpha!r} with act_scales, which have no tokens to try them on: pass one of them")
    if fields.get("rotate") == "auto":
        fields["rotate"] = "none"
    if "shift" in fields:
        fields["shift"] = False
    return fields


def calibration_of(gm: fx.GraphModule, scales: Mapping[str, Tensor], recipe: Recipe) -> Calibration:
    """A calibration of a traced graph by the largest values of its linears' inputs.

    Args:
        gm: the traced graph.
        scales: float32 [K] by module name. A tied weight may have any of its names; linears that have no entry must be ones
            that stay in float.
        recipe: as `settled` gives it.

    Raises:
        CalibrationError: if a linear that the recipe quantizes has no entry, or one of another size.
        RecipeError: if a pattern of the recipe names nothing, or an input with a static scale is rotated.
    """
    linears, nodes = find_linears(gm), nodes_by_name(gm)
    found = {l.name: _entries(gm, l, scales) for l in linears}
    wrong = {l.name: why for l in linears if (why := _misfit(l, found[l.name]))}
    largest: dict[tuple[str, str | None], Tensor] = {}
    for l in linears:
        for absmax in () if l.name in wrong else found[l.name]:
            largest[l.x, l.offsets] = torch.maximum(largest.get((l.x, l.offsets), absmax), absmax)
    stats: dict[tuple[str, str | None], InputStats] = {}
    for l in reversed(linears):  # what has no entry stays in float, for a reason of its own, or is an error below
        x = value(nodes[l.x])
        like = torch.empty(0, l.in_features, dtype=x.dtype, device=x.device)
        absmax = largest.get((l.x, l.offsets), torch.ones(l.in_features, dtype=torch.float32))
        stats.setdefault((l.x, l.offsets), InputStats.of_absmax(absmax, like, l.experts))
    calibration = Calibration({l.name: stats[l.x, l.offsets] for l in linears}, 0)
    floats = stay_float(gm, linears, calibration, recipe)
    quantized = [l for l in linears if l.name not in floats]
    if missing := [wrong[l.name] for l in quantized if l.name in wrong]:
        some = ", ".join(missing[:_NAMED]) + (", ..." if len(missing) > _NAMED else "")
        raise CalibrationError(
            f"act_scales do not fit {len(missing)} of the {len(quantized)} linears to be quantized ({some}): pass those of "
            "this model, or leave these linears in float with Recipe(skip=...)"
        )
    for l in quantized:
        own = recipe_of(gm, l, recipe)
        if own.activation == "per_tensor_static" and any(l.in_features % block == 0 for block in own.blocks):
            raise RecipeError(
                f"rotate={own.rotate!r} with a static scale for {l.name}: act_scales do not tell its largest rotated value. "
                "Pass rotate='none', activation='per_token', or calib_loader"
            )
    return calibration


def _entries(gm: fx.GraphModule, l: Linear, scales: Mapping[str, Tensor]) -> list[Tensor]:
    """What there is of a linear, under any name of its weight."""
    name = l.name.partition("#")[0]
    modules = dict.fromkeys(map(module_of, (name, *about(gm).aliases.get(name, ()))))
    return [scales[module] for module in modules if module in scales]


def _misfit(l: Linear, entries: list[Tensor]) -> str | None:
    """In words, why the entries of a linear are none for it; None where they are."""
    if not entries:
        return f"{module_of(l.name)} has no entry"
    other = [len(t) for t in entries if len(t) != l.in_features]
    return f"{module_of(l.name)} has one of {other[0]} channels and reads {l.in_features}" if other else None
