"""layout: where the boxes of a drawing stand, layer by layer from top to bottom.

Ranks by longest path; an edge over several ranks gets a point of its own in each, which takes a place beside the
boxes like a box, so that no edge crosses one; few crossings by barycenters; then straight lines by least squares.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import networkx as nx

GAP_X, GAP_Y, MARGIN = 22.0, 30.0, 28.0
BLOCK_TITLE = 20.0  # room above the first rank of a block
_SWEEPS = 12


@dataclass(frozen=True)
class Layout:
    """Places in pixels.

    Attributes:
        boxes: (x, y) of the middle of each node of the graph.
        routes: for each edge the points (x, top, bottom) it passes in the ranks between its ends.
        rows: (top, bottom) of the rank each node of the graph stands in.
        size: (width, height) of all.
        ranks: the graph's nodes from top to bottom, each rank from left to right.
    """

    boxes: dict[Hashable, tuple[float, float]]
    routes: dict[tuple[Hashable, Hashable], list[tuple[float, float, float]]]
    rows: dict[Hashable, tuple[float, float]]
    size: tuple[float, float]
    ranks: list[list[Hashable]]


def layout(g: nx.DiGraph) -> Layout:
    """Places every node.

    Args:
        g: acyclic; nodes have ``width`` and ``height`` in pixels, and ``block``, the repeated block they belong to.
    """
    rank = _ranks(g)
    points = _with_points(g, rank)
    layers = _order(points)
    x = _columns(points, layers)
    top, middle, rows, titled = MARGIN, {}, [], {""}
    for layer in layers:
        blocks = {g.nodes[n]["block"] for n in layer if n in g}
        top += 0 if blocks <= titled else BLOCK_TITLE
        titled |= blocks
        height = max(points.nodes[n]["height"] for n in layer)
        rows.append((top, top + height))
        middle.update({n: (x[n], top + height / 2) for n in layer if n in g})
        top += height + GAP_Y
    routes = {}
    for u, v in g.edges:
        ranks = range(rank[u] + 1, rank[v])
        routes[u, v] = [(x[u, v, r], *rows[r]) for r in ranks]
    width = max(x[n] + points.nodes[n]["width"] / 2 for n in points) + MARGIN
    row = {n: rows[rank[n]] for n in g}
    return Layout(
        middle, routes, row, (width, top - GAP_Y + MARGIN), [[n for n in layer if n in g] for layer in layers]
    )


def _ranks(g: nx.DiGraph) -> dict[Hashable, int]:
    """The longest path to each node; a node of a block whose inputs come from elsewhere moves down to the block."""
    rank = {n: i for i, generation in enumerate(nx.topological_generations(g)) for n in generation}
    for n in reversed(list(nx.topological_sort(g))):
        block = g.nodes[n]["block"]
        own = any(g.nodes[p]["block"] == block for p in g.pred[n])
        next_in_block = any(g.nodes[s]["block"] == block for s in g.succ[n])
        if g.succ[n] and (not g.pred[n] or (block and next_in_block and not own)):
            rank[n] = min(rank[s] for s in g.succ[n]) - 1
    used = {r: i for i, r in enumerate(sorted(set(rank.values())))}
    return {n: used[r] for n, r in rank.items()}


def _with_points(g: nx.DiGraph, rank: dict[Hashable, int]) -> nx.DiGraph:
    """The graph with long edges cut into edges from rank to rank; ``weight`` says how much an edge pulls at its ends."""
    out = nx.DiGraph()
    for n, data in g.nodes(data=True):
        out.add_node(n, rank=rank[n], width=data["width"], height=data["height"])
    for u, v in g.edges:
        chain: list[Any] = [u, *((u, v, r) for r in range(rank[u] + 1, rank[v])), v]
        for point in chain[1:-1]:
            out.add_node(point, rank=point[2], width=8.0, height=0.0)
        for a, b in pairwise(chain):
            # a residual goes round its block, and does not pull the block to its side
            out.add_edge(a, b, weight=0.001 if len(chain) > 3 and (a in g or b in g) else 1.0)
    return out


def _order(points: nx.DiGraph) -> list[list[Any]]:
    """Each rank from left to right, by the mean place of the neighbours; the order with the fewest crossings."""
    starts = [n for n in points if not points.pred[n]]
    found: dict[Any, int] = {}
    for start in starts:  # depth first: what belongs together starts together
        for n in nx.dfs_preorder_nodes(points, start):
            found.setdefault(n, len(found))
    layers: list[list[Any]] = [[] for _ in range(1 + max(points.nodes[n]["rank"] for n in points))]
    for n in found:
        layers[points.nodes[n]["rank"]].append(n)
    best, fewest = [list(l) for l in layers], _crossings(points, layers)
    for sweep in range(_SWEEPS):
        if not fewest:
            break
        near = points.pred if sweep % 2 == 0 else points.succ
        at = {n: i for layer in layers for i, n in enumerate(layer)}
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            layer.sort(key=lambda n: sum(at[m] for m in near[n]) / len(near[n]) if near[n] else at[n])
            at.update({n: i for i, n in enumerate(layer)})
        crossings = _crossings(points, layers)
        if crossings < fewest:
            best, fewest = [list(l) for l in layers], crossings
    return best


def _crossings(points: nx.DiGraph, layers: list[list[Any]]) -> int:
    count = 0
    for upper, lower in pairwise(layers):
        at = {n: i for i, n in enumerate(lower)}
        seen: list[int] = []
        for n in upper:
            ends = sorted(at[m] for m in points.succ[n])
            count += sum(len(seen) - bisect_right(seen, end) for end in ends)
            for end in ends:
                insort(seen, end)
    return count


def _columns(points: nx.DiGraph, layers: list[list[Any]]) -> dict[Any, float]:
    """x of every node: near its neighbours, in the rank's order, without overlap."""
    x: dict[Any, float] = {}
    for layer in layers:
        x.update(zip(layer, _spread(points, layer, [0.0] * len(layer)), strict=True))
    for sweep in range(3 * _SWEEPS + 1):
        # one side alone straightens chains in one sweep, both sides put a box in the middle of its neighbours
        down, both = sweep % 2 == 0, 2 * _SWEEPS <= sweep < 3 * _SWEEPS
        for layer in layers if down else reversed(layers):
            wishes = []
            for n in layer:
                sides = [points.pred[n]] * (down or both) + [points.succ[n]] * (both or not down)
                means = [_mean(x, near) for near in sides if near]
                wishes.append(sum(means) / len(means) if means else x[n])
            x.update(zip(layer, _spread(points, layer, wishes), strict=True))
    _straighten(points, layers, x)
    left = min(x[n] - points.nodes[n]["width"] / 2 for n in x)
    return {n: v - left + MARGIN for n, v in x.items()}


