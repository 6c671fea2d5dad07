"""flat: a captured graph as a function of flat tensors, for who compiles or traces it once more."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from sqcompile.errors import StageError
from sqcompile.passes.ir.graph import clone, value


def flatten(gm: fx.GraphModule) -> tuple[fx.GraphModule, list[int]]:
    """The graph from flat tensors to a flat tuple, and which leaves of a call it reads."""
    flat = clone(gm)
    flat.graph.set_codegen(fx.graph.CodeGen())
    used = []
    for i, n in enumerate(flat.graph.find_nodes(op="placeholder")):
        if isinstance(value(n), (Tensor, torch.SymInt)):
            used.append(i)
        elif n.users:
            raise StageError(f"input {n.name} is a constant of the capture, and yet the graph reads it")
        else:
            flat.graph.erase_node(n)
    flat.recompile()
    return flat, used
