"""shift: what is taken off linears' inputs goes into the norms' biases, and comes back by the linears' own.

    %n = layer_norm(%x, [4], %g, %b)
    %q = linear(%n, %w)
->
    %sub = sub(%b, %shift_0)                                # c
    %n = layer_norm(%x, [4], %g, %sub)
    %mv = mv(%w, %shift_0_2)
    %q = linear(%n, %w, %mv)

Where a graph has not the norm, or someone else reads it, c is taken off explicitly:

    %y = linear(%x, %w)
->
    %sub = sub(%x, %shift_0)
    %mv = mv(%w, %shift_0_2)
    %y = linear(%sub, %w, %mv)

W c is computed in float32, and what INT8 linears add is, too: it may be many times what is left of their product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    linear_operands,
    nodes_by_name,
    value,
)
from sqcompile.passes.labels.shiftable import Shiftable

Group = tuple[str | None, list[Linear]]  # the node of the norm that takes c, if one does, and the linears


def groups_of(linears: Sequence[Linear], shifts: Mapping[str, Tensor], norms: Sequence[Shiftable]) -> list[Group]:
    """The shifted linears of a graph: those of each norm that can take their c, and then those that read one tensor.

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
    readers: dict[tuple[str, int], list[Linear]] = {}
    for l in left.values():
        first = next((k for k, same in readers.items() if k[0] == l.x and _one([*same, l], shifts)), None)
        readers.setdefault(first or (l.x, len(readers)), []).append(l)
    return found + [(None, same) for same in readers.values()]


def check_shifts(linears: Sequence[Linear], shifts: Mapping[str, Tensor]) -> None:
    """Raises PlanError if c of a linear is of another size than its channels."""
    for l in linears:
        if l.name in shifts and (l.experts or tuple(shifts[l.name].shape) != (l.in_features,)):
            raise PlanError(f"the plan shifts {l.name!r}, which has other channels in this model: calibrate this model")


def shift_biases(gm: fx.GraphModule, groups: Sequence[Group], shifts: Mapping[str, Tensor]) -> None:
    """Subtracts c from the norms' biases, and adds W c to those of all shifted linears. In place, before anything is scaled."""
    nodes = nodes_by_name(gm)
    for i, (norm, group) in enumerate(groups):
        users = [nodes[l.node] for l in group]
        c = _there(shifts, group[0], users[0])
        if norm is not None:
            _norm(gm, nodes[norm], c, f"shift_{i}")
        for user in users:
            _bias(gm, user, c, f"shift_{i}")


def shift_inputs(
    gm: fx.GraphModule, groups: Sequence[Group], shifts: Mapping[str, Tensor], columns: Mapping[str, Tensor]
) -> None:
    """Subtracts c/s from inputs that no norm does it for. In place.

    ``columns``: s by linear, float32 [K], by which an input is divided already.
    """
    nodes = nodes_by_name(gm)
    for i, (norm, group) in enumerate(groups):
        made: list[tuple[fx.Node, Tensor, fx.Node]] = []
        for l in group if norm is None else []:
            user = nodes[l.node]
            x, _, _ = linear_operands(user)
            c = _there(shifts, l, user)
            c = c / columns[l.name].to(c.device) if l.name in columns else c
            less = next((n for of, taken, n in made if of is x and torch.equal(taken, c)), None)
            if less is None:
                with gm.graph.inserting_before(min(nodes[l.node] for l in group)):
                    source: Any = x.args[0] if x.meta.get(FOLD_CAST) else x
                    less = add_op(gm, aten.sub.Tensor, source, add_tensor(gm, f"shift_{i}", c))
                    less = fold_cast(gm, less, value(x).dtype)
                made.append((x, c, less))
            user.update_arg(0, less)


def _there(shifts: Mapping[str, Tensor], l: Linear, user: fx.Node) -> Tensor:
    """c of a linear, where its input is."""
    return shifts[l.name].to(value(linear_operands(user)[0]).device)


def _one(linears: Sequence[Linear], shifts: Mapping[str, Tensor]) -> bool:
    """Whether all of some linears are shifted by one c."""
    first = shifts[linears[0].name]
    return all(shifts[l.name] is first or torch.equal(shifts[l.name], first) for l in linears)


def _norm(gm: fx.GraphModule, node: fx.Node, c: Tensor, name: str) -> None:
    args = [*node.args, *[None] * (4 - len(node.args))]
    before = args[3]
    with gm.graph.inserting_before(node):
        if isinstance(before, fx.Node):
            after = in_dtype(gm, aten.sub.Tensor, before, add_tensor(gm, name, c))
        else:
            after = add_tensor(gm, name, c.neg().to(value(node).dtype))
    node.args = tuple([*args[:3], after, *args[4:]])


def _bias(gm: fx.GraphModule, node: fx.Node, c: Tensor, name: str) -> None:
    x, w, bias = linear_operands(node)
    dtype = value(node).dtype
    with gm.graph.inserting_before(node):
        matrix = w if value(w).dtype == torch.float32 else add_op(gm, aten.to.dtype, w, torch.float32)
        constant = add_op(gm, aten.mv.default, matrix, add_tensor(gm, name, c))
        if bias is not None:
            constant = add_op(gm, aten.add.Tensor, bias, constant)
        node.args = (x, w, fold_cast(gm, constant, dtype))


def in_dtype(gm: fx.GraphModule, op: Callable[..., Any], old: fx.Node, by: fx.Node) -> fx.Node:
    """What an operator makes of a value and a float32 one, in the dtype of the first."""
    return fold_cast(gm, add_op(gm, op, old, by), value(old).dtype)


def fold_cast(gm: fx.GraphModule, new: fx.Node, dtype: torch.dtype) -> fx.Node:
    """A value in a dtype, where it has another; whoever needs float32 looks through the cast."""
    if value(new).dtype != dtype:
        new = add_op(gm, aten.to.dtype, new, dtype)
        new.meta[FOLD_CAST] = True
    return new
