"""sharded: a graph of Dynamo whose parameters are DTensors, as one that takes what this process holds of them.

    def forward(self, L_w_: DTensor, L_mesh_, L_x_):            def forward(self, L_w_: f32[16, 32], L_x_):
        x = from_local(L_x_, L_mesh_, (Replicate(),))               w, mesh = made(L_w_), mesh()
        y = linear(x, L_w_)                               ->        x = from_local(L_x_, mesh, (Replicate(),))
        return (y.to_local(),)                                      y = linear(x, w);  return (y.to_local(),)

It is lowered under `local_calls`, which leave no DTensor in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.capture.sharded import parallel_among
from sqcompile.errors import CaptureError
from sqcompile.process.parallel import ALONE, Parallel
from sqcompile.pytorch.distributed import is_distributed, local_part


def on_local_parts(
    gm: fx.GraphModule, examples: Sequence[Any]
) -> tuple[fx.GraphModule, list[Any], Callable[[Sequence[Any]], list[Any]] | None, Parallel]:
    """A graph that takes local parts.

    Args:
        gm: Dynamo's graph; it is not changed.
        examples: its arguments.

    Returns:
        The graph and its arguments; what makes arguments of it from those of a call, None where they are the same; and the
        processes that hold the model together, ``dims`` by the names of placeholders.

    Raises:
        CaptureError: for an argument that is a DTensor, and no parameter; or as `parallel_among`.
    """
    nodes = gm.graph.find_nodes(op="placeholder")
    whole = {n.name: x for n, x in zip(nodes, examples, strict=True) if is_distributed(x)}
    if not whole:
        return gm, list(examples), None, ALONE
    for name, x in whole.items():
        if not isinstance(x, torch.nn.Parameter):
            raise CaptureError(
                f"the graph takes {name}, a DTensor that is no parameter: call the model with plain tensors (to_local())"
            )
    parallel = parallel_among(whole)
    meshes = {n.name for n, x in zip(nodes, examples, strict=True) if _is_mesh(x)}
    new = fx.GraphModule(gm, gm.graph)
    new.graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    new.graph.output(new.graph.graph_copy(gm.graph, env))
    for old, x in zip(nodes, examples, strict=True):
        n = env[old]
        if n.name in meshes:
            with new.graph.inserting_before(_first_call(new.graph)):
                mesh = new.graph.call_function(_constant(x))
            n.replace_all_uses_with(mesh)
            new.graph.erase_node(n)
        elif n.name in whole:
            n.meta = {**n.meta, "example_value": local_part(n.meta["example_value"])}
            with new.graph.inserting_before(_first_call(new.graph)):
                made = new.graph.call_function(_made(x), (n,))
            for user in [u for u in n.users if u is not made]:
                user.replace_input_with(n, made)
    new.recompile()
    kept = [i for i, n in enumerate(nodes) if n.name not in meshes]
    convert = partial(_local_parts, kept, [i for i, n in enumerate(nodes) if n.name in whole])
    return new, convert(examples), convert, parallel


def renamed(parallel: Parallel, names: dict[str, str]) -> Parallel:
    """The same processes, with ``dims`` by the names that placeholders stand for."""
    return replace(parallel, dims={names[n]: dim for n, dim in parallel.dims.items() if n in names})


def _local_parts(kept: list[int], whole: list[int], args: Sequence[Any]) -> list[Any]:
    found = list(args)
    for i in whole:
        found[i] = local_part(found[i])
    return [found[i] for i in kept]


def _first_call(graph: fx.Graph) -> fx.Node:
    return next(n for n in graph.nodes if n.op != "placeholder")


def _is_mesh(x: Any) -> bool:
    from torch.distributed.device_mesh import DeviceMesh

    return isinstance(x, DeviceMesh)


def _constant(x: Any) -> Callable[[], Any]:
    def mesh() -> Any:
        return x

    return mesh


def _made(x: Any) -> Callable[[Tensor], Any]:
    """What makes a DTensor like x of a local part."""
    mesh, placements = x.device_mesh, x.placements

    def made(local: Tensor) -> Any:
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(local, mesh, placements, run_check=False)

    return made
