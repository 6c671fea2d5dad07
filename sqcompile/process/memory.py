"""memory: files mapped into memory, whose pages are given back when the process grows beyond a limit.

with memory_limit(6 * 2**30):
    plan = sqcompile.calibrate(model, batches)       # of a model over mapped files (`sqcompile.open_checkpoint`)

What is read of a mapped file stays in the process's memory until somebody drops it. Nothing is lost by that: what is read
again comes from the file. What was written to a mapping is in no file, and such pages are never dropped.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import re
import sys
import warnings
import weakref
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from sqcompile.errors import RecipeError
from sqcompile.process.interrupts import watchers

_PRESENT, _SWAPPED, _OF_A_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))  # of an entry of /proc/self/pagemap
_AT_ONCE = 2**16  # entries that are read of it
_WORTH = 2**26  # bytes
_BETWEEN = 2**28  # bytes that may come between two looks, or the largest weight
_UNITS = {"": 1, "B": 1} | {
    f"{letter}{kind}": (1000 if kind == "B" else 1024) ** (i + 1)
    for i, letter in enumerate("KMGT")
    for kind in ("B", "iB")
}


class Mapped(mmap.mmap):
    """A file in memory, page by page as it is read. It lives as long as one of its tensors.

    Who writes to a tensor changes what this process sees, and not the file.
    """

    address: int

    @staticmethod
    def of(descriptor: int, size: int, start: int = 0) -> Mapped:
        """Bytes, at least one, of a file that is open for reading; the descriptor may be closed then.

        ``start`` is a multiple of ``mmap.ALLOCATIONGRANULARITY``: offsets are from there.

        Raises:
            OSError: if the system refuses.
        """
        if hasattr(mmap, "MAP_PRIVATE"):
            # Nothing is set aside for pages that might be written to: a file may be larger than memory.
            kind = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
            new = Mapped(descriptor, size, flags=kind, prot=mmap.PROT_READ | mmap.PROT_WRITE, offset=start)
        else:
            new = Mapped(descriptor, size, access=mmap.ACCESS_COPY, offset=start)
        new.address = torch.frombuffer(new, dtype=torch.uint8).data_ptr()
        _every.add(new)
        return new

    def tensor(self, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """The tensor that is at an offset of bytes, contiguous."""
        if not (count := math.prod(shape)):
            return torch.empty(tuple(shape), dtype=dtype)
        _largest[0] = max(_largest[0], count * dtype.itemsize)
        return torch.frombuffer(self, dtype=dtype, count=count, offset=offset).view(tuple(shape))

    def drop(self) -> None:
        """Gives back the memory of pages that are as they are in the file."""
        for start, end in _clean(self.address, len(self)):
            self.madvise(mmap.MADV_DONTNEED, start, end - start)


_every: weakref.WeakSet[Mapped] = weakref.WeakSet()
_largest = [0]  # bytes of a tensor of theirs, which one operation may read


def _clean(address: int, size: int) -> Iterator[tuple[int, int]]:
    """Ranges of bytes of a mapping that are in memory, less the pages that were written to."""
    page, count = mmap.PAGESIZE, -(-size // mmap.PAGESIZE)
    with open("/proc/self/pagemap", "rb", buffering=0) as f:
        for first in range(0, count, _AT_ONCE):
            f.seek((address // page + first) * 8)
            entries = np.frombuffer(f.read(min(_AT_ONCE, count - first) * 8), dtype=np.uint64)
            present = (entries & _PRESENT) != 0
            kept = present & ((entries & _OF_A_FILE) == 0) | ((entries & _SWAPPED) != 0)
            if not bool((present & ~kept).any()):
                continue
            edges = np.flatnonzero(np.diff(np.concatenate([[True], kept, [True]]).astype(np.int8)))
            for start, end in edges.reshape(-1, 2).tolist():
                yield (first + start) * page, min((first + end) * page, size)


def bytes_of(text: str) -> int:
    """The bytes that "6GiB", "500 MB" or "1000000" stands for.

    Raises:
        RecipeError: for other text.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?(?:i?B)?)", text.strip())
    if found is None or found[2] not in _UNITS or not float(found[1]):
        raise RecipeError(f"{text!r} is no size: write it as 6GiB, 500MB or a number of bytes")
    return int(float(found[1]) * _UNITS[found[2]])


@contextlib.contextmanager
def memory_limit(most: int) -> Iterator[None]:
    """Keeps the memory of the process at about so many bytes while sqcompile works, as far as it is of mapped files.

    Between two operations it is looked at, and where it is more, all pages of mapped files are given back: those of
    `open_checkpoint`, of artifacts, and of INT8 checkpoints. Calibration, and `evaluate` of paths, read each weight once then.
    They are read again when they are needed: from the system's cache where that has room, else from the disk. Activations and
    the weight at hand are the rest. Where these alone take more than the limit, a warning says so, once.

    Args:
        most: bytes. Two gigabytes more than the weights of one decoder layer are a good start.

    Raises:
        RecipeError: for what is no number of bytes, or on a system without /proc/self/pagemap (Linux has it).
    """
    if type(most) is not int or most <= 0:
        raise RecipeError(f"memory_limit({most!r}): pass a number of bytes, such as 6 * 2**30")
    if not os.access("/proc/self/pagemap", os.R_OK) or not hasattr(mmap, "MADV_DONTNEED"):
        raise RecipeError("memory_limit needs Linux's /proc/self/pagemap: leave it out here")
    watcher = _Watcher(most)
    watchers.append(watcher.look)
    try:
        yield
    finally:
        watchers.remove(watcher.look)
        watcher.close()


def limited() -> bool:
    """Whether the process is in a `memory_limit`."""
    return bool(watchers)


class _Watcher:
    def __init__(self, most: int) -> None:
        self.most, self.told, self.left = most, False, 0
        self._statm = os.open("/proc/self/statm", os.O_RDONLY)

    def close(self) -> None:
        os.close(self._statm)

    def resident(self) -> int:
        """Bytes of the process that are in memory."""
        return int(os.pread(self._statm, 128, 0).split()[1]) * mmap.PAGESIZE

    def look(self) -> None:
        start = self.most - min(self.most // 2, max(_BETWEEN, _largest[0] + _WORTH))
        if self.resident() <= max(start, self.left):  # no use to look through all files for a few pages
            return
        give_back()
        left = self.resident()
        self.left = left + _WORTH
        if left > self.most and not self.told:
            self.told = True
            warnings.warn(
                f"the process takes {left / 1e6:.0f} MB beside mapped weights, more than the limit of {self.most / 1e6:.0f} MB: "
                "pass smaller batches, or raise the limit",
                stacklevel=2,
            )


def give_back() -> None:
    """Gives back what is read again when it is needed, and what was freed."""
    for mapped in list(_every):
        mapped.drop()
    release_freed_memory()


def release_freed_memory() -> None:
    """Gives freed memory back to the system: glibc keeps freed weights in its heap, and a model is made of them."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
