"""shards: the safetensors files of a checkpoint, mapped into memory.

Every field of a header is checked before it is used, and a file is opened once: what was checked is what is mapped.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sqcompile.checkpoints.read_files import INDEX, SINGLE, Files
from sqcompile.errors import ArtifactError
from sqcompile.files.bounded_json import read_object
from sqcompile.files.regular import is_regular, said
from sqcompile.files.safetensors_files import check_no_link
from sqcompile.files.weights import CODES
from sqcompile.process.memory import Mapped

_DTYPES = {code: dtype for dtype, code in CODES.items()}
_MOST_HEADER = 10**8  # bytes, as the library has it


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor of a file.

    Attributes:
        file: in which it is.
        offset: in bytes, from the file's beginning.
        dtype, shape: of it.
    """

    file: Mapped
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"

    @property
    def aligned(self) -> bool:
        """Whether its values can be read where they are."""
        return self.offset % self.dtype.itemsize == 0

    def rows(self, first: int, count: int) -> Tensor:
        """Rows of it [count, ...]; of one of no dims, all. Over the file's memory, if it is aligned."""
        offset, shape = self.offset + first * self.row_bytes, (count, *self.shape[1:]) if self.shape else ()
        if self.aligned:
            return self.file.tensor(offset, self.dtype, shape)
        raw = self.file.tensor(offset, torch.uint8, (math.prod(shape) * self.dtype.itemsize,))
        return raw.clone().view(self.dtype).view(shape)


def stored(folder: str) -> dict[str, Stored]:
    """The tensors of a checkpoint directory, by the names in its files.

    Raises:
        ArtifactError: if a file is missing, damaged, a link, or not where the directory is, or if there is none to read.
    """
    if not any(os.path.lexists(os.path.join(folder, file)) for file in (SINGLE, INDEX)):
        pickled = sorted(f for f in os.listdir(folder) if f.endswith((".bin", ".pt", ".pth")))
        if pickled:
            raise ArtifactError(
                f"its weights are in {pickled[0][:100]}, a pickle, which is not read: load it in transformers, and write it "
                "with model.save_pretrained(directory), in safetensors"
            )
    found: dict[str, Stored] = {}

    def names(folder: str, file: str) -> list[str]:
        mine = _read(folder, file)
        found.update(mine)
        return [*mine]

    Files(folder, names)  # the library's reader asks the system for room for the whole file, which it may not have
    return found


def _read(folder: str, file: str) -> dict[str, Stored]:
    check_no_link(os.path.join(folder, file), file)
    try:
        fd = os.open(
            os.path.join(folder, file), os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        )
        try:
            status = os.fstat(fd)
            if not is_regular(status.st_mode):
                raise ArtifactError(f"{file} is no file: copy the directory with the files themselves in it")
            with open(fd, "rb", closefd=False) as f:
                size = int.from_bytes(f.read(8), "little")
                if not 0 < size <= min(_MOST_HEADER, status.st_size - 8):
                    raise ArtifactError(f"{file} has no header of safetensors: copy the directory again, whole")
                header = read_object(f.read(size).decode(), file)
            mapped = Mapped.of(fd, status.st_size)
        finally:
            os.close(fd)
    except ArtifactError:
        raise
    except Exception as e:  # of the system, or of a header that is no JSON
        raise ArtifactError(f"{file} cannot be read ({said(e)}): copy the directory again, whole") from e
    header.pop("__metadata__", None)
    return {name: _entry(mapped, 8 + size, name, found, status.st_size) for name, found in header.items()}


def _entry(file: Mapped, data: int, name: str, found: Any, size: int) -> Stored:
    shape, at, code = (found.get(k) if isinstance(found, dict) else None for k in ("shape", "data_offsets", "dtype"))
    good = (
        isinstance(shape, list)
        and isinstance(at, list)
        and len(at) == 2
        and all(type(n) is int and 0 <= n < 2**62 for n in (*shape, *at))
        and code in _DTYPES
        and at[1] - at[0] == math.prod(shape) * _DTYPES[code].itemsize
        and data + at[1] <= size
    )
    if not good:
        raise ArtifactError(
            f"the tensor {name[:100]!r} is of no dtype and place that a file has: copy the directory again"
        )
    assert isinstance(shape, list) and isinstance(at, list) and isinstance(code, str)
    return Stored(file, data + at[0], _DTYPES[code], tuple(shape))
