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

import fnmatch
from typing import Literal

import torch
from torch import fx

from sqcompile.errors import NothingToQuantizeError, RecipeError
from sqcompile.kernels import speedup
from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import Linear, aten, find_linears, first_leaf, nodes_by_name, value
from sqcompile.passes.ir.operators import LAYOUT, Fact, having
from sqcompile.passes.planning.adapters import find_adapters
from sqcompile.passes.planning.routers import find_routers
from sqcompile.plan.entries import LayerPlan
from sqcompile.plan.recipe import LM_HEAD, Recipe
from sqcompile.statistics.observe import Calibration

# Ids are still ids afterwards, in another dtype or some of them replaced.
_EDITS = having(Fact.COPY, Fact.CAST, Fact.MOVE, Fact.PATCH)


def stay_float(gm: fx.GraphModule, linears: list[Linear], calibration: Calibration, recipe: Recipe) -> dict[str, str]:
    """The reason for each linear of a traced graph that stays in float, by name.

    Raises:
        RecipeError: if the recipe skips a name that no linear has.
    """
    _check_skip(gm, linears, recipe)
    routers = find_routers(gm, linears)
    floats = {l.name: reason for l in linears if (reason := _reason(gm, l, routers, calibration, recipe))}
    floats = find_adapters(gm, linears) | floats
    return floats | _slow(gm, [l for l in linears if l.name not in floats], recipe.min_speedup)


def check_any(gm: fx.GraphModule, linears: list[Linear], floats: dict[str, str]) -> None:
    """Raises NothingToQuantizeError if all linears stay in float; the message gives the reasons."""
    if len(floats) == len(linears):
        raise NothingToQuantizeError(_nothing(gm, linears, floats))


def float_layer(l: Linear, reason: str) -> LayerPlan:
    """The plan of a linear that stays in float."""
    kind: Literal["linear", "experts"] = "experts" if l.experts else "linear"
    return LayerPlan(l.name, kind, False, "none", reason, shape=l.shape)


def _reason(gm: fx.GraphModule, l: Linear, routers: set[str], calibration: Calibration, recipe: Recipe) -> str | None:
    """Why a linear stays in float, or None."""
    if reason := _unasked(gm, l, routers, recipe):
        return reason
    if l.experts and recipe.dtype != "int8":
        return f"routed experts have no kernel in {recipe.dtype.upper()}"
    if l.name not in calibration.inputs:
        return "no calibration token reached it"
    unvarying = calibration.inputs[l.name].unvarying() if recipe.activation == "per_tensor_static" else None
    return f"its input was {unvarying}: no static scale can be chosen" if unvarying else None


def _unasked(gm: fx.GraphModule, l: Linear, routers: set[str], recipe: Recipe) -> str | None:
    """Why a linear stays in float whatever the data, or None."""
    if l.node in routers:
        return "routes tokens to experts, and a rounding there would change the expert"
    for pattern in recipe.skip:
        if names_linear(gm, l, pattern):
            return f"skipped by the recipe ({pattern!r})"
    if not recipe.lm_head and (names_linear(gm, l, LM_HEAD) or _is_lm_head(gm, l)):
        return "the projection back to the vocabulary, which Recipe(lm_head=True) quantizes"
    return None


def wanted(gm: fx.GraphModule, linears: list[Linear], recipe: Recipe) -> list[Linear]:
    """The linears that are to be quantized, if there is data for them."""
    routers = find_routers(gm, linears)
    return [l for l in linears if _unasked(gm, l, routers, recipe) is None]


def _slow(gm: fx.GraphModule, linears: list[Linear], least: float) -> dict[str, str]:
    """Why linears stay in float whose INT8 GEMM is not fast enough; those that read one input become one GEMM."""
    nodes, slow = nodes_by_name(gm), {}
    for l in linears if least > 0 else ():
        device, n = value(nodes[l.weight]).device, sum(o.out_features for o in linears if o.x == l.x)
        for rows in speedup.ROWS:
            factor = speedup.expected(device, rows, n, l.in_features)
            if factor is not None and factor < least:
                slow[l.name] = f"INT8 is expected to be {factor:.2f}x of bf16 with {rows} rows, less than {least}x"
    return slow


def names_linear(gm: fx.GraphModule, l: Linear, pattern: str) -> bool:
    """Whether a pattern names a linear: its module or its weight, by any of the names of a tied weight."""
    for name in about(gm).aliases.get(l.name.partition("#")[0], (l.name,)):
        module = name.rpartition(".")[0] or name
        if fnmatch.fnmatch(module, pattern) or names(pattern, name):
            return True
    return False


def names(pattern: str, name: str) -> bool:
    """Whether a pattern of ``Recipe.skip`` names something: as a glob, or as dotted parts of its name."""
    return fnmatch.fnmatch(name, pattern) or f".{pattern}." in f".{name}."


def _check_skip(gm: fx.GraphModule, linears: list[Linear], recipe: Recipe) -> None:
    for pattern in recipe.skip:
        if pattern != LM_HEAD and not any(names_linear(gm, l, pattern) for l in linears):
            names = ", ".join(l.name for l in linears[:4])
            raise RecipeError(f"skip={pattern!r} names no linear of this model; its linears are {names}, ...")


def _is_lm_head(gm: fx.GraphModule, l: Linear) -> bool:
    """Whether a linear has the shape of a token embedding and no other linear reads what it makes."""
    embeddings = gm.graph.find_nodes(op="call_function", target=aten.embedding.default)
    if not any(_rows(n) == l.shape[0] and value(n).shape[-1] == l.shape[1] and _is_vocabulary(n) for n in embeddings):
        return False
    others = {k.node for k in find_linears(gm)} - {l.node}
    todo, seen = [nodes_by_name(gm)[l.node]], set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name in others:
            return False
        todo.extend(node.users)
    return True


def _is_vocabulary(embedding: fx.Node) -> bool:
    """Whether an embedding is that of the model's tokens: types of tokens are added to it, and have the smaller table."""
    if not _is_input(embedding.args[1]):  # type: ignore[arg-type]
        return False
    top = embedding
    while added := next((u for u in top.users if u.target == aten.add.Tensor), None):
        top = added
    todo, found = [top], []
    while todo:
        node = todo.pop()
        found += [node] if node.target == aten.embedding.default and _is_input(node.args[1]) else []  # type: ignore[arg-type]
        todo += node.all_input_nodes if node.target == aten.add.Tensor else []
    return all(_rows(n) <= _rows(embedding) for n in found)


def _rows(embedding: fx.Node) -> int:
    return int(value(embedding.args[0]).shape[0])  # type: ignore[arg-type]


def _is_input(node: fx.Node) -> bool:
    """Whether a node is an input of the model, edited or not: token ids, not positions, which a model counts itself."""
    todo = [node]
    while todo:
        node = todo.pop()
        if node.op == "placeholder":
            return True
        if node.target in LAYOUT:
            todo += node.args[:1]  # type: ignore[arg-type]
        elif node.target in _EDITS:
            todo += [a for a in node.all_input_nodes if getattr(value(a), "dtype", torch.bool) != torch.bool]
    return False


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
