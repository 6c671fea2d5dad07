"""routers: the linears whose output decides, by a discrete choice, which data is used. They stay in float. Analysis only.

    %l = linear(%x, %router)
    %p = softmax(%l, -1)
    %top = topk(%p, 2)
    %i = getitem(%top, 1)                           # a choice: integers or a mask, made of numbers by comparing them
    %one = one_hot(%i, 8)
    %m = sum(%one, [-2])
    %e = linear(%x, %experts)
    %y = mul(%m, %e)                                # data that the router does not make, selected by the choice
->
    router: %l

A rounding in a router changes the choice, and with it everything for that token; anywhere else it is a rounding. So a
linear is a router if it is the nearest above a choice, and the choice reaches data of another origin: as a factor or a
mask, as rows that are picked, as offsets of experts. What is not one: the argmax of logits that is returned, or that
nothing but logits meet; activations that are spelled with a mask, ``x * (x > 0)``; gates without a choice (softmax,
sigmoid, hard sigmoid, relu), whose sum over all experts is continuous. A codebook's nearest row is a choice that picks a
parameter's rows.
"""

from __future__ import annotations

import heapq
import operator
from typing import Any

from torch import Tensor, fx

from sqcompile.passes.ir.graph import Linear, above, aten, constants, nodes_by_name, value
from sqcompile.passes.ir.operators import LAYOUT, SHAPE_ONLY, WHOLE, Fact, having, named
from sqcompile.passes.labels.rules import behind

# Choices by position: which element, or how many. The second result where there are two.
_PICKS = named("picks")
_COMPARES = having(Fact.COMPARES)  # choices by comparison, element by element
_INDEXED = having(Fact.INDEXED)  # what picks rows of its first argument by others
_SELECTS = having(Fact.SELECTS)  # where a choice meets data: as indices, as a factor, as a mask or as offsets


def find_routers(gm: fx.GraphModule, linears: list[Linear]) -> set[str]:
    """The nodes of the linears that are routers."""
    return _Search(gm, linears).run() | _above_offsets(gm, linears)


def _above_offsets(gm: fx.GraphModule, linears: list[Linear]) -> set[str]:
    """Nodes of the linears whose output decides which expert a row goes to: the nearest above experts' offsets.

    What the experts' own rows are made of is not searched: a router without a linear reads them, too.
    """
    nodes, by_node = nodes_by_name(gm), {l.node for l in linears}
    routers: set[str] = set()
    for l in linears:
        if not l.offsets:
            continue
        seen = above(behind(nodes[l.x], LAYOUT))  # the tensor whose rows are picked
        todo = [nodes[l.offsets]]
        while todo:  # at once over for an expert's second matrix, whose rows come from the first by the same offsets
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            if node.name in by_node:
                routers.add(node.name)
            else:
                todo.extend(node.all_input_nodes)
    return routers


