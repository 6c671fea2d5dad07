"""dynamic_axes: which sizes of a call torch.export is asked to leave open, and sizes at which it can."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from sqcompile.capture.inputs import Call
from sqcompile.pytorch.core import pytree

Axis = tuple[int, int]  # a leaf of the call, and its dimension


def open_axes(call: Call, lengths: Collection[Axis] = ()) -> list[tuple[Tensor, list[int]]]:
    """The tensors of a call with the dims that are dynamic wherever the model allows it, in order.

    Tokens and masks are [batch, sequence], embeddings [batch, sequence, channel], anything else has a batch. Masks of scores,
    [batch, heads, sequence, sequence], have sequences of which there are tokens. ``lengths`` are further ones.
    """
    leaves = enumerate(pytree.tree_leaves((call.args, call.kwargs)))
    tensors = [(i, x) for i, x in leaves if isinstance(x, Tensor)]
    sequences = {x.shape[1] for _, x in tensors if x.dim() == 2 and not x.dtype.is_floating_point} - {1}
    found = []
    for i, x in tensors:
        known = 2 if not x.dtype.is_floating_point or x.dim() == 3 else 1
        more = [d for leaf, d in lengths if leaf == i]
        scores = [d for d in (2, 3) if x.dim() == 4 and x.shape[d] in sequences]
        found.append((x, sorted({*range(min(x.dim(), known)), *more, *scores})))
    return found


def find_lengths(model: nn.Module, call: Call) -> set[Axis]:
    """Last dims that may be a time: of audio [batch, time] or features [batch, channel, time].

    It is none where a tensor of the model has that size: it is a number of channels then.
    """
    sizes = {s for t in itertools.chain(model.parameters(), model.buffers()) for s in t.shape}
    leaves = enumerate(pytree.tree_leaves((call.args, call.kwargs)))
    floats = [(i, x) for i, x in leaves if isinstance(x, Tensor) and x.dtype.is_floating_point and x.dim() in (2, 3)]
    return {(i, x.dim() - 1) for i, x in floats if x.shape[-1] > 1 and x.shape[-1] not in sizes}


def pinned(exported: torch.export.ExportedProgram, lengths: Collection[Axis]) -> set[Axis]:
    """Those of ``lengths`` that the model allows one size only."""
    names = exported.graph_signature.user_inputs
    values = {n.name: n.meta.get("val") for n in exported.graph.find_nodes(op="placeholder")}

    def size(axis: Axis) -> Any:
        return values[names[axis[0]]].shape[axis[1]]

    return {a for a in lengths if not isinstance(size(a), torch.SymInt) or size(a).node.expr.is_number}


def grown(call: Call, lengths: Collection[Axis] = (), across: bool = False) -> Call:
    """The call with sizes at which its open dims can stay symbolic.

    torch.export fixes dims of size 1 and merges dims of equal size, so a batch of 1 grows to 2 and batch, sequence
    and so on get sizes of their own. Values do not matter: export runs on fake tensors.

    Args:
        call: the call.
        lengths: see `open_axes`.
        across: whether equal sizes in different dims are one, such as tokens in [batch, tokens, channel] and [tokens, 3].
    """
    tensors = open_axes(call, lengths)
    sizes: dict[tuple[int, int], int] = {}
    broadcast = {d for d in range(3) if len({x.shape[d] for x, axes in tensors if d in axes}) > 1}
    for x, axes in tensors:
        for d in axes:
            size = x.shape[d]
            if size == 1 and d in broadcast and not across:
                continue  # broadcasts against another input: stays 1
            key = (0 if across else d, size)
            new = max(size, 2)
            while key not in sizes and new in sizes.values():
                new += 1
            sizes.setdefault(key, new)
    todo = iter(tensors)

    def grow(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        axes = next(todo)[1]
        return x.new_zeros([sizes.get((0 if across else d, s), s) if d in axes else s for d, s in enumerate(x.shape)])

    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    args, kwargs = pytree.tree_unflatten([grow(x) for x in leaves], spec)
    return replace(call, args=args, kwargs=kwargs)


def dims_of(model: nn.Module, call: Call, lengths: Collection[Axis] = ()) -> Any:
    """``dynamic_shapes`` for torch.export: the open dims are dynamic wherever the model leaves them so."""
    todo = iter(open_axes(call, lengths))

    def dims(x: Any) -> Any:
        return {d: Dim.AUTO for d in next(todo)[1] if x.shape[d] > 1} if isinstance(x, Tensor) else None

    args, kwargs = pytree.tree_map(dims, (call.args, call.kwargs))
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
