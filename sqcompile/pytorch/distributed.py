"""distributed: tensors that several processes hold together. Imports nothing of them before there is one.

name                  what for                                                                       tried on
is_distributed        tells a DTensor from other tensors                                             2.11, 2.13
local_part            what this process holds of a DTensor, always one object: to_local() makes new ones   2.11, 2.13
traceable             lets torch.export look into DTensors: it would record how they are made         2.11, 2.13
group_name            by what collectives in a graph know a group                                    2.11, 2.13
group_named           the group of that name                                                         2.11, 2.13
new_shared_memory     GPU memory that other processes can write to (symmetric memory)                 2.11
addresses_of          where those of a group have theirs                                              2.11
joined_by_nvlink      the GPUs that NVLink, or an NVSwitch, joins a GPU to                            2.11
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

__all__ = [
    "addresses_of",
    "group_name",
    "group_named",
    "is_distributed",
    "joined_by_nvlink",
    "local_part",
    "new_shared_memory",
    "traceable",
]


def is_distributed(t: Any) -> bool:
    """Whether it is a DTensor, without importing what one is."""
    return isinstance(t, Tensor) and is_wrapper_subclass(t) and hasattr(t, "placements")


def local_part(t: Any) -> Any:
    """What this process holds of a DTensor, the very tensor; anything else as it is."""
    return t._local_tensor if is_distributed(t) else t


def group_name(group: Any) -> str:
    """The name of a process group in ``_c10d_functional`` operators; others have it otherwise."""
    return group.group_name


def group_named(name: str) -> Any:
    """The process group whose `group_name` it is."""
    from torch.distributed import distributed_c10d

    resolve: Any = distributed_c10d._resolve_process_group
    return resolve(name)


def new_shared_memory(size: int, device: torch.device) -> Tensor:
    """uint8 [size] on a GPU, whose memory other processes can be let write to (`addresses_of`)."""
    from torch.distributed import _symmetric_memory

    symmetric: Any = _symmetric_memory
    memory: Tensor = symmetric.empty(size, dtype=torch.uint8, device=device)
    return memory


def addresses_of(memory: Tensor, group: str) -> list[int]:
    """Where each process of a group has its `new_shared_memory`, for this one's GPU, by rank. All of them call it.

    Raises:
        RuntimeError: where a process cannot write to the memory of another.
    """
    from torch.distributed import _symmetric_memory

    symmetric: Any = _symmetric_memory
    handle = symmetric.rendezvous(memory, group)
    addresses = [int(p) + int(getattr(handle, "offset", 0)) for p in handle.buffer_ptrs]
    if addresses[handle.rank] != memory.data_ptr():
        raise RuntimeError("symmetric memory does not lie where it says")
    return addresses


def joined_by_nvlink(device: torch.device) -> list[int]:
    """Which of the CUDA devices of this process; none where the driver does not say."""
    from torch._C import _autograd, _distributed_c10d

    engine: Any = _distributed_c10d
    try:
        joined = engine._detect_dma_connectivity(_autograd.DeviceType.CUDA, "nvlink").matrix
    except RuntimeError:
        return []
    return [i for i, links in enumerate(joined[device.index]) if links and i != device.index]


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
