"""adapters: low-rank adapters (LoRA and its kind) beside linears, found by what they compute.

    %y = linear(%x, %w)                             # [12, 16]
    %down = linear(%x, %lora.A)                     # [2, 16]: a rank much smaller than both
    %up = linear(%down, %lora.B)                    # [12, 2]
    %scaled = mul(%up, 2)
    %z = add(%y, %scaled)
->
    %lora.A: low-rank adapter of w (rank 2): small, and swapped at run time
    %lora.B: low-rank adapter of w (rank 2): small, and swapped at run time

They are small, and swapped while the model runs: in float they cost little, and are never out of date.
"""

from __future__ import annotations

from torch import fx

from sqcompile.passes.ir.graph import Linear, nodes_by_name
from sqcompile.passes.ir.operators import Fact, having
from sqcompile.passes.planning.uses import first_use

_RANK = 4  # times smaller than the linear's sizes, at least
_SAME = having(Fact.LAYOUT, Fact.COPY, Fact.CAST, Fact.MOVE, Fact.DROPOUT)
_SCALES, _SUMS = having(Fact.MULTIPLE), having(Fact.SUM)


def find_adapters(gm: fx.GraphModule, linears: list[Linear]) -> dict[str, str]:
    """The reason to stay in float for each linear of a low-rank adapter, by name."""
    nodes, const = nodes_by_name(gm), _without_input(gm)
    by_node = {nodes[l.node]: l for l in linears}
    found: dict[str, str] = {}
    for down in linears:
        up = _only_reader(nodes[down.node], by_node, const)
        if up is None or _RANK * down.out_features > min(down.in_features, up.out_features):
            continue
        base = _beside(nodes[up.node], by_node, const, (up.out_features, down.in_features), _source(nodes[down.x]))
        if base is not None:
            reason = f"low-rank adapter of {base.name} (rank {down.out_features}): small, and swapped at run time"
            found[down.name] = found[up.name] = reason
    weights = {first_use(name): reason for name, reason in found.items()}  # DoRA multiplies them with each other, too
    return {l.name: weights[first_use(l.name)] for l in linears if first_use(l.name) in weights}


def _without_input(gm: fx.GraphModule) -> set[fx.Node]:
    """What depends on no input of the graph."""
    found: set[fx.Node] = set()
    for n in gm.graph.nodes:
        if n.op in ("get_attr", "call_function") and found.issuperset(n.all_input_nodes):
            found.add(n)
    return found


def _passes(node: fx.Node, const: set[fx.Node]) -> fx.Node | None:
    """What a node is a copy or a multiple of, by what does not depend on the input; None for any other."""
    if node.target in _SAME:
        return node.all_input_nodes[0]
    if node.target in _SCALES:
        data = [n for n in node.all_input_nodes if n not in const]
        divides = "div" in str(node.target) and data[:1] != [node.args[0]]
        return data[0] if len(data) == 1 and not divides else None
    return None


def _only_reader(node: fx.Node, by_node: dict[fx.Node, Linear], const: set[fx.Node]) -> Linear | None:
    """The linear that alone reads a node, or copies and multiples of it."""
    while len(node.users) == 1:
        [user] = node.users
        if user in by_node:
            return by_node[user] if user.args[0] is node else None
        if _passes(user, const) is not node:
            return None
        node = user
    return None


def _source(node: fx.Node) -> fx.Node:
    """The tensor that a node is a copy of."""
    while node.target in _SAME:
        node = node.all_input_nodes[0]
    return node


def _beside(
    node: fx.Node, by_node: dict[fx.Node, Linear], const: set[fx.Node], shape: tuple[int, int], source: fx.Node
) -> Linear | None:
    """The linear of this shape and input that a node is added to, once multiplied; other adapters may be added, too."""
    while len(node.users) == 1:
        [user] = node.users
        if user.target in _SUMS:
            for leaf in _terms(user, const):
                l = by_node.get(leaf)
                if l is not None and l.shape == shape and _source(leaf.args[0]) is source:  # type: ignore[arg-type]
                    return l
        elif _passes(user, const) is not node:
            return None
        node = user
    return None


def _terms(node: fx.Node, const: set[fx.Node]) -> list[fx.Node]:
    """What a sum is made of, behind copies and multiples."""
    todo, leaves = [node], []
    while todo:
        n = todo.pop()
        inner = _passes(n, const)
        if n.target in _SUMS:
            todo += n.all_input_nodes
        elif inner is not None:
            todo.append(inner)
        else:
            leaves.append(n)
    return leaves
