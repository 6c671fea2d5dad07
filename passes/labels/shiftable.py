"""shiftable: norms that can give every linear which reads them x - c in the place of x. Analysis only.

    %n = layer_norm(%x, [4], %g, %b)
    %q = linear(%n, %wq)
    %r = reshape(%n, [-1, 4])
    %k = linear(%r, %wk)
->
    %n: wq, wk                      # b - c is the norm's bias then, and W c is added to what each linear gives

A scale passes where values are multiplied by it. c passes only where values are moved: nobody but linears may read the norm,
whose channels must come in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from sqcompile.passes.ir.graph import Linear, aten, nodes_by_name
from sqcompile.passes.ir.operators import Fact, having
from sqcompile.passes.labels.match import Site

_PASSES = having(Fact.LAYOUT, Fact.COPY, Fact.CAST)  # of one operand: others would come beside it


@dataclass(frozen=True)
class Shiftable:
    """A norm and the linears that read it.

    Attributes:
        norm: name of its node, a layer_norm of the last dim.
        linears: all that read it, each with all its channels in their order.
    """

    norm: str
    linears: tuple[Linear, ...]


def shiftable(gm: fx.GraphModule, sites: Sequence[Site]) -> list[Shiftable]:
    """The norms of a graph whose bias can take c.

    Args:
        gm: a traced graph, or a copy of it with the same node names.
        sites: what `match` found in it.
    """
    nodes, found = nodes_by_name(gm), list[Shiftable]()
    for site in sites:
        norm, linears = nodes[site.producer], tuple(l for l, _ in site.balance)
        plain = site.kind == "norm" and norm.target == aten.layer_norm.default
        in_order = all(torch.equal(m, torch.arange(site.channels)) and not l.experts for l, m in site.balance)
        if plain and in_order and _read_by(norm) == {l.node for l in linears}:
            found.append(Shiftable(norm.name, linears))
    return found


def _read_by(norm: fx.Node) -> set[str] | None:
    """The linears that read a norm's values as they are; None if anything else does."""
    found, todo = set(), [norm]
    while todo:
        x = todo.pop()
        for user in x.users:
            if user.target == aten.linear.default and user.args[0] is x and x not in user.args[1:]:
                found.add(user.name)
            elif user.target in _PASSES and user.all_input_nodes == [x]:
                todo.append(user)
            else:
                return None
    return found
