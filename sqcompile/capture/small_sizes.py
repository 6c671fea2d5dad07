"""small_sizes: whether a captured graph serves sizes of one and of none, with which torch.export does not reckon.

    if y.shape[1] > 1: y = y - y.mean(1)       # captured with 9 tokens: the graph subtracts the mean of any number
->
    x.shape[1] > 1                             # a condition of the graph: a call with one token is refused

torch.export begins sizes at 2. What compares one with 1 or 0 is decided by that, and no guard says so. Compilers drop what
squeezes an open size, too. So the model is run with such sizes, and the graph beside it, without what they drop. Other sizes are
small meanwhile. Where the model raises, or a call cannot be made small, nothing is known.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from sqcompile.capture.captured import Captured, Input, flatten_like
from sqcompile.capture.inputs import Call
from sqcompile.capture.trace import run_as_captured
from sqcompile.errors import CaptureError
from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import aten, clone, value
from sqcompile.pytorch.core import pytree

_MOST = 2**20  # elements of a call that is tried
_ALIKE = 1e-2  # relative error of two computations of the same, in half precision, too
_HUGE = 1e30  # what stands for infinity in a mask


def refuse_small_sizes(gm: fx.GraphModule, model: nn.Module, call: Call) -> None:
    """Adds to the calls that a graph serves the condition that a size is more than one, or than none, where that matters.

    The model runs a few times, on parts of the example; its hooks see that. One of which not all tensors are in this process
    does not.

    Args:
        gm: its traced graph.
        model: what was captured.
        call: the example that it was captured with.

    Raises:
        CaptureError: if the example itself has a size that the graph does not serve.
    """
    held = [gm.get_buffer(str(n.target)) for n in gm.graph.find_nodes(op="get_attr")]
    if about(gm).parallel.count > 1 or any(x.is_meta for x in held):
        return
    like, run = about(gm).calls, fx.Interpreter(_without_squeezes(gm))
    try:
        flatten_like(call, like)
    except CaptureError:  # which whoever calls it is told
        return
    drawn = sorted({x.device.index or 0 for x in held if x.is_cuda})
    with warnings.catch_warnings(), torch.random.fork_rng(devices=drawn):
        warnings.simplefilter("ignore")  # of means over nothing
        groups = _groups(call, like)
        for symbols in groups:
            for size in (1, 0):
                if _differs(run, call, like, symbols, size, model):
                    alone = [s for s in symbols if len(symbols) > 1 and _differs(run, call, like, [s], size, model)]
                    like = _with_condition(like, alone or symbols, size, each=bool(alone))
                    break
        every = [s for symbols in groups for s in symbols]
        if len(groups) > 1 and _differs(run, call, like, every, 1, model):
            like = _with_condition(like, every, 1, each=False)
    flatten_like(call, like)
    about(gm).captured = like


def with_values(call: Call) -> Call:
    """A call of zeros, as a plan keeps it, with random numbers for floats; a zero is an index of any table."""
    generator = torch.Generator().manual_seed(0)

    def values(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator).to(x.device, x.dtype) if x.is_floating_point() else x

    args, kwargs = pytree.tree_map_only(Tensor, values, (call.args, call.kwargs))
    return replace(call, args=args, kwargs=kwargs)


def _without_squeezes(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy whose open sizes are not squeezed, as compilers leave it that take them for more than one."""
    gm = clone(gm)
    for n in list(gm.graph.nodes):
        if n.target in (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims):
            shape = value(n.args[0]).shape
            given = n.args[1] if len(n.args) > 1 else range(len(shape))
            dims = [d for d in ((given,) if isinstance(given, int) else given) if shape and isinstance(shape[d], int)]
            n.target, n.args = aten.squeeze.dims, (n.args[0], dims)
    return gm


def _groups(call: Call, like: Captured) -> list[list[str]]:
    """Symbols of sizes that are one for the example, such as the batch of ids and of their mask: they are tried together."""
    found: dict[tuple[int, int], list[str]] = {}
    for x, have in zip(flatten_like(call, like), like.leaves, strict=True):
        for d, s in enumerate(have.shape if isinstance(have, Input) else ()):
            if isinstance(s, str) and not any(s in symbols for symbols in found.values()):
                found.setdefault((d, x.shape[d]), []).append(s)
    return [*found.values()]


def _with_condition(like: Captured, symbols: Collection[str], size: int, each: bool) -> Captured:
    """More calls are refused: where any of some sizes is so small, or where all are."""
    new = [f"{s} > {size}" for s in symbols] if each else [f"{' + '.join(symbols)} > {size * len(symbols)}"]
    return replace(like, conditions=(*like.conditions, *new))


def _differs(
    run: fx.Interpreter, call: Call, like: Captured, symbols: Collection[str], size: int, model: nn.Module
) -> bool:
    """Whether the graph gives something else than the model where some sizes are so small."""
    small = _smaller(call, like, symbols, size)
    if small is None:
        return False
    try:
        want = pytree.tree_leaves(run_as_captured(model, small))
    except CaptureError:  # it writes to its state, which the graph does not
        return True
    except Exception:
        return False
    try:
        with torch.no_grad():
            got = run.run(*flatten_like(small, like), enable_io_processing=False)
    except (torch.OutOfMemoryError, MemoryError):
        return False
    except Exception:  # which a call would raise in words of PyTorch's
        return True
    # a model that draws gives something else each time, which says nothing
    return not _same(want, got) and _same(want, pytree.tree_leaves(run_as_captured(model, small)))


def _smaller(call: Call, like: Captured, symbols: Collection[str], size: int) -> Call | None:
    """The call with some sizes cut to so many, and the others to two, or as they were; None where the graph serves neither."""
    given = flatten_like(call, replace(like, conditions=()))
    for others in (2, None):
        leaves = [
            _cut(x, have.shape, symbols, size, others) if isinstance(have, Input) else x
            for x, have in zip(given, like.leaves, strict=True)
        ]
        args, kwargs = like.spec.unflatten(leaves)
        small = replace(call, args=args, kwargs=kwargs)
        with contextlib.suppress(CaptureError):
            flatten_like(small, like)
            if sum(x.numel() for x in leaves if isinstance(x, Tensor)) <= _MOST:
                return small
    return None


def _cut(x: Tensor, shape: tuple[int | str, ...], symbols: Collection[str], size: int, others: int | None) -> Tensor:
    for d, s in enumerate(shape):
        if isinstance(s, str):
            wanted = size if s in symbols else x.shape[d] if others is None else others
            x = x.narrow(d, 0, min(wanted, x.shape[d]))
    return x.contiguous()


def _same(want: Any, got: Any) -> bool:
    if len(want) != len(got):
        return False
    pairs = zip(want, got, strict=True)
    return all(_alike(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b for a, b in pairs)


def _alike(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    a, b = a.double(), b.double()
    told = a.abs() < _HUGE
    if not torch.equal(told, b.abs() < _HUGE) or not torch.equal(
        a.sign()[~told].nan_to_num(), b.sign()[~told].nan_to_num()
    ):
        return False
    return float((a - b)[told].norm()) <= _ALIKE * max(float(a[told].norm()), 1e-12)
