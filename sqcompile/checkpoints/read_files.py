"""read_files: the safetensors files of a checkpoint, mapped into memory; every tensor is checked before it is used."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sqcompile.errors import ArtifactError
from sqcompile.files.bounded_json import read_object
from sqcompile.files.regular import is_regular, read_regular, said
from sqcompile.files.safetensors_files import FILE_NAME, WeightFile, check_no_link
from sqcompile.files.weights import CODES
from sqcompile.process.interrupts import checkpoint

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_MOST_BYTES = 2**28
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def read_json(folder: str, file: str) -> dict[str, Any]:
    """A JSON file of the directory.

    Raises:
        ArtifactError: if it is a link, cannot be read, or is no object.
    """
    path = os.path.join(folder, file)
    check_no_link(path, file)
    try:
        return read_object(read_regular(path, _MOST_BYTES, "a configuration").decode("utf-8"), file)
    except Exception as e:
        raise ArtifactError(f"{file} cannot be read ({said(e)}): copy the directory again, whole") from e


def identity_of(folder: str) -> str:
    """What tells a checkpoint from others: configurations, and headers, sizes and times of files of weights.

    Raises:
        ArtifactError: if it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for name in sorted(os.listdir(folder)):
            path = os.path.join(folder, name)
            if not name.endswith((".json", ".safetensors")) or not is_regular((status := os.stat(path)).st_mode):
                continue
            digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode())
            with open(path, "rb") as f:
                first = f.read(8)
                size = status.st_size if name.endswith(".json") else int.from_bytes(first, "little")
                digest.update(first + f.read(min(size, 10**8)))
    except OSError as e:
        raise ArtifactError(f"{folder} cannot be read ({said(e)}): copy the directory again, whole") from e
    return digest.hexdigest()


class Files:
    """The tensors of a directory.

    Attributes:
        found: the file of each tensor, by name.
        opened: the files, by name.
    """

    def __init__(self, folder: str) -> None:
        """Looks at the index and at the headers of the files.

        Raises:
            ArtifactError: if a file is missing, damaged, a link, or not where the directory is.
        """
        self.folder = folder
        self.found: dict[str, str] = {}
        self.opened: dict[str, WeightFile] = {}
        index = None
        single, several = (os.path.lexists(os.path.join(folder, file)) for file in (SINGLE, INDEX))
        if not single and not several:
            raise ArtifactError(f"it has no {SINGLE} and no {INDEX}: only weights in safetensors are read")
        if not single:  # which transformers reads whatever index is beside it
            index = read_json(folder, INDEX).get("weight_map")
            if not isinstance(index, dict) or not index:
                raise ArtifactError(f"{INDEX} has no weight_map: copy the directory again, whole")
            for file in index.values():
                if not isinstance(file, str) or not FILE_NAME.fullmatch(file):
                    raise ArtifactError(f"{INDEX} names {str(file)[:100]!r}, which is no file of the directory")
        for file in sorted({SINGLE} if index is None else {*index.values()}):
            self.opened[file] = WeightFile(self.folder, file)
            for name in self.opened[file].places:
                if name in self.found or (index is not None and index.get(name) != file):
                    raise ArtifactError(f"{file} has {name[:100]!r}, which the index has elsewhere or twice")
                self.found[name] = file
        for name in index or ():
            if name not in self.found:
                raise ArtifactError(f"{name[:100]!r} is in {INDEX} and in no file: copy the directory again, whole")

    def int8(self, name: str, shape: Sequence[int]) -> Tensor:
        """A weight, int8 of that shape, mapped.

        Raises:
            ArtifactError: if it is missing or another.
        """
        return self._read(name, [list(shape)], (torch.int8,))

    def floats(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A float tensor in ``dtype``, mapped where the file has that dtype.

        Raises:
            ArtifactError: if it is missing, another, or not finite.
        """
        t = self._read(name, [list(shape)], _FLOATS).to(dtype)
        for part in t.reshape(-1).split(2**22):
            checkpoint()
            if not bool(part.isfinite().all()):
                raise ArtifactError(f"{name} has values that are not finite: export it again")
        return t

    def scale(self, name: str, shapes: Sequence[Sequence[int]]) -> Tensor:
        """Scales, float32 and flat, of a tensor that has one of the shapes.

        Raises:
            ArtifactError: if it is missing, another, or not positive and finite.
        """
        t = self._read(name, [list(s) for s in shapes], _FLOATS).float().flatten()
        if not bool((t.isfinite() & (t > 0)).all()):
            raise ArtifactError(f"{name} has scales that are not positive and finite: export it again")
        return t

    def _read(self, name: str, shapes: list[list[int]], dtypes: tuple[torch.dtype, ...]) -> Tensor:
        if name not in self.found:
            raise ArtifactError(f"there is no tensor {name!r} in its files: export it again")
        file = self.opened[self.found[name]]
        place = file.places[name]
        if list(place.shape) not in shapes or place.dtype not in dtypes:
            wanted = " or ".join(CODES[d] for d in dtypes)
            raise ArtifactError(
                f"{name} is {CODES[place.dtype]} {list(place.shape)}, and {wanted} {' or '.join(map(str, shapes))} is wanted"
            )
        return file.tensor(name)
