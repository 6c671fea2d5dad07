"""all_reduce: ``torch.ops.sqcompile.all_reduce``, the sum over the processes of a group. Plain PyTorch's, but for GPUs that
NVLink joins: they write into the memory of each other (`triton.all_reduce`).

What has to be alike for that is found out once for a group, at its first sum, which all of its processes are at anyway.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from sqcompile.errors import first_line
from sqcompile.kernels import fused
from sqcompile.process.streams import following
from sqcompile.pytorch.core import collectives
from sqcompile.pytorch.distributed import addresses_of, group_named, joined_by_nvlink, new_shared_memory

log = logging.getLogger("sqcompile")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PIECE = 16 << 20  # bytes; larger tensors are summed in pieces
# Bytes that a GPU may write to others for one tensor, where NCCL writes two tensors whatever their number. Two GPUs were
# measured, where ours is always faster; for more this is what their links move in what NCCL takes to begin.
_MOST = 4 << 20


@dataclass(eq=False)
class Exchange:
    """Memory of a process's GPU that the others of its group write to, and they theirs."""

    memory: Tensor
    memories: Tensor
    calls: Tensor
    place: int
    rank: int
    count: int

    def takes(self, x: Tensor) -> bool:
        return x.dtype in DTYPES and (self.count == 2 or x.nbytes <= self.place)

    def summed(self, x: Tensor) -> Tensor:
        from sqcompile.kernels.triton.all_reduce import all_reduce as kernel

        if not torch.cuda.is_current_stream_capturing():  # within a CUDA graph its own order holds
            follow_sums(x.device)
        x = x.contiguous()
        out = torch.empty_like(x)
        step = self.place // x.element_size()
        for part, result in zip(x.view(-1).split(step), out.view(-1).split(step), strict=True):
            kernel(part, result, self.memories, self.calls, self.place, self.rank, self.count)
        return out


_last: dict[torch.device, torch.cuda.Stream] = {}  # the stream of the last sums, by device


def follow_sums(device: torch.device) -> None:
    """Has sums of this stream come after those of another one before it. Who replays a CUDA graph with sums asks for it, too.

    Two that run at once would take turns at the same memory, and be wrong.
    """
    if any(exchange is not None for _, exchange in [*_exchanges.values()]):
        _last[device] = following(_last.get(device), device)


def all_reduce(x: Tensor, group: str) -> Tensor:
    """The sum of x over the processes of a group, of x's shape and dtype; each process has x of one size.

    GPUs of one machine that NVLink joins write to each other's memory, add in float32 and round once; with
    ``NCCL_P2P_DISABLE=1`` they do not. They take 64 MiB each for a group of two, up to 16 MiB for one of more. A GPU whose
    partner has died waits for ever: whoever started the processes ends them, as torchrun does. Streams are put into order here;
    CUDA graphs that a user has recorded are replayed on the stream of other sums, or after waiting for it.
    """
    if x.is_cuda and x.numel():
        exchange = _exchange_of(group, x.device)
        if exchange is not None and exchange.takes(x):
            return exchange.summed(x)
    return collectives.wait_tensor(collectives.all_reduce(x.contiguous(), "sum", group))


_exchanges: dict[str, tuple[Any, Exchange | None]] = {}  # a group and its memory, by the group's name
_making: dict[str, threading.Lock] = {}  # by group: others may be made at the same time, by other processes, too


def _exchange_of(name: str, device: torch.device) -> Exchange | None:
    """A group's memory, made at its first call; None where NCCL sums. Not made while a CUDA graph is recorded: it waits."""
    group = group_named(name)
    with _making.setdefault(name, threading.Lock()):
        found, exchange = _exchanges.get(name, (None, None))
        if found is group:  # else it is of one that was destroyed
            return exchange
        if torch.cuda.is_current_stream_capturing():
            return None
        with torch.cuda.device(device):  # where the processes tell each other
            _exchanges[name] = group, _made(group, name, device)
        return _exchanges[name][1]


def _made(group: Any, name: str, device: torch.device) -> Exchange | None:
    """All processes go through it alike: each step that may fail in one is told to all before the next."""
    count, rank = dist.get_world_size(group), dist.get_rank(group)
    if not _joined(_told(group, _tried(lambda: _reach(device))[0])):
        log.debug("GPUs sum through NCCL: NVLink does not join those of all processes, as far as each of them sees")
        return None
    from sqcompile.kernels.triton.all_reduce import BLOCKS, memory_bytes  # here: not everybody has Triton

    place = _PIECE if count == 2 else _MOST // (count - 1) // 16 * 16
    memory, why = _tried(lambda: new_shared_memory(memory_bytes(place, count), device).zero_())
    torch.cuda.synchronize(device)  # the zeros are there before others write
    if _refused(group, why):
        return None
    addresses, why = _tried(lambda: addresses_of(memory, name))
    if _refused(group, why):
        return None
    calls = torch.zeros(BLOCKS, dtype=torch.int32, device=device)
    return Exchange(memory, torch.tensor(addresses, device=device), calls, place, rank, count)


def _refused(group: Any, why: str) -> bool:
    """Whether a step has failed in a process of a group, for a reason; "" for none."""
    reasons = [reason for reason in _told(group, why) if reason]
    if reasons:
        log.debug("GPUs sum through NCCL: %s", reasons[0])
    return bool(reasons)


def _tried(what: Callable[[], Any]) -> tuple[Any, str]:
    """What a function gives, or None and why not."""
    try:
        return what(), ""
    except Exception as e:
        return None, f"{type(e).__name__}: {first_line(e)}"


def _reach(device: torch.device) -> tuple[str, str, tuple[str, ...]] | None:
    """The machine, the GPU, and the GPUs that NVLink joins it to; None where none of them should be written to."""
    if not fused.available(device) or os.environ.get("NCCL_P2P_DISABLE") == "1":
        return None
    machine = Path("/proc/sys/kernel/random/boot_id")
    ids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    near = joined_by_nvlink(device)
    return machine.read_text() if machine.exists() else "", ids[device.index], tuple(ids[i] for i in near)


def _joined(reaches: list[tuple[str, str, tuple[str, ...]] | None]) -> bool:
    """Whether several GPUs of one machine are joined, each to all others."""
    found = [reach for reach in reaches if reach is not None]
    ids = {gpu for _, gpu, _ in found}
    alike = len(found) == len(reaches) == len(ids) > 1 and len({machine for machine, _, _ in found}) == 1
    return alike and all(ids <= {gpu, *near} for _, gpu, near in found)


def _told(group: Any, what: Any) -> list[Any]:
    """What each process of a group says, by rank."""
    said: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(said, what, group=group)
    return said
