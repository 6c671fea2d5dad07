"""shift: what is taken off linears' inputs goes into the norms' biases, and comes back by the linears' own.

    %n = layer_norm(%x, [4], %g, %b)
    %q = linear(%n, %w)
->
    %sub = sub(%b, %shift_0)                                # c
    %n = layer_norm(%x, [4], %g, %sub)
    %q = linear(%n, %w, %shift_0_constant)                  # W c

Where a graph has not the norm, or someone else reads it, c is taken off explicitly:

    %y = linear(%x, %w)
->
    %sub = sub(%x, %shift_0)                                # c/s, of an input that is divided by s already
    %y = linear(%sub, %w, %shift_0_constant)

W c is computed in float32, and what INT8 linears add is, too: it may be many times what is left of their product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.errors import PlanError
from sqcompile.passes.ir.graph import (
    FOLD_CAST,
    Linear,
    add_op,
    add_tensor,
    aten,
    evaluate,
    linear_operands,
    nodes_by_name,
    row_parts,
    value,
)
from sqcompile.passes.ir.rows import rows_of
from sqcompile.passes.labels.shiftable import Shiftable
from sqcompile.passes.rewrite.weight_store import Product, Shared

Group = tuple[str | None, list[Linear]]  # the node of the norm that takes c, if one does, and the linears


def groups_of(linears: Sequence[Linear], shifts: Mapping[str, Tensor], norms: Sequence[Shiftable]) -> list[Group]:
    """The shifted linears of a graph: those of each norm that can take their c, and then each of the others.

    Args:
        linears: of the graph.
        shifts: c by linear, float32 [K].
        norms: of the graph (`shiftable`).
    """
    left = {l.name: l for l in linears if l.name in shifts}
    found: list[Group] = []
    for norm in norms:
        mine = [left[l.name] for l in norm.linears if l.name in left]
        if len(mine) == len(norm.linears) and _one(mine, shifts):
            found.append((norm.norm, mine))
            left = {name: l for name, l in left.items() if l not in mine}
    return found + [(None, [l]) for l in left.values()]


def check_shifts(linears: Sequence[Linear], shifts: Mapping[str, Tensor]) -> None:
    """Raises PlanError if c of a linear is of another size than its channels."""
    for l in linears:
        if l.name in shifts and (l.experts or tuple(shifts[l.name].shape) != (l.in_features,)):
            raise PlanError(f"the plan shifts {l.name!r}, which has other channels in this model: calibrate this model")


def shift_biases(
    gm: fx.GraphModule, groups: Sequence[Group], shifts: Mapping[str, Tensor], shared: Shared | None = None
) -> None:
    """Subtracts c from the norms' biases, and adds W c to those of all shifted linears. In place, before anything is scaled.

    With ``shared``, the graphs of a model share W c: when the second one is made, W may be freed.
    """
    nodes = nodes_by_name(gm)
    for i, (norm, group) in enumerate(groups):
        users = [nodes[l.node] for l in group]
        c = _there(shifts, group[0], users[0])
        if norm is not None:
            _norm(gm, nodes[norm], c, f"shift_{i}")
        for user in users:
            _bias(gm, user, c, f"shift_{i}", shared)


def shift_inputs(
    gm: fx.GraphModule, groups: Sequence[Group], shifts: Mapping[str, Tensor], columns: Mapping[str, Tensor]
) -> None:
    """Subtracts c/s from inputs that no norm does it for. In place.

    ``columns``: s by linear, float32 [K], by which an input is divided already.
    """
    nodes = nodes_by_name(gm)
    # of one input: some may be divided by s, and some not
    alike: list[tuple[str, fx.Node, Tensor, list[fx.Node]]] = []
    for i, l in ((i, l) for i, (norm, group) in enumerate(groups) if norm is None for l in group):
        x, _, _ = linear_operands(nodes[l.node])
        c = _there(shifts, l, nodes[l.node])
        c = c / columns[l.name].to(c.device) if l.name in columns else c
        users = next((users for _, of, taken, users in alike if of is x and torch.equal(taken, c)), None)
        if users is None:
            alike.append((f"shift_{i}", x, c, users := []))
        users.append(nodes[l.node])
    for name, x, c, users in alike:
        with gm.graph.inserting_before(min(users)):
            less = add_op(gm, aten.sub.Tensor, before_cast(x), add_tensor(gm, name, c))
            less = fold_cast(gm, less, value(x).dtype)
        for user in users:
            user.update_arg(0, less)


def _there(shifts: Mapping[str, Tensor], l: Linear, user: fx.Node) -> Tensor:
    """c of a linear, where its input is."""
    return shifts[l.name].to(value(linear_operands(user)[0]).device)


def _one(linears: Sequence[Linear], shifts: Mapping[str, Tensor]) -> bool:
    """Whether all of some linears are shifted by one c."""
    first = shifts[linears[0].name]
    return all(shifts[l.name] is first or torch.equal(shifts[l.name], first) for l in linears)


def _norm(gm: fx.GraphModule, node: fx.Node, c: Tensor, name: str) -> None:
    """Subtracts c from a norm's bias; a norm without one gets one, and a weight, without which it is not fused."""
    give_weight(gm, node, name)
    args, dtype = [*node.args, *[None] * (4 - len(node.args))], value(node).dtype
    with gm.graph.inserting_before(node):
        if isinstance(args[3], fx.Node):
            _check_fits(evaluate(gm, args[3]) - c, dtype, node.name)
            args[3] = in_dtype(gm, aten.sub.Tensor, args[3], add_tensor(gm, name, c))
        else:
            _check_fits(-c, dtype, node.name)
            args[3] = add_tensor(gm, name, c.neg().to(dtype))
    node.args = tuple(args)


