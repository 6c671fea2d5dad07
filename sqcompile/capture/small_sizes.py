"""small_sizes: whether a captured graph serves sizes of one and of none, with which torch.export does not reckon.

    if y.shape[1] > 1: y = y - y.mean(1)       # captured with 9 tokens: the graph subtracts the mean of any number
->
    x.shape[1] > 1                             # a condition of the graph: a call with one token is refused

torch.export begins sizes at 2. What compares one with 1 or 0, or squeezes, is decided by that, and no guard says so. So the
model is run with such sizes, and the graph beside it. Other sizes are small meanwhile. Where the model raises nothing is known.
"""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from sqcompile.capture.captured import Captured, Input, flatten_like
from sqcompile.capture.inputs import Call
from sqcompile.capture.trace import run_as_captured
from sqcompile.errors import CaptureError
from sqcompile.passes.ir.about import about
from sqcompile.pytorch.core import pytree

_MOST = 2**16  # elements of a call whose other sizes cannot be made small
_ALIKE = 1e-2  # relative error of two computations of the same, in half precision, too


def refuse_small_sizes(gm: fx.GraphModule, model: nn.Module, call: Call) -> None:
    """Adds to the calls that a graph serves the condition that a size is more than one, or than none, where that matters.

    A model of which not all tensors are in this process is not run.

    Args:
        gm: its traced graph.
        model: what was captured.
        call: like the one that it was captured with; its values count for nothing.

    Raises:
        CaptureError: if that call itself has such a size.
    """
    held = [gm.get_buffer(str(n.target)) for n in gm.graph.find_nodes(op="get_attr")]
    if about(gm).parallel.count > 1 or any(x.is_meta for x in held):
        return
    like, call = about(gm).calls, _with_values(call)
    together: dict[tuple[int, int], set[str]] = {}  # ids and a mask have one batch, also where the graph allows two
    for x, have in zip(flatten_like(call, like), like.leaves, strict=True):
        for d, s in enumerate(have.shape if isinstance(have, Input) else ()):
            if isinstance(s, str) and not any(s in symbols for symbols in together.values()):
                together.setdefault((d, x.shape[d]), set()).add(s)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # of means over nothing
        for symbols in together.values():
            for size in (1, 0):
                small = _smaller(call, like, symbols, size)
                if small is not None and _differs(gm, small, like, model):
                    new = (f"{symbol} > {size}" for symbol in sorted(symbols))
                    like = replace(like, conditions=(*like.conditions, *new))
                    break
    flatten_like(call, like)
    about(gm).captured = like


def _with_values(call: Call) -> Call:
    """The call with ones for integers, which any table has and any mask lets through, and random numbers."""
    generator = torch.Generator().manual_seed(0)

    def values(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return torch.ones_like(x)
        return torch.randn(x.shape, generator=generator).to(x.device, x.dtype)

    args, kwargs = pytree.tree_map_only(Tensor, values, (call.args, call.kwargs))
    return replace(call, args=args, kwargs=kwargs)


def _smaller(call: Call, like: Captured, symbols: set[str], size: int) -> Call | None:
    """The call with some sizes cut to so many, and the others to two, or as they were; None where the graph serves neither."""
    for others in (2, None):
        leaves = [
            _cut(x, have.shape, symbols, size, others) if isinstance(have, Input) else x
            for x, have in zip(flatten_like(call, like), like.leaves, strict=True)
        ]
        args, kwargs = like.spec.unflatten(leaves)
        small = replace(call, args=args, kwargs=kwargs)
        with contextlib.suppress(CaptureError):
            flatten_like(small, like)
            if sum(x.numel() for x in leaves if isinstance(x, Tensor)) <= _MOST:
                return small
    return None


def _cut(x: Tensor, shape: tuple[int | str, ...], symbols: set[str], size: int, others: int | None) -> Tensor:
    for d, s in enumerate(shape):
        if isinstance(s, str):
            wanted = size if s in symbols else x.shape[d] if others is None else others
            x = x.narrow(d, 0, min(wanted, x.shape[d]))
    return x.contiguous()


def _differs(gm: fx.GraphModule, call: Call, like: Captured, model: nn.Module) -> bool:
    """Whether the graph gives something else than the model, which is seen to give the same twice."""
    try:
        want = pytree.tree_leaves(run_as_captured(model, call))
        if not _same(want, pytree.tree_leaves(run_as_captured(model, call))):
            return False
    except Exception:
        return False
    try:
        with torch.no_grad():
            got = fx.Interpreter(gm).run(*flatten_like(call, like), enable_io_processing=False)
    except Exception:  # which a call would raise in words of PyTorch's
        return True
    return not _same(want, got)


def _same(want: Any, got: Any) -> bool:
    if len(want) != len(got):
        return False
    return all(
        _alike(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        for a, b in zip(want, got, strict=True)
    )


def _alike(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    if not torch.equal(a.isnan(), b.isnan()):
        return False
    a, b = a.double().nan_to_num(), b.double().nan_to_num()
    return float((a - b).norm()) <= _ALIKE * max(float(a.norm()), 1e-12)
