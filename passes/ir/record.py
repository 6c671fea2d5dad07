"""record: what each call of a rewritten graph gives, as export recorded it for the graph that was traced."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.passes.ir.about import about
from sqcompile.process.interrupts import checkpoint
from sqcompile.pytorch.core import FakeTensor, OpOverload, enable_python_dispatcher, pytree, storage_id


def record(gm: fx.GraphModule, node: fx.Node) -> None:
    """Computes the value of a call from those of its arguments.

    The layers of a model repeat their calls: what a call on the same sizes gave is not computed again. Graphs of one memory
    have the same values: each takes those of a call that there are, in turn, and makes another one, alike, if it needs more.
    """
    checkpoint()
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
    mode, known, taken = about(gm).fake_mode, about(gm).recorded, about(gm).taken
    key = call_key(node.target, args, kwargs)
    if key in known:
        taken[key] = nth = taken.get(key, 0) + 1
        if nth <= len(known[key]):
            node.meta["val"] = known[key][nth - 1]
            return
    # the Python dispatcher: composite operators in C++ do not all take symbolic sizes
    with mode, enable_python_dispatcher():
        if key in known:
            like = known[key][0]
            node.meta["val"] = v = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
            known[key].append(v)
            return
        node.meta["val"] = v = node.target(*args, **kwargs)  # type: ignore[operator]
    # a view is recorded as one, with the storage of its operand
    own = isinstance(v, FakeTensor) and not any(_shares(v, a) for a in pytree.tree_leaves((args, kwargs)))
    if key is not None and own:
        known[key], taken[key] = [v], 1


def call_key(target: Any, args: Any, kwargs: Any) -> Any:
    """What the value of a call depends on; None where that is more than sizes, dtypes and numbers.

    An operator whose result, or its size, depends on values makes a symbol of its own in each call.
    """
    values = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
    if not isinstance(target, OpOverload) or values & set(target.tags):
        return None
    leaves, spec = pytree.tree_flatten((args, kwargs))
    key: list[Any] = [target, spec]
    for x in leaves:
        if isinstance(x, FakeTensor):
            sizes = tuple(layout(x))
            key.append((x.dtype, x.device, x.dim(), sizes, _plain(x.storage_offset())))
        elif isinstance(x, Tensor):  # packed for a kernel
            return None
        else:
            key.append((type(x), _plain(x)))
    return tuple(key)


def substitute(gm: fx.GraphModule, old: fx.Node, new: fx.Node, readers: Collection[fx.Node] | None = None) -> None:
    """Puts a node in another's place, of the same dtype, for some readers, or all; where strides differ, records them anew."""
    old.replace_all_uses_with(new, delete_user_cb=lambda user: readers is None or user in readers)
    assert value(new).dtype == value(old).dtype
    if layout(value(new)) != layout(value(old)):
        record_readers(gm, new)


def record_readers(gm: fx.GraphModule, node: fx.Node) -> None:
    """Recomputes ``meta["val"]`` downstream of a node whose strides differ from those of the node it replaced.

    What a graph is cut at, and what is returned, is compiled for the strides that are recorded.
    """
    for user in node.users:
        packed = any(isinstance(value(a), Tensor) and value(a).is_mkldnn for a in user.all_input_nodes)
        if user.op == "call_function" and not packed:  # whose result is dense
            before = layout(value(user))
            record(gm, user)
            if layout(value(user)) != before:
                record_readers(gm, user)


def layout(v: Any) -> Any:
    """Sizes and strides of a value, as expressions."""
    if isinstance(v, (list, tuple)):
        return [layout(x) for x in v]
    sizes = [*v.shape, *v.stride()] if isinstance(v, Tensor) else []
    return [_plain(s) for s in sizes]


def _plain(x: Any) -> Any:
    """A number, as an expression if it is symbolic."""
    return x.node.expr if isinstance(x, (torch.SymInt, torch.SymFloat, torch.SymBool)) else x


def _shares(x: Tensor, other: Any) -> bool:
    return isinstance(other, Tensor) and not other.is_mkldnn and storage_id(x) == storage_id(other)


def value(node: fx.Node) -> Any:
    """What the node holds, as export recorded it: a fake tensor, a SymInt, or a tuple of them."""
    return node.meta.get("val")
