"""samples: a few bytes of each weight, which tell that it was written to behind PyTorch's back.

PyTorch counts the writes to a tensor, but not those through ``.data``: ``p.data.copy_(new)`` leaves version and address.
What was read is compared with what is there now, some weights a call. A write that leaves a weight's sampled bytes as they
were is not seen, nor one to a weight whose turn is later: `sqcompile.refresh` is for those who write so.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from sqcompile.pytorch.core import StorageWeakRef, storage_of_ref

_AT_ONCE = 16  # weights a call, of those on the CPU; of those on a GPU it is one


def sample(tensor: Tensor) -> bytes | None:
    """Bytes in the middle of a tensor's values; on a GPU this waits. None where there are none to read."""
    if not _readable(tensor):
        return None
    if tensor.is_cpu:
        return ctypes.string_at(*_place(tensor))
    return _middle(tensor).cpu().view(torch.uint8).numpy().tobytes()


def _readable(tensor: Tensor) -> bool:
    there = tensor.layout == torch.strided and tensor.numel() > 0 and (tensor.is_cpu or tensor.is_cuda)
    return there and tensor.data_ptr() != 0  # of freed float values there is no memory


def _span(tensor: Tensor) -> int:
    """How many elements there are from the first to the last in memory."""
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def _place(tensor: Tensor) -> tuple[int, int]:
    """Address and size of the sample of a tensor on the CPU."""
    span, size = _span(tensor), tensor.element_size()
    return tensor.data_ptr() + span // 2 * size, min(8, span - span // 2) * size


def _middle(tensor: Tensor) -> Tensor:
    """The sample of a tensor as a tensor of the same memory."""
    span = _span(tensor)
    plain = tensor.detach()
    return plain.as_strided((min(8, span - span // 2),), (1,), plain.storage_offset() + span // 2)


class Samples:
    """What some tensors had in the middle of their memory, and a look at a few of them at each call."""

    def __init__(self, tensors: Sequence[Tensor], storages: Sequence[StorageWeakRef | None]) -> None:
        usable = [(i, t) for i, t in enumerate(tensors) if _readable(t) and storages[i] is not None]
        near = [(i, t) for i, t in usable if t.is_cpu]
        self.storages = [storages[i].cdata for i, _ in near]  # type: ignore[union-attr]
        self.places = [_place(t) for _, t in near]
        self.values = [ctypes.string_at(*place) for place in self.places]
        self.turn = itertools.cycle(range(0, max(1, len(near)), _AT_ONCE))
        self.remote = _Remote([(i, t) for i, t in usable if t.is_cuda])

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        """Whether those whose turn it is are as they were; for tensors that lie where they lay."""
        at = next(self.turn)
        turn = slice(at, at + _AT_ONCE)
        kept = [*map(storage_of_ref, self.storages[turn])]  # while their memory is read
        if None in kept:
            return False
        read = [ctypes.string_at(*place) for place in self.places[turn]]
        return read == self.values[turn] and (not self.remote.wanted or self.remote.hold(tensors))


class _Remote:
    """The samples of tensors on GPUs. Nothing waits: what is copied at one call is compared at a later one."""

    def __init__(self, tensors: Sequence[tuple[int, Tensor]]) -> None:
        self.wanted = [i for i, _ in tensors]
        with torch.inference_mode(False):  # it must not matter in which mode later calls are
            self.values = [_middle(t).cpu() for _, t in tensors]
            self.now = [v.pin_memory() for v in self.values]
        self.at = 0
        self.event: torch.cuda.Event | None = None
        self.lock = threading.Lock()

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        """Compares the last sample if the device has copied it by now, and then has the next one copied."""
        if torch.cuda.is_current_stream_capturing() or not self.lock.acquire(blocking=False):
            return True
        try:
            if self.event is not None:
                if not self.event.query():
                    return True
                if not torch.equal(_bits(self.now[self.at]), _bits(self.values[self.at])):
                    return False
                self.at = (self.at + 1) % len(self.wanted)
            t = tensors[self.wanted[self.at]]
            with torch.no_grad(), torch.cuda.device(t.device):
                self.now[self.at].copy_(_middle(t), non_blocking=True)
                self.event = torch.cuda.current_stream().record_event()
            return True
        finally:
            self.lock.release()


def _bits(t: Tensor) -> Tensor:
    """Which NaN is equal to itself in."""
    return t.view(torch.uint8)
