"""columns: the x of every box and of every point of a long edge, in a given order of each rank.

Boxes stand near their neighbours by least squares, what a residual goes round stands under where it began, and long edges
run straight down.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import networkx as nx

GAP_X = 22.0
SWEEPS = 12

_Near = list[tuple[Any, float]]  # neighbours, and how much each pulls


def columns(points: nx.DiGraph, layers: list[list[Any]]) -> dict[Any, float]:
    """x of every node: near its neighbours, in the rank's order, without overlap.

    Args:
        points: nodes have ``width``, edges ``weight``; points of an edge (u, v) are nodes (u, v, rank).
        layers: the ranks from top to bottom, each from left to right.
    """
    above = {n: [(m, e["weight"]) for m, e in points.pred[n].items()] for n in points}
    below = {n: [(m, e["weight"]) for m, e in points.succ[n].items()] for n in points}
    trunk, rows = _trunk(points), [_Row(points, layer) for layer in layers]
    x: dict[Any, float] = {}
    for row in rows:
        row.place(x, [0.0] * len(row.nodes))
    for sweep in range(3 * SWEEPS + 1):
        # one side alone straightens chains in one sweep, both sides put a box in the middle of its neighbours
        down, both = sweep % 2 == 0, 2 * SWEEPS <= sweep < 3 * SWEEPS
        for row in rows if down else reversed(rows):
            wishes = []
            for n in row.nodes:
                if not above[n] and not below[n]:
                    wishes.append(-math.inf)  # nothing reads it: beside what stands left of it
                elif n in trunk and (down or both):
                    wishes.append(x[trunk[n]])
                elif both:
                    wishes.append(_mean(_mean_of(x, near) for near in (above[n], below[n]) if near))
                else:
                    # what little pulls from above at all, as inputs, stands above what reads it
                    use = above[n] if down and (_pull(above[n]) >= 1 or _pull(below[n]) < 1) else below[n]
                    wishes.append(_mean_of(x, use) if use else x[n])
            row.place(x, wishes)
    _straighten(rows, x)
    return x


def _trunk(points: nx.DiGraph) -> dict[Any, Any]:
    """For each node where a long edge comes back to a shorter path, where that edge began: both stand on one line."""
    length: dict[Any, int] = {}
    for n in points:
        if isinstance(n, tuple):
            length[n[:2]] = length.get(n[:2], 0) + 1
    out: dict[Any, Any] = {}
    for (u, v), ranks in sorted(length.items(), key=lambda item: item[1]):
        if ranks > 1 and points.in_degree(v) > 1:
            out[v] = u  # of several, the longest
    return out


def _straighten(rows: list[_Row], x: dict[Any, float]) -> None:
    """Draws each long edge straight down, as near to its ends as the boxes beside it allow."""
    chains: dict[Any, list[tuple[_Row, int]]] = {}
    for row in rows:
        for i, n in enumerate(row.nodes):
            if isinstance(n, tuple):
                chains.setdefault(n[:2], []).append((row, i))
    for _ in range(2):  # the second time, those inside have made room
        for (u, v), chain in sorted(chains.items(), key=lambda c: len(c[1])):
            low = max((x[r.nodes[i - 1]] + r.gaps[i - 1] for r, i in chain if i), default=-math.inf)
            high = min((x[r.nodes[i + 1]] - r.gaps[i] for r, i in chain if i < len(r.gaps)), default=math.inf)
            if low <= high:
                x.update(dict.fromkeys((r.nodes[i] for r, i in chain), min(max((x[u] + x[v]) / 2, low), high)))


def _pull(near: _Near) -> float:
    return sum(weight for _, weight in near)


def _mean_of(x: dict[Any, float], near: _Near) -> float:
    return sum(x[m] * weight for m, weight in near) / _pull(near)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


class _Row:
    """A rank: its nodes from left to right, and the distances of the middles of neighbours."""

    def __init__(self, points: nx.DiGraph, nodes: list[Any]) -> None:
        self.nodes = nodes
        width = [points.nodes[n]["width"] for n in nodes]
        self.gaps = [(a + b) / 2 + GAP_X for a, b in pairwise(width)]
        self.weights = [1e-5 if isinstance(n, tuple) else 1.0 for n in nodes]  # a line makes way for a box

    def place(self, x: dict[Any, float], wishes: list[float]) -> None:
        """The places nearest to the wished ones (least squares) that keep the order and the gaps.

        Without the gaps that is isotonic regression: neighbours in the wrong order are pooled at their mean.
        """
        pools: list[tuple[float, float, int]] = []  # sum, weight, count
        offset, offsets = 0.0, []
        for wish, weight, gap in zip(wishes, self.weights, [0.0, *self.gaps], strict=True):
            offset += gap
            offsets.append(offset)
            if wish == -math.inf:
                wish, weight = pools[-1][0] / pools[-1][1] + offset if pools else 0.0, 1e-9
            pool = (weight * (wish - offset), weight, 1)
            while pools and pools[-1][0] / pools[-1][1] > pool[0] / pool[1]:
                last = pools.pop()
                pool = (last[0] + pool[0], last[1] + pool[1], last[2] + pool[2])
            pools.append(pool)
        means = [total / weight for total, weight, count in pools for _ in range(count)]
        x.update(zip(self.nodes, (m + o for m, o in zip(means, offsets, strict=True)), strict=True))
