"""shards: the safetensors files of a checkpoint, each mapped into memory as a whole."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from sqcompile.checkpoints.read_files import INDEX, SINGLE, Files
from sqcompile.errors import ArtifactError
from sqcompile.files.safetensors_files import mapped_tensor
from sqcompile.process.memory import Mapped


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
        shape = (count, *self.shape[1:]) if self.shape else ()
        return mapped_tensor(self.file, self.offset + first * self.row_bytes, self.dtype, shape)


def stored(folder: str) -> dict[str, Stored]:
    """The tensors of a checkpoint directory, by the names in its files.

    Raises:
        ArtifactError: if a file is missing, damaged, a link, or not where the directory is, or if there is none to read.
        OSError: if the system does not map one.
    """
    if not any(os.path.lexists(os.path.join(folder, file)) for file in (SINGLE, INDEX)):
        pickled = sorted(f for f in os.listdir(folder) if f.endswith((".bin", ".pt", ".pth")))
        if pickled:
            raise ArtifactError(
                f"its weights are in {pickled[0][:100]}, a pickle, which is not read: load it in transformers, and write it "
                "with model.save_pretrained(directory), in safetensors"
            )
    files = Files(folder)
    mapped = {file: opened.whole() for file, opened in files.opened.items()}
    found: dict[str, Stored] = {}
    for name, file in files.found.items():
        place = files.opened[file].places[name]
        found[name] = Stored(mapped[file], place.offset, place.dtype, place.shape)
    return found
