"""frames: the rectangle around each repeated block."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import networkx as nx

BLOCK_TITLE = 20.0  # room above the first rank of a block
_APART = 26.0

Frame = tuple[float, float, float, float]  # left, top, right, bottom


def frames(g: nx.DiGraph, boxes: Mapping[Any, tuple[float, float]], routes: Mapping[Any, Any]) -> dict[str, Frame]:
    """The frame of each block: around its boxes, and the residuals beside them.

    Args:
        g: nodes have ``width``, ``height`` and ``block``.
        boxes: (x, y) of the middle of each node.
        routes: for each edge the points (x, top, bottom) it passes on its way.
    """
    found: dict[str, Frame] = {}
    for n, data in g.nodes(data=True):
        (x, y), w, h = boxes[n], data["width"] / 2 + 12, data["height"] / 2 + 8
        if data["block"]:
            found[data["block"]] = _around(found.get(data["block"]), x - w, y - h, x + w, y + h)
    inner = dict(found)
    for (u, v), route in routes.items():  # the residuals around a block stand in its frame
        for block in {g.nodes[v]["block"]} & set(found):
            if g.nodes[u]["block"] != block and not any(g.nodes[m]["block"] == block for m in g.pred[v]):
                continue  # what comes from elsewhere, as the encoder that a decoder reads
            for x, top, bottom in route:
                if inner[block][1] < top and bottom < inner[block][3]:
                    found[block] = _around(found[block], x - 12, top, x + 12, bottom)
    return {name: (a, b - BLOCK_TITLE, c, d) for name, (a, b, c, d) in found.items()}


def overlap(a: Frame, b: Frame) -> bool:
    """Whether two frames do."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def part_frames(g: nx.DiGraph, layers: list[list[Any]], x: dict[Any, float]) -> None:
    """Moves blocks apart that stand side by side, an encoder's and a decoder's, with what belongs to the one on the right."""
    rank = {n: float(i) for i, layer in enumerate(layers) for n in layer}
    routes: dict[Any, list[tuple[float, float, float]]] = {}
    for layer in layers:
        for n in layer:
            if isinstance(n, tuple):
                routes.setdefault(n[:2], []).append((x[n], rank[n], rank[n]))
    flat = g.copy()
    for _, data in flat.nodes(data=True):
        data["height"] = 0.0
    blocks: dict[str, set[Hashable]] = {}
    for n, block in g.nodes(data="block"):
        blocks.setdefault(block, set()).add(n)
    for _ in range(len(layers)):
        # heights do not matter here: a rank is one high, and the frame's margins less than a half
        at = {
            name: (a, b + BLOCK_TITLE + 8, c, d - 8)
            for name, (a, b, c, d) in frames(flat, {n: (x[n], rank[n]) for n in g}, routes).items()
        }
        pair = next(((p, q) for p in at for q in at if at[p][0] < at[q][0] and overlap(at[p], at[q])), None)
        if pair is None:
            return
        left, right = (blocks[name] for name in pair)
        by = at[pair[0]][2] - at[pair[1]][0] + _APART
        _move(g, layers, x, left, right, by)
        routes = {(u, v): [(x[u, v, int(r)], r, r) for _, r, _ in route] for (u, v), route in routes.items()}


def _move(
    g: nx.DiGraph, layers: list[list[Any]], x: dict[Any, float], left: set[Any], right: set[Any], by: float
) -> None:
    below = set().union(*(nx.descendants(g, n) for n in right))
    fixed = left.union(*(nx.ancestors(g, n) | nx.descendants(g, n) for n in left))
    above = set().union(*(nx.ancestors(g, n) for n in right)) - fixed
    blocks = {g.nodes[n]["block"] for n in right | below} - {""}
    moved = right | below | above | {n for n, block in g.nodes(data="block") if block in blocks}
    for layer in layers:
        start = next((i for i, n in enumerate(layer) if n in moved), len(layer))
        for n in layer[start:]:
            x[n] += by


def _around(frame: Frame | None, a: float, b: float, c: float, d: float) -> Frame:
    return (a, b, c, d) if frame is None else (min(frame[0], a), min(frame[1], b), max(frame[2], c), max(frame[3], d))
