"""Runs of equal blocks are drawn once."""

from __future__ import annotations

from typing import Any

import networkx as nx
import torch
from draw_cases import PostNorm, PreNorm
from torch import Tensor, nn

import sqcompile
from sqcompile.capture.inputs import as_call
from sqcompile.capture.trace import trace
from sqcompile.draw import condense, fold_repeats, roles_of
from sqcompile.draw.svg import render


def graph_of(model: nn.Module, *inputs: Any) -> nx.DiGraph:
    gm = trace(model, as_call(model, inputs))
    return condense(gm, roles_of(gm))


def test_long_runs_of_equal_blocks_are_drawn_once() -> None:
    blocks = nn.Sequential(*(PreNorm() for _ in range(5)), PostNorm())
    g = graph_of(blocks.eval(), torch.randn(2, 16))
    short = fold_repeats(g)
    drawn_ = [name for _, names in short.nodes(data="linears") for name in names]
    assert drawn_ == ["0.up.weight", "0.down.weight", "5.up.weight", "5.down.weight"]
    up, down = (n for n, names in short.nodes(data="linears") if names and names[0].startswith("0."))
    assert short.nodes[up]["repeat"] == 5 and short.nodes[up]["block"] == "{0..4}"
    assert [g.nodes[n]["linears"] for n in short.nodes[up]["copies"]] == [(f"{i}.up.weight",) for i in range(5)]
    assert nx.has_path(short, up, down) and nx.is_directed_acyclic_graph(short)
    text = render(short)
    assert "{0..4}" in text and "× 5" in text
    three = graph_of(blocks[:3].eval(), torch.randn(2, 16))
    assert fold_repeats(three) is three


def test_blocks_inside_a_block_are_drawn_once() -> None:
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.down = nn.Sequential(*(PreNorm() for _ in range(4))), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.blocks(x))

    stages = nn.Sequential(Stage(), nn.Sequential(PostNorm())).eval()
    short = fold_repeats(graph_of(stages, torch.randn(2, 16)))
    assert {d["block"]: d["repeat"] for _, d in short.nodes(data=True) if "repeat" in d} == {"0.blocks.{0..3}": 4}


def test_blocks_with_other_roles_are_not_one() -> None:
    model, x = nn.Sequential(*(PreNorm() for _ in range(5))).eval(), torch.randn(8, 16)
    plan = sqcompile.calibrate(model, [x], recipe=sqcompile.Recipe(smooth=False, skip=("0.down",)), progress=False)
    traced = trace(model, as_call(model, x))
    short = fold_repeats(condense(traced, roles_of(traced, plan)))
    assert {d["block"] for _, d in short.nodes(data=True)} == {"", "0", "{1..4}"}
    up = next(d for _, d in short.nodes(data=True) if d["label"] == "up" and "repeat" in d)
    known = [l.sqnr_db for l in plan.layers if l.name.endswith("up.weight") and l.name != "0.up.weight"]
    assert up["sqnr"] == min(db for db in known if db is not None)


def test_what_comes_after_the_last_block_is_no_part_of_it() -> None:
    class Ends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*(PreNorm() for _ in range(4)))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.layers(x))

    short = fold_repeats(graph_of(Ends().eval(), torch.randn(2, 16)))
    blocks = {d["label"]: d["block"] for _, d in short.nodes(data=True)}
    assert blocks["tanh"] == "" and blocks["+"] == blocks["up"] == "layers.{0..3}"
