"""value_labels: for each channel of an attention's values, the producer channel that it comes from. Analysis only.

    %lv = linear(%x, %wv)
    %uv = unflatten(%lv, -1, [1, 4])
    %v = transpose(%uv, 1, 2)
    %y = scaled_dot_product_attention(%qr, %k, %v, enable_gqa=True)
->
    {y: {lv: [[0, 1, 2, 3]]}}                       # by attention and producer, [G, Dv]

v_proj -> o_proj divides v_proj's rows by s, so that the values which are quantized in the folded graph are V / s.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.passes.attention.chains import Attention
from sqcompile.passes.attention.head_sites import by_head
from sqcompile.passes.ir.graph import Linear, find_linears
from sqcompile.passes.ir.sizes import at_two_sizes
from sqcompile.passes.labels.interpreter import LabelInterpreter, execute
from sqcompile.passes.labels.rules import Refused


class _Watching(LabelInterpreter):
    """Labels that are kept where attentions read their values."""

    def __init__(self, gm: fx.GraphModule, linears: list[Linear], nodes: set[str]) -> None:
        super().__init__(gm, linears)
        self.nodes, self.found = nodes, dict[str, dict[str, Tensor]]()

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if n.name in self.nodes:
            self.found[n.name] = dict(self.labels.get(n, {}))
        return out


def value_labels(gm: fx.GraphModule, attentions: list[Attention]) -> dict[str, dict[str, Tensor]]:
    """The labels of each producer at the values of attentions that can be quantized.

    Returns:
        int64 [G, Dv] by attention and producer's node, -1 for channels that are not the producer's; no attention whose
        values are other channels for other tokens.
    """
    linears = find_linears(gm)
    nodes = {a.v for a in attentions}
    runs = at_two_sizes(gm, lambda sizes: execute(_Watching(gm, linears, nodes), sizes).found)
    result = {}
    for a in attentions:
        first, second = ({p: _values(l, a.groups) for p, l in run.get(a.v, {}).items()} for run in runs)
        if first.keys() == second.keys() and all(
            l is not None and (again := second[p]) is not None and torch.equal(l, again) for p, l in first.items()
        ):
            result[a.name] = {p: l for p, l in first.items() if l is not None}
    return result


def _values(labels: Tensor, groups: int) -> Tensor | None:
    try:
        return by_head(labels, groups)
    except Refused:
        return None
