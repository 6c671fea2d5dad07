"""between: derivatives of what processes that hold a model together ask of each other; PyTorch's operators have none here.

Every process computes the same loss, once for all. So a sum that all of them read passes its gradient to each part, and what
all of them read, each to compute a part, has the sum of the gradients of these parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sqcompile.passes.ir.operators import COLLECTIVES
from sqcompile.process.parallel import Parallel


class Copied(torch.autograd.Function):
    """x itself, which all processes read: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parallel: Parallel) -> Tensor:
        ctx.parallel = parallel
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return ctx.parallel.summed(g), None


class _Between(torch.autograd.Function):
    """What an operator gives; its gradient is that of the operator's argument by ``back``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return forward(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return ctx.back(g), None, None


def _waited(parallel: Parallel, target: Any, x: Tensor, *args: Any) -> Tensor:
    parallel.meet(f"{target} {[*x.shape]}")
    return COLLECTIVES[1](target(x, *args))


def _reduced(parallel: Parallel, x: Tensor, *args: Any) -> Any:
    return _Between.apply(x, lambda x: _waited(parallel, COLLECTIVES[0], x, *args), lambda g: g)


def _gathered(parallel: Parallel, x: Tensor, *args: Any) -> Any:
    return _Between.apply(x, lambda x: _waited(parallel, COLLECTIVES[2], x, *args), parallel.own)


def _scattered(parallel: Parallel, x: Tensor, *args: Any) -> Any:
    return _Between.apply(x, lambda x: _waited(parallel, COLLECTIVES[3], x, *args), parallel.joined)


def _there(parallel: Parallel, x: Tensor) -> Tensor:
    """What was waited for already."""
    return x


REDUCED: dict[Any, Callable[..., Any]] = dict(zip(COLLECTIVES, (_reduced, _there, _gathered, _scattered), strict=False))
