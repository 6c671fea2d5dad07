"""run: a graph on one call, in float64 where it can be, and how far two results are from each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.process.interrupts import checkpoint
from sqcompile.pytorch.core import pytree
from sqcompile.statistics.sample import is_random

# What rounding costs two graphs of the same function, as a relative error of their outputs. A wrong fold is off by about
# as much as its scales are from 1, tenths and more. float64: some millions of its eps 2e-16, which no depth reaches, and
# a millionth of what one wrong channel in a thousand would do. float32: what every fold must keep (`passes.rewrite.fold`).
# In half precision folded parameters are rounded anew, by up to eps / 2 each, and 8 eps leave room for some layers of that;
# a wrong fold that changes little is then hidden.
FOLD = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 8 * 2.0**-10, torch.bfloat16: 8 * 2.0**-7}

# What rounding costs one operator. Sums of integers are exact, and what is scaled in float32 differs in the order of a few
# roundings; a result in half precision is rounded once or twice, by eps / 2 each; an int8 value may fall to the next step,
# in few of many places.
NODE = {
    torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2 * 2.0**-10, torch.bfloat16: 2 * 2.0**-7,
    torch.int8: 1e-2, torch.uint8: 1e-2,
}  # fmt: skip


# FP8 products on tensor cores: sums keep 14 bits or more.
FP8_NODE = 2.0**-11


def outputs(gm: fx.GraphModule, arguments: Sequence[Any], least: torch.dtype) -> list[Tensor]:
    """The tensors that a graph returns: those of floating point, if there are any.

    Args:
        least: what narrower floating dtypes become, of parameters, of values, and where the graph asks for one.
    """
    run = _Widened(gm, least)
    gpus = {a.device for a in arguments if isinstance(a, Tensor) and a.device.type == "cuda"}
    with torch.random.fork_rng(list(gpus), enabled=is_random(gm)):
        if is_random(gm):
            torch.manual_seed(0)
        out = pytree.tree_leaves(run.run(*arguments, enable_io_processing=False))
    tensors = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in out if isinstance(t, Tensor)]
    return [t for t in tensors if t.is_floating_point()] or tensors


class _Widened(fx.Interpreter):
    """Runs a graph in a wider dtype. Parameters are widened as they are read, so that no second copy of the model exists."""

    def __init__(self, gm: fx.GraphModule, least: torch.dtype) -> None:
        super().__init__(gm)
        self.extra_traceback = False
        self.least = least

    def run_node(self, n: fx.Node) -> Any:
        checkpoint()
        return pytree.tree_map_only(Tensor, self._widened, super().run_node(n))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(target, *fx.node.map_aggregate((args, kwargs), self._widened))

    def _widened(self, x: Any) -> Any:
        if isinstance(x, torch.dtype):
            return self.least if x.is_floating_point and torch.finfo(x).eps > torch.finfo(self.least).eps else x
        return x.to(self._widened(x.dtype)) if isinstance(x, Tensor) else x


def relative_error(y: Any, want: Any) -> float:
    """``|y - want| / |want|`` over all elements; infinite for another shape or dtype, or NaN or infinity in other places."""
    if not isinstance(y, Tensor) or not isinstance(want, Tensor):
        return 0.0 if type(y) is type(want) and y == want else math.inf
    if y.shape != want.shape or y.dtype != want.dtype:
        return math.inf
    wide = torch.complex128 if want.is_complex() else torch.float64
    y, want = y.to(wide), want.to(wide)
    finite = want.isfinite()
    if not bool(((y == want) | (y.isnan() & want.isnan()) | finite & y.isfinite()).all()):
        return math.inf
    signal, noise = want[finite].norm(), (y[finite] - want[finite]).norm()
    return float(noise / signal) if signal else float(noise)
