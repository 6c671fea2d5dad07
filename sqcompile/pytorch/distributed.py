"""distributed: tensors that several processes hold together. Imports nothing of them before there is one.

name                  what for                                                                       tried on
is_distributed        tells a DTensor from other tensors                                             2.11, 2.13
local_part            what this process holds of a DTensor, always one object: to_local() makes new ones   2.11, 2.13
traceable             lets torch.export look into DTensors: it would record how they are made         2.11, 2.13
group_name            by what collectives in a graph know a group                                    2.11, 2.13
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sqcompile.pytorch.core import is_wrapper_subclass

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_distributed(t: Any) -> bool:
    """Whether it is a DTensor, without importing what one is."""
    return isinstance(t, Tensor) and is_wrapper_subclass(t) and hasattr(t, "placements")


def local_part(t: Any) -> Any:
    """What this process holds of a DTensor, the very tensor; anything else as it is."""
    return t._local_tensor if is_distributed(t) else t


def group_name(group: Any) -> str:
    """The name of a process group in ``_c10d_functional`` operators; others have it otherwise."""
    return group.group_name


@contextlib.contextmanager
def traceable(redistributed: Callable[[Callable[..., DTensor], DTensor], Callable[..., DTensor]]) -> Iterator[None]:
    """DTensors are looked into meanwhile by who traces, and their collectives are functional.

    torch.export records the constructor of a DTensor as a call, and has no way to lower that call again. In the other threads
    nothing changes: constructors do nothing but that, and ``all_reduce`` gives the same.

    Args:
        redistributed: given ``DTensor.redistribute`` and a DTensor, what is called in its place.
    """
    from torch import distributed as dist
    from torch.distributed import _functional_collectives as functional
    from torch.distributed.tensor import DTensor

    init, move, reduce = DTensor.__init__, DTensor.redistribute, dist.all_reduce

    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        """The constructor without its record: all of a DTensor is made by ``__new__``."""

    def redistribute(self: DTensor, *args: Any, **kwargs: Any) -> DTensor:
        return redistributed(move, self)(*args, **kwargs)

    def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        if not torch.compiler.is_compiling() or async_op or op != dist.ReduceOp.SUM:
            return reduce(tensor, op, group, async_op)
        return tensor.copy_(functional.all_reduce(tensor, "sum", group or dist.distributed_c10d._get_default_group()))

    try:
        DTensor.__init__, DTensor.redistribute, dist.all_reduce = made, redistribute, all_reduce  # type: ignore[method-assign]
        yield
    finally:
        DTensor.__init__, DTensor.redistribute, dist.all_reduce = init, move, reduce  # type: ignore[method-assign]
