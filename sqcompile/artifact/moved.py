"""moved: the graph of the quantized stage, for another device.

%mask = aten.arange(%s0, device=cpu)   ->   %mask = aten.arange(%s0, device=cuda:0)

The graph is written as for a file, and read again as one that is loaded there, so that a model has one way to a device.
"""

from __future__ import annotations

import json
from functools import partial

import torch
from torch import Tensor, fx

from sqcompile.artifact import calls, graphs, structures
from sqcompile.artifact.directory import devices
from sqcompile.artifact.fill import filled
from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import get_tensor
from sqcompile.passes.rewrite.weight_store import Lazy


def moved(quantized: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """The graph for a device; its lazy weights (``About.lazy``) are made where they were, and copied one at a time.

    Raises:
        ArtifactError: for a graph on several devices, or one that cannot be saved.
    """
    record = about(quantized)
    described, served, returns = json.loads(
        json.dumps(
            [graphs.to_json(quantized), calls.captured_to_json(record.calls), structures.to_json(record.out_spec)]
        )
    )
    here = devices(described, device)
    held = {str(n.target): get_tensor(quantized, str(n.target)) for n in quantized.graph.find_nodes(op="get_attr")}
    like = {name: t.to("meta") for name, t in held.items()}
    gm = graphs.from_json(described, like, calls.captured_from_json(served, here), structures.from_json(returns), here)
    lazy = {name: Lazy(l.key, partial(_copied, l, device), l.beside) for name, l in record.lazy.items()}
    return filled(gm, held.__getitem__, lazy)


def _copied(weight: Lazy, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(t.to(device) for t in weight.make())
