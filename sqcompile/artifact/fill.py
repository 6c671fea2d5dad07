"""fill: the graph of a saved model over its tensors, and lowered.

%w = tensor "fc.weight"   ->   int8, read from its file as it is packed
%b = tensor "fc.bias"     ->   mapped into memory from its file
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from sqcompile.artifact.directory import Saved
from sqcompile.errors import ArtifactError
from sqcompile.kernels.ops import sqcompile_ops
from sqcompile.kernels.targets import Target
from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import set_tensor, value
from sqcompile.passes.ir.verify import verify
from sqcompile.passes.lowering.lower import lower
from sqcompile.passes.rewrite.weight_store import Lazy, Shared


def lowered(saved: Saved, target: Target | None, lazy: bool = False) -> fx.GraphModule:
    """The lowered graph of a saved model for a target; with ``lazy``, its weights are packed when they are asked for."""
    return lowered_graph(filled(saved.graph, saved.tensors.map, _weights(saved)), target, lazy)


def lowered_graph(gm: fx.GraphModule, target: Target | None, lazy: bool = False) -> fx.GraphModule:
    """A graph of the quantized stage, lowered."""
    store = Shared(lambda tensor: None, lambda key: None)
    return verify(lower(gm, store, target, lazy), "lowered")


def filled(gm: fx.GraphModule, tensor: Callable[[str], torch.Tensor], lazy: dict[str, Lazy]) -> fx.GraphModule:
    """The graph over its tensors, by name, on their devices; less those that are read when they are packed."""
    later = lazy.keys() | {name for l in lazy.values() for name in l.beside}
    about(gm).lazy = lazy
    for n in gm.graph.find_nodes(op="get_attr"):
        if n.target not in later:
            set_tensor(gm, str(n.target), tensor(str(n.target)).to(value(n).device))
    return verify(gm, "quantized")


def _weights(saved: Saved) -> dict[str, Lazy]:
    """By name, the int8 weights of linears: each is read from its file as it is packed, so no other node may read it."""
    found = {}
    for n in saved.graph.graph.nodes:
        if n.target not in (sqcompile_ops.dequantize.default, sqcompile_ops.grouped_dequantize.default):
            continue
        acc, scale = n.args[0], n.args[2]
        cast = acc.args[1]
        weight = cast.args[0]
        scale = scale.args[0] if scale.op == "call_function" else scale
        alone = len(weight.users) == len(cast.users) == len(scale.users) == 1
        if not alone or not weight.op == scale.op == "get_attr":
            raise ArtifactError(f"%{n.name} of its graph is no linear of int8 values")
        found[str(weight.target)] = _lazy(saved, weight, scale)
    return found


def _lazy(saved: Saved, weight: fx.Node, scale: fx.Node) -> Lazy:
    def make() -> tuple[torch.Tensor, torch.Tensor]:
        w, s = (saved.tensors.read(str(n.target)).to(value(n).device) for n in (weight, scale))
        return w, s

    return Lazy(("saved", str(weight.target)), make, (str(scale.target),))
