"""values: what every node of a graph holds at one choice of sizes, as tensors without data.

    %x: f32[s0, 4] = input
    %t: f32[4, s0] = t(%x)
->
    at s0 = 2: %x f32[2, 4], %t f32[4, 2]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.form import form
from sqcompile.passes.ir.graph import get_tensor, value
from sqcompile.passes.ir.record import call_key
from sqcompile.process.interrupts import checkpoint
from sqcompile.pytorch.core import FakeTensorMode


def values_at(gm: fx.GraphModule, symbols: dict[Any, int]) -> dict[fx.Node, Any]:
    """What every node holds at one choice of sizes, on fake tensors.

    Several analyses ask for the same sizes, and nothing else of them takes as long: the graph keeps the answer, and
    shares it with graphs of the same operations (of layers that are compiled one by one).
    """
    now = form(gm)
    kept: dict[Any, Any] = about(gm).values
    key = tuple(symbols.items())
    before, values = kept.get(key, (None, []))
    if before != now:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode, torch.no_grad():
            inputs = [_concrete(value(n), symbols) for n in gm.graph.find_nodes(op="placeholder")]
            run = _Values(gm, mode)
            run.run(*inputs, enable_io_processing=False)
        values = [run.values[n] for n in gm.graph.nodes]
        kept[key] = now, values
    return dict(zip(gm.graph.nodes, values, strict=True))


class _Values(fx.Interpreter):
    """Executes a graph on fake tensors and keeps what every node holds."""

    def __init__(self, gm: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(gm)
        self.extra_traceback = False
        self.mode, self.values = mode, dict[fx.Node, Any]()
        self.known: dict[Any, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        checkpoint()
        if n.op == "get_attr":
            out = self.mode.from_tensor(get_tensor(self.module, str(n.target)), static_shapes=True)
        else:
            out = super().run_node(n)
        self.values[n] = out
        return out

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The layers of a model repeat their calls: what a call on the same sizes gave is given again."""
        key = call_key(target, args, kwargs)
        if key is None:
            return super().call_function(target, args, kwargs)
        if key not in self.known:
            self.known[key] = super().call_function(target, args, kwargs)
        return self.known[key]


def _concrete(v: Any, symbols: dict[Any, int]) -> Any:
    def size(s: Any) -> int:
        return int(s.node.expr.xreplace(symbols)) if isinstance(s, torch.SymInt) else s

    if isinstance(v, Tensor):
        return torch.empty([size(s) for s in v.shape], dtype=v.dtype, device=v.device)
    return size(v)