def _straighten(points: nx.DiGraph, layers: list[list[Any]], x: dict[Any, float]) -> None:
    """Draws each long edge straight down, as near to its ends as the boxes beside it allow."""
    chains: dict[Any, list[tuple[Any, Any, Any]]] = {}
    for layer in layers:
        for left, n, right in zip([None, *layer], layer, [*layer[1:], None], strict=False):
            if isinstance(n, tuple):
                chains.setdefault(n[:2], []).append((left, n, right))
    for _ in range(2):  # the second time, those inside have made room
        for (u, v), chain in sorted(chains.items(), key=lambda c: len(c[1])):
            low = max((x[a] + _gap(points, a, n) for a, n, _ in chain if a is not None), default=-math.inf)
            high = min((x[b] - _gap(points, n, b) for _, n, b in chain if b is not None), default=math.inf)
            if low <= high:
                x.update(dict.fromkeys((n for _, n, _ in chain), min(max((x[u] + x[v]) / 2, low), high)))


def _gap(points: nx.DiGraph, a: Any, b: Any) -> float:
    """The distance of the middles of two neighbours."""
    return (points.nodes[a]["width"] + points.nodes[b]["width"]) / 2 + GAP_X


def _mean(x: dict[Any, float], near: Any) -> float:
    return sum(x[m] * e["weight"] for m, e in near.items()) / sum(e["weight"] for e in near.values())


def _spread(points: nx.DiGraph, layer: list[Any], wish: list[float]) -> list[float]:
    """The places nearest to the wished ones (least squares) that keep the order and the gaps.

    Without the gaps that is isotonic regression: neighbours in the wrong order are pooled at their mean.
    """
    offsets = [0.0]
    for a, b in pairwise(layer):
        offsets.append(offsets[-1] + _gap(points, a, b))
    pools: list[list[float]] = []  # [sum, weight, count]
    for n, w, offset in zip(layer, wish, offsets, strict=True):
        weight = 0.01 if isinstance(n, tuple) else 1.0  # a line makes way for a box
        pools.append([weight * (w - offset), weight, 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            last = pools.pop()
            pools[-1] = [a + b for a, b in zip(pools[-1], last, strict=True)]
    means = [total / weight for total, weight, count in pools for _ in range(int(count))]
    return [m + offset for m, offset in zip(means, offsets, strict=True)]
