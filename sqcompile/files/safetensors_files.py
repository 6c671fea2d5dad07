"""safetensors_files: reading one safetensors file of a directory of unknown origin, mapped into memory.

Every field of a header is checked before it is used, and a file is opened once: what was checked is what is mapped. The
library's reader asks the system for room for the whole file, which it may not have.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import stat
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sqcompile.errors import ArtifactError
from sqcompile.files.bounded_json import read_object
from sqcompile.files.regular import is_regular, said
from sqcompile.files.weights import CODES
from sqcompile.process.memory import Mapped

# The names a file may have: one of the directory itself, whatever an index says.
FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}\.safetensors")
_DTYPES = {code: dtype for dtype, code in CODES.items()}
_MOST_HEADER = 10**8  # bytes, as the library has it


@dataclass(frozen=True)
class Place:
    """Where a tensor is in a file.

    Attributes:
        offset: in bytes, from the file's beginning.
        dtype, shape: of it.
    """

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


class WeightFile:
    """A file, open as long as this lives.

    Attributes:
        places: of its tensors, by name.
        metadata: what the header says beside them.
    """

    def __init__(self, folder: str, file: str) -> None:
        """Reads the header.

        Raises:
            ArtifactError: if it is a link, no regular file, missing or damaged.
        """
        path = os.path.join(folder, file)
        check_no_link(path, file)
        try:
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
            weakref.finalize(self, os.close, self._fd)
            status = os.fstat(self._fd)
            if not is_regular(status.st_mode):
                raise ArtifactError(f"{file} is no file: copy the directory with the files themselves in it")
            self._size = status.st_size
            with open(self._fd, "rb", closefd=False) as f:
                size = int.from_bytes(f.read(8), "little")
                if not 0 < size <= min(_MOST_HEADER, self._size - 8):
                    raise ArtifactError(
                        f"{file} cannot be read (it has no header of safetensors): copy the directory again, whole"
                    )
                header = read_object(f.read(size).decode(), file)
        except ArtifactError:
            raise
        except Exception as e:  # of the system, or of a header that is no JSON
            raise ArtifactError(f"{file} cannot be read ({said(e)}): copy the directory again, whole") from e
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        if not isinstance(self.metadata, dict) or not all(isinstance(v, str) for v in self.metadata.values()):
            raise ArtifactError(f"{file} has metadata that are no words: copy the directory again, whole")
        self.places = {name: _place(file, 8 + size, name, found, self._size) for name, found in header.items()}

    def whole(self) -> Mapped:
        """All of the file, mapped.

        Raises:
            OSError: if the system refuses.
        """
        return Mapped.of(self._fd, self._size)

    def tensor(self, name: str) -> Tensor:
        """A tensor over a mapping of its own, which is given back with it.

        Raises:
            OSError: if the system refuses.
        """
        place = self.places[name]
        if not place.nbytes:
            return torch.empty(place.shape, dtype=place.dtype)
        start = place.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        mapped = Mapped.of(self._fd, place.offset + place.nbytes - start, start)
        return mapped_tensor(mapped, place.offset - start, place.dtype, place.shape)


def mapped_tensor(file: Mapped, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor at an offset of bytes: over the mapping if it is aligned there, else a copy."""
    if offset % dtype.itemsize == 0:
        return file.tensor(offset, dtype, shape)
    raw = file.tensor(offset, torch.uint8, (math.prod(shape) * dtype.itemsize,))
    return raw.clone().view(dtype).view(shape)


def _place(file: str, data: int, name: str, found: Any, size: int) -> Place:
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
            f"{file} cannot be read (the tensor {name[:100]!r} is of no dtype and place that a file has): copy the directory "
            "again, whole"
        )
    assert isinstance(shape, list) and isinstance(at, list) and isinstance(code, str)
    return Place(data + at[0], _DTYPES[code], tuple(shape))


def check_no_link(path: str, file: str) -> None:
    """Raises ArtifactError, which calls it ``file``, for what is a link, missing, or no regular file."""
    try:
        regular = stat.S_ISREG(os.lstat(path).st_mode)
    except OSError as e:
        raise ArtifactError(f"{file} cannot be read ({said(e)}): copy the directory again, whole") from e
    if not regular:
        raise ArtifactError(f"{file} is a link, or no file: copy the directory with the files themselves in it")
