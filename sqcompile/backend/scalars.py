"""scalars: Python floats that Dynamo made inputs of a graph, because they change between calls or with ``dynamic=True``.

    %y = mul(%x, %scale)                    # scale: a symbolic float
->
    %y = mul(%x, %scale)                    # scale: float64 [], as Dynamo hands it over

A float that arithmetic takes stays an input. Any other, such as the eps of a norm or a bound of clamp, becomes a constant of the
graph, and Dynamo compiles again for another value.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import above, add_op, aten, value

# on numbers, and the same on tensors of no dimension
_NUMBERS: dict[Any, Any] = {
    operator.add: aten.add.Tensor,
    operator.sub: aten.sub.Tensor,
    operator.mul: aten.mul.Tensor,
    operator.truediv: aten.div.Tensor,
    operator.neg: aten.neg.default,
}
_TENSORS = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
_ROOTS = (aten.rsqrt.default, aten.sqrt.default, aten.pow.Tensor_Scalar)


def take_floats(graph: fx.Graph, fakes: list[Any]) -> list[Any]:
    """Has a graph of Dynamo take its floats as such, not as tensors that it reads them from. Changes it in place.

    Args:
        graph: of Dynamo.
        fakes: what its placeholders hold.

    Returns:
        What they hold now: a symbolic float each instead of float64 [].
    """
    taken = list(fakes)
    for i, node in enumerate(graph.find_nodes(op="placeholder")):
        reads = [u for u in node.users if u.op == "call_method" and u.target == "item"]
        held = [u.meta.get("example_value") for u in reads]
        if held and len(reads) == len(node.users) and all(isinstance(h, torch.SymFloat) for h in held):
            taken[i] = held[0]
            for u in reads:
                u.replace_all_uses_with(node)
                graph.erase_node(u)
    return taken


def tensors_of_floats(gm: fx.GraphModule) -> None:
    """Has a graph of ATen operators take float64 [] again for each symbolic float that it takes. Changes it in place."""
    floats = [n for n in gm.graph.find_nodes(op="placeholder") if isinstance(value(n), torch.SymFloat)]
    if not floats:
        return
    made = set(floats)  # of them and of numbers
    fixed: set[fx.Node] = set()
    for n in gm.graph.nodes:
        if not made.isdisjoint(n.all_input_nodes):
            if isinstance(value(n), torch.SymFloat):
                made.add(n)
            if not _takes_tensors(n, made):
                fixed |= above(n) & set(floats)
    known: dict[fx.Node, float] = {n: float(value(n)) for n in floats if n in fixed}  # Dynamo guards what is asked for
    tensors: dict[fx.Node, fx.Node] = {n: n for n in floats if n not in fixed}
    with about(gm).fake_mode:
        for n in floats:
            n.meta["val"] = torch.empty((), dtype=torch.float64)
    for n in [n for n in gm.graph.nodes if not made.isdisjoint(n.all_input_nodes)]:
        if n in made and all(a in known for a in n.all_input_nodes):
            args, kwargs = fx.node.map_arg((n.args, n.kwargs), known.__getitem__)
            known[n] = n.target(*args, **kwargs)
            continue
        n.args, n.kwargs = fx.node.map_arg((n.args, n.kwargs), lambda a: tensors.get(a, known.get(a, a)))
        if n in made and not tensors.keys().isdisjoint(n.all_input_nodes):
            with gm.graph.inserting_before(n):
                tensors[n] = add_op(gm, _NUMBERS[n.target], *(_tensor(gm, a) for a in n.args))
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _tensor(gm: fx.GraphModule, a: Any) -> fx.Node:
    return a if isinstance(a, fx.Node) else add_op(gm, aten.scalar_tensor.default, a, dtype=torch.float64)


def _takes_tensors(user: fx.Node, made: set[fx.Node]) -> bool:
    """Whether a node that reads symbolic floats can read tensors in their place, and give the same."""
    others = [a for a in user.all_input_nodes if a not in made]
    if user in made:
        return user.target in _NUMBERS and not others and not user.kwargs
    if user.target not in _TENSORS or user.kwargs:
        return False
    tensors = [value(a) for a in others if isinstance(value(a), Tensor)]
    if len(tensors) < len(others) or any(not t.dtype.is_floating_point or t.dim() == 0 for t in tensors):
        return False  # a number makes float32 of integers and keeps that of one value, a tensor of float64 does not
    # an epsilon: norms are known by theirs
    return user.target != aten.add.Tensor or all(u.target not in _ROOTS for u in user.users)
