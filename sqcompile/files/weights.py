"""weights: a safetensors file of tensors, as models' tensors are: on any device, views of each other, tied, or not made yet.

    8 bytes, the header's length; the header, JSON; the tensors' values, those of the widest dtypes first, then by name

One tensor is in memory at a time. The bytes are those that the library safetensors writes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sqcompile.errors import ArtifactError

# In the order of the library, which has them by their alignment.
CODES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e8m0fnu: "F8_E8M0", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ", torch.int16: "I16", torch.uint16: "U16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.uint32: "U32", torch.float32: "F32", torch.complex64: "C64",
    torch.float64: "F64", torch.int64: "I64", torch.uint64: "U64",
}  # fmt: skip
_RANKS = {dtype: i for i, dtype in enumerate(CODES)}
_PART = 2**24  # bytes that are written at once


@dataclass(frozen=True, eq=False)
class Later:
    """A tensor that is made when it is written.

    Attributes:
        dtype, shape: of it.
        make: gives it; called once.
        unwanted: called instead where it is not written.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    unwanted: Callable[[], object] = lambda: None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_weights(
    path: str,
    tensors: Mapping[str, Tensor | Later],
    metadata: dict[str, str] | None = None,
    see: Callable[[str, Any], None] = lambda name, values: None,
) -> None:
    """Writes a file.

    Args:
        path: of a file that is not there yet. Who may read it, its directory's permissions say.
        tensors: by name. They are made in their order.
        metadata: of the file.
        see: is given each name, and the values bit by bit, as a buffer of bytes that is there as long as the call.

    Raises:
        OSError: if it cannot be written.
        ArtifactError: for a dtype that safetensors files do not have.
    """
    for name, t in tensors.items():
        if t.dtype not in CODES:
            raise ArtifactError(
                f"{name} is of {t.dtype}, which safetensors files do not have: save it in another dtype"
            )
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    starts, end = {}, 0
    for name in sorted(tensors, key=lambda name: (-_RANKS[tensors[name].dtype], name.encode())):
        t = tensors[name]
        starts[name], end = end, end + t.nbytes
        header[name] = {"dtype": CODES[t.dtype], "shape": list(t.shape), "data_offsets": [starts[name], end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + end)
        for name, given in tensors.items():
            f.seek(8 + len(text) + starts[name])
            _write(f, name, given, see)
    os.chmod(path, os.stat(os.path.dirname(path)).st_mode & 0o666)


def _write(f: BinaryIO, name: str, given: Tensor | Later, see: Callable[[str, Any], None]) -> None:
    t = given.make() if isinstance(given, Later) else given
    assert t.dtype == given.dtype and tuple(t.shape) == tuple(given.shape), name
    values = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    for start in range(0, len(values), _PART):
        f.write(values[start : start + _PART])
    see(name, values)