def give_weight(gm: fx.GraphModule, norm: fx.Node, name: str) -> None:
    """Gives a norm without a weight one, of ones."""
    args, like = list(norm.args), value(norm)
    if len(args) < 3 or args[2] is None:
        with gm.graph.inserting_before(norm):
            ones = torch.ones(like.shape[-1], dtype=like.dtype, device=like.device)
            args[2:3] = [add_tensor(gm, f"{name}_weight", ones)]
        norm.args = tuple(args)


def _bias(gm: fx.GraphModule, node: fx.Node, c: Tensor, name: str, shared: Shared | None) -> None:
    """Adds W c."""
    x, w, bias = linear_operands(node)
    make = partial(_product, gm, w, c)
    constant = (make() if shared is None else shared.get(gm, shared.product_key(gm, w, c), make)).values
    dtype = value(node).dtype
    _check_fits(constant if bias is None else evaluate(gm, bias) + constant, dtype, node.name)
    with gm.graph.inserting_before(node):
        new = add_tensor(gm, f"{name}_constant", constant, value(w).device)
        if bias is not None:
            new = add_op(gm, aten.add.Tensor, bias, new)
        node.args = (x, w, fold_cast(gm, new, dtype))


def _product(gm: fx.GraphModule, w: fx.Node, c: Tensor) -> Product:
    """W c, a few rows of W at a time."""
    rows, wide = rows_of(gm, w), torch.promote_types(value(w).dtype, torch.float32)
    parts = row_parts(torch.empty(value(w).shape, device="meta"))
    return Product(torch.cat([(part := rows(p)).to(wide) @ c.to(part.device, wide) for p in parts]))


def _check_fits(bias: Tensor, dtype: torch.dtype, node: str) -> None:
    if not bias.is_meta and bool((bias.isfinite() & ~bias.to(dtype).isfinite()).any()):
        raise PlanError(f"the plan's shifts take the bias of {node!r} out of {dtype}: calibrate this model")


def in_dtype(gm: fx.GraphModule, op: Callable[..., Any], old: fx.Node, by: fx.Node) -> fx.Node:
    """What an operator makes of a value and a float32 one, in the dtype of the first."""
    return fold_cast(gm, add_op(gm, op, old, by), value(old).dtype)


def fold_cast(gm: fx.GraphModule, new: fx.Node, dtype: torch.dtype) -> fx.Node:
    """A value in a dtype, where it has another; whoever needs float32 looks through the cast."""
    if value(new).dtype != dtype:
        new = add_op(gm, aten.to.dtype, new, dtype)
        new.meta[FOLD_CAST] = True
    return new


def before_cast(x: fx.Node) -> fx.Node:
    """What was cast by `fold_cast`, in float32; else the value itself."""
    return x.all_input_nodes[0] if x.meta.get(FOLD_CAST) else x
