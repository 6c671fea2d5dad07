"""spool: a temporary file of tensors, written once and then mapped into memory.

spool = Spool(None)
offset = spool.room(torch.bfloat16, (4096, 4096))
spool.write(offset, t, torch.bfloat16)
t = spool.map().tensor(offset, torch.bfloat16, (4096, 4096))
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor

from sqcompile.process.memory import Mapped

_ALIGNED = 64  # bytes: as tensors lie in memory, so that kernels do the same with them
_PART = 2**22  # elements that are converted at once


class Spool:
    """A file without a name, for tensors that need not be in memory. It goes with the last of them."""

    def __init__(self, folder: str | None) -> None:
        """``folder``: where it is; the system's one for temporary files by default."""
        self._file = tempfile.TemporaryFile(dir=folder, prefix="sqcompile-")  # noqa: SIM115  (`map` closes it)
        self.size = 0

    def room(self, dtype: torch.dtype, shape: Sequence[int]) -> int:
        """The offset of a new tensor.

        Raises:
            OSError: if the disk has no room for it.
        """
        start = -(-self.size // _ALIGNED) * _ALIGNED
        self.size = start + max(1, math.prod(shape) * dtype.itemsize)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._file.fileno(), start, self.size - start)
        else:
            self._file.truncate(self.size)
        return start

    def write(self, offset: int, t: Tensor, dtype: torch.dtype) -> None:
        """Writes values, in a dtype, some at a time."""
        self._file.seek(offset)
        for part in t.detach().reshape(-1).split(_PART):
            self._file.write(part.to("cpu", dtype).contiguous().view(torch.uint8).numpy().data)

    def map(self) -> Mapped | None:
        """The file in memory, once all is written; None if that is nothing."""
        with self._file as f:
            f.flush()
            return Mapped.of(f.fileno(), self.size) if self.size else None
