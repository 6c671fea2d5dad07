"""Where the boxes of a drawing stand, for models of several families."""

from __future__ import annotations

import itertools
from collections import Counter

import networkx as nx
import pytest
from families import build

from sqcompile.capture.inputs import as_call
from sqcompile.capture.trace import trace
from sqcompile.draw import condense, roles_of
from sqcompile.draw.frames import frames, overlap
from sqcompile.draw.layout import layout
from sqcompile.draw.legend import classes
from sqcompile.passes.ir.graph import find_linears

BOXES = {
    "bert": {
        "activation": 3, "embedding": 3, "input": 2, "join": 6, "linear balance": 2, "linear producer refused": 2,
        "linear refused": 9, "norm": 5, "output": 1, "product attention": 2,
    },
    "llama": {
        "activation": 2, "embedding": 1, "input": 1, "join": 6, "linear balance": 11, "linear balance producer": 4,
        "norm producer": 5, "output": 1, "product attention": 2,
    },
    "mixtral": {
        "activation": 6, "embedding": 1, "input": 1, "join": 8, "linear balance": 11, "linear balance producer": 4,
        "norm producer": 5, "output": 1, "product attention": 2,
    },
    "swin": {
        "activation": 2, "input": 1, "join": 4, "linear balance": 8, "linear balance producer": 2, "linear refused": 2,
        "norm": 2, "norm producer": 4, "output": 1, "product": 1, "product attention": 2,
    },
    "t5": {
        "activation": 4, "embedding": 2, "input": 2, "join": 10, "linear balance": 20, "linear balance producer": 8,
        "linear producer refused": 2, "linear refused": 2, "norm": 2, "norm producer": 10, "output": 1,
        "product attention": 6,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", BOXES)
def test_families_have_these_boxes_and_none_touches_another(family: str) -> None:
    model, call = build(family)
    gm = trace(model, as_call(model, call))
    g, linears = condense(gm, roles_of(gm)), [l.name for l in find_linears(gm)]
    assert sorted(n for _, names in g.nodes(data="linears") for n in names) == sorted(linears)
    assert Counter(classes(d).removeprefix("node ") for _, d in g.nodes(data=True)) == BOXES[family]
    for _, data in g.nodes(data=True):
        data.update(width=2.0 * round(5 * len(data["label"])), height=30.0)
    place = layout(g)
    assert sorted(n for rank in place.ranks for n in rank) == sorted(g)
    for u, v in g.edges:
        assert place.boxes[u][1] < place.boxes[v][1]
        for x, top, bottom in place.routes[u, v]:
            for n in g:
                (mx, my), w = place.boxes[n], g.nodes[n]["width"]
                assert abs(x - mx) > w / 2 or not top <= my <= bottom
    for rank in place.ranks:
        for a, b in itertools.pairwise(rank):
            assert place.boxes[b][0] - place.boxes[a][0] > (g.nodes[a]["width"] + g.nodes[b]["width"]) / 2
    if family in ("llama", "mixtral"):
        stream = [
            n for n, label in g.nodes(data="label") if label in ("embed_tokens", "+", "norm", "lm_head", "output")
        ]
        assert len(stream) == 8 and len({place.boxes[n][0] for n in stream}) == 1
    blocks = frames(g, place.boxes, place.routes).values()
    assert not any(overlap(a, b) for a, b in itertools.combinations(blocks, 2))


def test_a_decoder_begins_beside_the_end_of_its_encoder() -> None:
    g = nx.DiGraph()
    chain = ["ids", "e0", "e1", "e2", "e3", "k", "attention", "out"]
    for n in [*chain, "decoder ids", "d0", "q"]:
        g.add_node(n, width=40.0, height=30.0, block="")
    nx.add_path(g, chain)
    nx.add_path(g, ["decoder ids", "d0", "q", "attention"])
    place = layout(g)
    assert place.boxes["q"][1] == place.boxes["k"][1]
    assert place.boxes["decoder ids"][1] == place.boxes["e2"][1]
