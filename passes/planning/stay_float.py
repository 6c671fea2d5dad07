"""stay_float: which linears stay in float, and why. Everything else is quantized. Analysis only.

    %h = embedding(%embed.weight, %ids)
    %a = linear(%h, %mlp.up.weight)
    %b = relu(%a)
    %c = linear(%b, %mlp.down.weight)
    %d = linear(%c, %rare.weight)
    %e = linear(%d, %still.weight)
    %logits = linear(%e, %head.weight)
->                                                  # by Recipe(skip=("mlp.up",), activation="per_tensor_static")
    %mlp.up.weight: skipped by the recipe ('mlp.up')
    %mlp.down.weight: quantized
    %rare.weight: no calibration token reached it
    %still.weight: its input was zero: no static scale can be chosen
    %head.weight: the projection back to the vocabulary, which Recipe(lm_head=True) quantizes
"""

from __future__ import annotations

from typing import Literal

from torch import fx

from sqcompile.errors import NothingToQuantizeError
from sqcompile.kernels import speedup
from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import Linear, aten, first_leaf, nodes_by_name, value
from sqcompile.passes.planning.adapters import find_adapters
from sqcompile.passes.planning.lm_head import is_lm_head
from sqcompile.passes.planning.overrides import check_patterns, names_linear, recipe_of
from sqcompile.passes.planning.routers import find_routers
from sqcompile.plan.entries import LayerPlan
from sqcompile.plan.recipe import LM_HEAD, Recipe
from sqcompile.statistics.observe import Calibration

ELSEWHERE = "another process's shard of it stays in float"


def stay_float(gm: fx.GraphModule, linears: list[Linear], calibration: Calibration, recipe: Recipe) -> dict[str, str]:
    """The reason for each linear of a traced graph that stays in float, by name.

    Raises:
        RecipeError: if the recipe skips or overrides a name that no linear has.
    """
    check_patterns(gm, linears, recipe)
    routers = find_routers(gm, linears)
    own = {l.name: recipe_of(gm, l, recipe) for l in linears}
    floats = {l.name: reason for l in linears if (reason := _reason(gm, l, routers, calibration, own[l.name]))}
    floats = find_adapters(gm, linears) | floats
    floats |= _slow(gm, [l for l in linears if l.name not in floats], own)
    there = about(gm).parallel.most([l.name in floats for l in linears])
    return {l.name: ELSEWHERE for l, so in zip(linears, there, strict=True) if so} | floats


def check_any(gm: fx.GraphModule, linears: list[Linear], floats: dict[str, str]) -> None:
    """Raises NothingToQuantizeError if all linears stay in float; the message gives the reasons."""
    if len(floats) == len(linears):
        raise NothingToQuantizeError(_nothing(gm, linears, floats))


def float_layer(l: Linear, reason: str) -> LayerPlan:
    """The plan of a linear that stays in float."""
    kind: Literal["linear", "experts"] = "experts" if l.experts else "linear"
    return LayerPlan(l.name, kind, False, "none", reason, shape=l.shape)


def _reason(gm: fx.GraphModule, l: Linear, routers: set[str], calibration: Calibration, recipe: Recipe) -> str | None:
    """Why a linear stays in float by its own recipe, or None."""
    if reason := _unasked(gm, l, routers, recipe):
        return reason
    if l.experts and recipe.dtype != "int8":
        return f"routed experts have no kernel in {recipe.dtype.upper()}"
    if l.name not in calibration.inputs:
        return "no calibration token reached it"
    unvarying = calibration.inputs[l.name].unvarying() if recipe.activation == "per_tensor_static" else None
    return f"its input was {unvarying}: no static scale can be chosen" if unvarying else None


def _unasked(gm: fx.GraphModule, l: Linear, routers: set[str], recipe: Recipe) -> str | None:
    """Why a linear stays in float by its own recipe, whatever the data; or None."""
    if l.node in routers:
        return "routes tokens to experts, and a rounding there would change the expert"
    for pattern in recipe.skip:
        if names_linear(gm, l, pattern):
            return f"skipped by the recipe ({pattern!r})"
    if l.out_features == 1:
        return "it has one output, which is a dot product and no GEMM"
    if not recipe.lm_head and (names_linear(gm, l, LM_HEAD) or is_lm_head(gm, l)):
        return "the projection back to the vocabulary, which Recipe(lm_head=True) quantizes"
    return None


def wanted(gm: fx.GraphModule, linears: list[Linear], recipe: Recipe) -> list[Linear]:
    """The linears that are to be quantized, if there is data for them."""
    routers = find_routers(gm, linears)
    return [l for l in linears if _unasked(gm, l, routers, recipe_of(gm, l, recipe)) is None]


def _slow(gm: fx.GraphModule, linears: list[Linear], own: dict[str, Recipe]) -> dict[str, str]:
    """Why linears stay in float whose INT8 GEMM is not fast enough; those that read one input become one GEMM."""
    nodes, slow = nodes_by_name(gm), {}
    for l in linears:
        if (least := own[l.name].min_speedup) == 0:
            continue
        weight, n = value(nodes[l.weight]), sum(o.out_features for o in linears if o.x == l.x)
        of = speedup.against(weight.device, weight.dtype)
        for rows in speedup.ROWS:
            factor = speedup.expected(weight.device, rows, n, l.in_features, of)
            if factor == 0:
                slow[l.name] = f"{weight.device.type} has no INT8 kernels here, which min_speedup={least} asks for"
            elif factor is not None and factor < least:
                slow[l.name] = f"INT8 is expected to be {factor:.2f}x of {of} with {rows} rows, less than {least}x"
    return slow


def _nothing(gm: fx.GraphModule, linears: list[Linear], floats: dict[str, str]) -> str:
    if not linears:
        for n in gm.graph.find_nodes(op="call_function", target=aten.linear.default):
            if value(n).dim() < 2:
                return (
                    f"nothing to quantize: {first_leaf(n.args[1])} is multiplied with one vector, without a batch dim: pass "
                    "batches, [batch, features] (x[None] of one sample)"
                )
        return "nothing to quantize: the captured graph has no linear with a weight of its own"
    reasons = ", ".join(f"{name}: {reason}" for name, reason in list(floats.items())[:4])
    return f"nothing to quantize: all {len(linears)} linears stay in float ({reasons}). Change the recipe's skip="
