"""layout: where the boxes of a drawing stand, layer by layer from top to bottom.

Ranks by longest path; an edge over several ranks gets a point of its own in each, which takes a place beside the
boxes like a box, so that no edge crosses one; few crossings by barycenters; then straight lines by least squares.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import networkx as nx

from sqcompile.draw.columns import SWEEPS, columns
from sqcompile.draw.frames import BLOCK_TITLE, part_frames

GAP_Y, MARGIN = 30.0, 28.0


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
    x = columns(points, layers)
    part_frames(g, layers, x)
    left = min(x[n] - points.nodes[n]["width"] / 2 for n in x)
    x = {n: float(round(v - left + MARGIN)) for n, v in x.items()}  # whole pixels: shorter texts
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
    _sink(g, rank)
    used = {r: i for i, r in enumerate(sorted(set(rank.values())))}
    return {n: used[r] for n, r in rank.items()}


def _sink(g: nx.DiGraph, rank: dict[Hashable, int]) -> None:
    """Moves what comes from some of the inputs alone down to its first reader: a decoder begins beside its encoder's end."""
    sources: dict[Hashable, frozenset[Hashable]] = {}
    for n in nx.topological_sort(g):
        sources[n] = frozenset({n}).union(*(sources[p] for p in g.pred[n])) if g.pred[n] else frozenset({n})
        sources[n] = frozenset(s for s in sources[n] if not g.pred[s])
    groups: dict[frozenset[Hashable], list[Hashable]] = {}
    for n in g:
        groups.setdefault(sources[n], []).append(n)
    for members in sorted(groups.values(), key=lambda m: -max(rank[n] for n in m)):
        own = set(members)
        slack = [rank[s] - rank[n] - 1 for n in members for s in g.succ[n] if s not in own]
        before = any(p not in own for n in members for p in g.pred[n])
        if slack and not before:
            for n in members:
                rank[n] += min(slack)


def _with_points(g: nx.DiGraph, rank: dict[Hashable, int]) -> nx.DiGraph:
    """The graph with long edges cut into edges from rank to rank; ``weight`` says how much an edge pulls at its ends."""
    out, beside = nx.DiGraph(), _side_entries(g)
    for n, data in g.nodes(data=True):
        out.add_node(n, rank=rank[n], width=data["width"], height=data["height"])
    for u, v in g.edges:
        chain: list[Any] = [u, *((u, v, r) for r in range(rank[u] + 1, rank[v])), v]
        for point in chain[1:-1]:
            out.add_node(point, rank=point[2], width=8.0, height=0.0)
        for a, b in pairwise(chain):
            # a residual goes round its block, and does not pull the block to its side
            loose = len(chain) > 3 and (a in g or b in g)
            out.add_edge(a, b, weight=1e-5 if loose or v in beside else 1.0)
    return out


def _side_entries(g: nx.DiGraph) -> set[Hashable]:
    """Where a block reads what is not the block before it, as cross-attention does its encoder: it stands with its block."""

    def inside(n: Hashable, near: Any) -> bool:
        return any(g.nodes[m]["block"] == g.nodes[n]["block"] for m in near)

    entries = {n for n, block in g.nodes(data="block") if block and not inside(n, g.pred[n])}
    return {
        n
        for n in entries
        if any(m not in entries and inside(n, [s]) and inside(n, [m]) for s in g.succ[n] for m in g.pred[s])
    }


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
    for sweep in range(SWEEPS):
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
