"""outputs: the largest output of each linear, beside the statistics of their inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.passes.ir.graph import Linear
from sqcompile.statistics.observer import Observer


class OutputObserver(Observer):
    """An `Observer` that keeps the largest absolute value of each linear's output, too, padding left out.

    Attributes:
        largest: float32 scalars by linear name, of linears that some token reached.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.by_node = {l.node: l for l in self.linears}
        self.largest: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if n.name in self.by_node:
            self._written(n, self.by_node[n.name], out)
        return out

    def _written(self, n: fx.Node, l: Linear, y: Tensor) -> None:
        keep, _ = self._tokens(n, l, self.env[n.args[0]])  # type: ignore[index]
        rows = y.reshape(-1, y.shape[-1])
        rows = rows if keep is None else rows[keep]
        if len(rows):
            absmax = rows.abs().amax().float()
            with self.lock:
                self._check_finite(bool(absmax.isfinite()), f"the output of {l.name} (node {l.node})")
                self.largest[l.name] = torch.maximum(self.largest.get(l.name, absmax), absmax)