class _Search:
    def __init__(self, gm: fx.GraphModule, linears: list[Linear]) -> None:
        self.gm, self.const = gm, constants(gm)
        self.linears = {l.node for l in linears}
        self.order = {n: i for i, n in enumerate(gm.graph.nodes)}
        self.nothing: set[fx.Node] = set()  # no data of the model: constants, sizes, and tensors made of them
        for n in gm.graph.nodes:
            made = n.op == "call_function" and all(a in self.nothing for a in n.all_input_nodes)
            if n in self.const or made or n.target in SHAPE_ONLY or not isinstance(value(n), (Tensor, tuple, list)):
                self.nothing.add(n)

    def run(self) -> set[str]:
        routers: set[fx.Node] = set()
        for n in self.gm.graph.nodes:
            if n.op == "call_function" and n not in self.nothing and self._chooses(n):
                found = self._nearest(n)
                if found - routers and self._selects(n, found):
                    routers |= found
        return {n.name for n in routers}

    def _chooses(self, n: fx.Node) -> bool:
        if n.target is operator.getitem:
            source = n.args[0]
            return isinstance(source, fx.Node) and bool(n.args[1]) and _PICKS.get(source.target) == n.args[1]
        if n.target in _PICKS:
            return bool(_PICKS[n.target] == WHOLE)
        if n.target in _COMPARES:
            return any(_is_float(a) and a not in self.const for a in n.all_input_nodes)
        casts = n.target in (aten.to.dtype, aten._to_copy.default)
        return casts and not _is_float(n) and any(_is_float(a) and a not in self.const for a in n.all_input_nodes)

    def _nearest(self, choice: fx.Node) -> set[fx.Node]:
        """The nearest linears above a choice; none beyond a stream, which other linears read as it is."""
        found: set[fx.Node] = set()
        seen: set[fx.Node] = set()
        todo, over = list(choice.all_input_nodes), above(choice)
        while todo:
            node = todo.pop()
            if node in seen or node in self.nothing:
                continue
            seen.add(node)
            if node.name in self.linears:
                found.add(node)
            elif not self._is_stream(node, over):
                todo.extend(node.all_input_nodes)
        return found

    def _is_stream(self, node: fx.Node, over: set[fx.Node]) -> bool:
        """Whether a linear that has no part in the choice reads what is made of a node alone: its norm, rows picked of it."""
        if not _is_float(node):
            return False
        alone, chosen = {node}, set[fx.Node]()
        todo = [(self.order[u], u) for u in node.users]
        heapq.heapify(todo)
        while todo:
            _, n = heapq.heappop(todo)
            if n in alone or n in chosen or n.op != "call_function" or not self._all_in(n, alone | chosen):
                continue
            if n.name in self.linears:
                if n.args[0] in alone and n not in over:
                    return True
                continue
            (chosen if self._chooses(n) or alone.isdisjoint(n.all_input_nodes) else alone).add(n)
            for u in n.users:
                heapq.heappush(todo, (self.order[u], u))
        return False

    def _all_in(self, node: fx.Node, own: set[fx.Node]) -> bool:
        return all(a in own or a in self.nothing for a in node.all_input_nodes)

    def _selects(self, choice: fx.Node, routers: set[fx.Node]) -> bool:
        """Whether a choice reaches data that its routers have not made, or picks rows of a parameter."""
        own, chosen = routers | {choice}, {choice}  # made by the routers alone; and of that, what depends on the choice
        todo = [(self.order[u], u) for n in own for u in n.users]
        heapq.heapify(todo)
        while todo:
            _, n = heapq.heappop(todo)
            if n in own or n.op != "call_function" or n.name in self.linears:
                continue
            touched, alone = not chosen.isdisjoint(n.all_input_nodes), self._all_in(n, own)
            table = n.args[0] if n.target in _INDEXED else None
            if touched and isinstance(table, fx.Node) and table in self.const and _is_float(table):
                return True
            if touched and not alone and n.target in _SELECTS:
                return True
            if not alone and (_is_float(n) or not touched):
                continue
            own.add(n)  # also a mask or indices that a choice and something else make together
            if touched and not self._is_activation(n, choice):
                chosen.add(n)
            for u in n.users:
                heapq.heappush(todo, (self.order[u], u))
        return False

    def _is_activation(self, n: fx.Node, choice: fx.Node) -> bool:
        """Whether a comparison only makes an activation of what it compares: x · (x > 0), where(x > c, f(x), g(x))."""
        if choice.target not in _COMPARES:
            return False
        compared = choice.args[0]
        other = choice.args[1] if len(choice.args) > 1 else 0  # sign compares with zero
        parts = [_uncast(a) for a in n.args if isinstance(a, fx.Node)]
        if n.target == aten.mul.Tensor and other == 0 and choice in parts:
            return any(p is not choice for p in parts)
        if isinstance(other, fx.Node) and other not in self.const:
            return False
        values: list[Any] = []
        if n.target in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar):
            values = list(n.args[1:])
        elif n.target == aten.masked_fill.Scalar:
            values = [n.args[0], n.args[2]]
        if not values:
            return False
        data = [v for v in values if isinstance(v, fx.Node) and v not in self.nothing]
        rest = [v for v in values if v not in data]
        return len(data) == 2 or (len(data) == 1 and data[0] is compared and rest == [other])


def _uncast(node: fx.Node) -> fx.Node:
    return behind(node, {aten.to.dtype, aten._to_copy.default, aten.type_as.default})


def _is_float(node: fx.Node) -> bool:
    v: Any = value(node)
    return isinstance(v, Tensor) and v.dtype.is_floating_point
