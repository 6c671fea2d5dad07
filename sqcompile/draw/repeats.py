"""repeats: runs of equal blocks, drawn once."""

from __future__ import annotations

from typing import Any

import networkx as nx

from sqcompile.plan.names import collapse

# Runs of equal blocks this long are drawn as one block.
LONG_RUN = 4


def fold_repeats(g: nx.DiGraph) -> nx.DiGraph:
    """Draws runs of blocks that look alike as their first one.

    Blocks look alike if they have the same boxes in the same order and roles, with the same edges; what they have in numbers
    (α, dB) may differ. A box of the first block has ``copies``, the names of the boxes that it stands for, and
    ``repeat``, how many blocks are one; its ``block`` says which, "model.layers.{0..31}". Its ``sqnr`` is the smallest.
    """
    depth = max((len(blocks) for _, blocks in g.nodes(data="blocks")), default=0)
    for level in range(depth):
        for run in _runs(g, level):
            folded = _fold(g, run)
            g = folded if nx.is_directed_acyclic_graph(folded) else g
    return g


def _runs(g: nx.DiGraph, level: int) -> list[dict[str, list[str]]]:
    """The long runs of blocks of a depth: the boxes of each block by its name."""
    blocks: dict[str, list[str]] = {}
    for n, data in g.nodes(data=True):
        if len(data["blocks"]) > level and "repeat" not in data:
            blocks.setdefault(data["blocks"][level], []).append(n)
    runs: list[dict[str, list[str]]] = []
    last: Any = None
    for block, nodes in blocks.items():
        parent, count = block.rpartition(".")[0], len(last[1][0]) if last else 0
        if last and (parent, _look(g, nodes[:count])) == last:
            runs[-1][block] = nodes[:count]  # what comes after the last block may have been taken for its own
        else:
            runs.append({block: nodes})
        last = parent, _look(g, nodes)
    return [run for run in runs if len(run) >= LONG_RUN]


def _look(g: nx.DiGraph, nodes: list[str]) -> Any:
    place = {n: i for i, n in enumerate(nodes)}
    boxes = [(d["kind"], d["label"], d["detail"], frozenset(d["roles"])) for d in (g.nodes[n] for n in nodes)]
    edges = {(place[u], place[v], smooth) for u, v, smooth in g.subgraph(nodes).edges(data="smooth")}
    return boxes, edges


def _fold(g: nx.DiGraph, run: dict[str, list[str]]) -> nx.DiGraph:
    name, (first, *_) = collapse(run)[0], run.values()
    at = {n: (i, first[k]) for i, nodes in enumerate(run.values()) for k, n in enumerate(nodes)}
    out = nx.DiGraph()
    for n, data in g.nodes(data=True):
        if n not in at:
            out.add_node(n, **(data if data["block"] not in run else {**data, "block": ""}))
        elif at[n] == (0, n):
            copies = [nodes[first.index(n)] for nodes in run.values()]
            known = [g.nodes[c]["sqnr"] for c in copies if g.nodes[c]["sqnr"] is not None]
            more = {"sqnr": min(known, default=None), "copies": copies, "repeat": len(run), "block": name}
            out.add_node(n, **{**data, **more})
    for u, v, data in g.edges(data=True):
        (i, a), (j, b) = at.get(u, (None, u)), at.get(v, (None, v))
        if i == j or i is None or j is None:  # not from one block of the run to another
            smooth = data["smooth"] or out.edges.get((a, b), {}).get("smooth", False)
            out.add_edge(a, b, smooth=smooth)
    return out
