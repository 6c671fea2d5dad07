"""columns: the x of every box and of every point of a long edge, in a given order of each rank.

Boxes stand near their neighbours by least squares, what a residual goes round stands under where it began, and long edges
run straight down.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import networkx as nx

GAP_X = 22.0
SWEEPS = 12


def columns(points: nx.DiGraph, layers: list[list[Any]]) -> dict[Any, float]:
    """x of every node: near its neighbours, in the rank's order, without overlap."""
    x: dict[Any, float] = {}
    trunk = _trunk(points)
    for layer in layers:
        x.update(zip(layer, _spread(points, layer, [0.0] * len(layer)), strict=True))
    for sweep in range(3 * SWEEPS + 1):
        # one side alone straightens chains in one sweep, both sides put a box in the middle of its neighbours
        down, both = sweep % 2 == 0, 2 * SWEEPS <= sweep < 3 * SWEEPS
        for layer in layers if down else reversed(layers):
            wishes = []
            for n in layer:
                if not points.degree(n):
                    wishes.append(-math.inf)  # nothing reads it: beside what stands left of it
                    continue
                up_too = both or not down or _pull(points.pred[n]) < 1 <= _pull(points.succ[n])
                sides = [points.pred[n]] * (down or both) + [points.succ[n]] * up_too
                if up_too and not both:
                    sides = sides[-1:] if sides[-1] else sides
                means = [_mean(x, near) for near in sides if near]
                if n in trunk and (down or both):
                    means = [x[trunk[n]]]
                wishes.append(sum(means) / len(means) if means else x[n])
            x.update(zip(layer, _spread(points, layer, wishes), strict=True))
    _straighten(points, layers, x)
    return x


def _trunk(points: nx.DiGraph) -> dict[Any, Any]:
    """For each node where a long edge comes back to a shorter path, where that edge began: both stand on one line."""
    out: dict[Any, Any] = {}
    length: dict[Any, int] = {}
    for n in points:
        if isinstance(n, tuple) and points.out_degree(n):
            u, v, _ = n
            length[u, v] = length.get((u, v), 0) + 1
    for (u, v), ranks in sorted(length.items(), key=lambda item: item[1]):
        if ranks > 1 and points.in_degree(v) > 1:
            out[v] = u  # of several, the longest
    return out


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


def _pull(near: Any) -> float:
    return sum(e["weight"] for e in near.values())


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
        weight = 1e-5 if isinstance(n, tuple) else 1.0  # a line makes way for a box
        if w == -math.inf:
            w, weight = pools[-1][0] / pools[-1][1] + offset if pools else 0.0, 1e-9
        pools.append([weight * (w - offset), weight, 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            last = pools.pop()
            pools[-1] = [a + b for a, b in zip(pools[-1], last, strict=True)]
    means = [total / weight for total, weight, count in pools for _ in range(int(count))]
    return [m + offset for m, offset in zip(means, offsets, strict=True)]
