"""placed: a graph that computes on another device than the one its tensors are on.

    %w = get_attr fc.weight   (cpu)               %w = get_attr fc.weight        (cpu)
    %m = arange(%s0, device=cpu)            ->    %t = to(%w, cuda:0, bfloat16)
    %y = linear(%x, %w)                           %m = arange(%s0, device=cuda:0)
                                                  %y = linear(%x, %t)

Each tensor is copied where it is used, and the copy goes with its last reader: so weights that lie in files need not fit on
the device. A copied weight is a constant as any other. Names of nodes, and of linears, stay what they were.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import add_op, aten, clone, finish
from sqcompile.passes.ir.record import call_key, record, value
from sqcompile.passes.ir.verify import verify
from sqcompile.pytorch.core import OpOverload, pytree, schema


def placed(gm: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """A copy of a traced graph, over the same tensors, that computes on a device; its arguments are there, too.

    Args:
        gm: whose tensors are on one device.
        device: of this machine, with an index.
    """
    new = clone(gm)
    order = {n: i for i, n in enumerate(new.graph.nodes)}
    for n in order:
        if n.op == "get_attr":
            _copy(new, n, min(n.users, key=order.__getitem__), device)
        elif n.op != "output":
            _move(new, n, device)
    about(new).captured = about(gm).calls.on(device)
    return verify(finish(new), "traced")


def device_of_calls(gm: fx.GraphModule) -> torch.device | None:
    """Where a graph takes its arguments, if that is another device than the one its tensors are on."""
    at = {value(n).device for n in gm.graph.find_nodes(op="get_attr")}
    inputs = (value(n) for n in gm.graph.find_nodes(op="placeholder"))
    return next((v.device for v in inputs if isinstance(v, Tensor) and at - {v.device}), None)


def _copy(gm: fx.GraphModule, n: fx.Node, first: fx.Node, device: torch.device) -> None:
    """Copies a tensor in front of its first reader, for all of them."""
    readers = list(n.users)
    with gm.graph.inserting_before(first):
        copy = add_op(gm, aten.to.device, n, device, value(n).dtype)
    for reader in readers:
        reader.replace_input_with(n, copy)


def _move(gm: fx.GraphModule, n: fx.Node, device: torch.device) -> None:
    """Has a node's value made on the device, and records it: its strides may be others there."""
    if n.op == "call_function":
        n.args, n.kwargs = fx.node.map_aggregate(
            (n.args, n.kwargs), lambda a: device if isinstance(a, torch.device) else a
        )
        alone = isinstance(n.target, OpOverload) and not any(isinstance(value(a), Tensor) for a in n.all_input_nodes)
        if alone and any(a.name == "device" for a in schema(n.target).arguments):  # it makes a tensor of sizes alone
            n.kwargs = {**n.kwargs, "device": device}
    if not any(isinstance(v, Tensor) for v in pytree.tree_leaves(value(n))):
        return
    if n.op == "call_function" and call_key(n.target, *fx.node.map_arg((n.args, n.kwargs), value)) is not None:
        record(gm, n)
    else:  # an argument, or sizes that depend on values, whose symbols others have
        n.meta["val"] = pytree.tree_map_only(Tensor, lambda v: _there(gm, v, device), value(n))


def _there(gm: fx.GraphModule, v: Tensor, device: torch.device) -> Tensor:
    with about(gm).fake_mode:
        return torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=device)
