"""plan_file: a plan's container. One safetensors file: float32 tensors, and all else as JSON in its header.

Files come from anywhere: what is read is bounded in size and nesting, its checksum is looked at, and whatever is wrong is
a PlanError. What the fields mean is for `check_plan`.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from sqcompile.errors import PlanError
from sqcompile.files.bounded_json import read_object
from sqcompile.files.regular import read_regular, replace_file, said

_KEY = "sqcompile_plan"  # of the JSON in the metadata of safetensors
_MOST_HEADER = 2**26  # bytes; some 100,000 linears
_MOST_BYTES = 2**32


def read_plan_file(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON of a file, an object with anything in it, and its tensors, of any shape and dtype.

    Raises:
        PlanError: if the path is no regular file, or no file that `write_plan_file` has made.
    """
    name = _name(path)
    try:
        return parts_of(read_regular(name, _MOST_BYTES, "a plan"))
    except PlanError:
        raise
    except Exception as e:  # whatever the system and the parsers have to say of it
        raise PlanError(f"{name} is not a sqcompile plan ({said(e)}): make one with Plan.save") from e


def parts_of(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON and the tensors in a file's bytes; whatever the parsers have to say of it is raised."""
    return read_object(_metadata(data), "its JSON"), safetensors.torch.load(data)


def bytes_of(meta: dict[str, Any], tensors: dict[str, Tensor]) -> bytes:
    """A file's bytes.

    Raises:
        PlanError: if they are more than a file may have.
    """
    whole = {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}  # names that share a tensor, too
    data = safetensors.torch.save(whole, {_KEY: json.dumps(meta)})
    if len(data) > _MOST_BYTES or int.from_bytes(data[:8], "little") > _MOST_HEADER:
        raise PlanError(f"the plan takes {len(data)} bytes, more than a plan file may")
    return data


def write_plan_file(path: str | os.PathLike[str], meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes JSON and float32 tensors, or nothing: the old file stays whole until the new one is.

    Raises:
        PlanError: if the path is something else than a regular file, or cannot be written.
    """
    name = _name(path)
    try:
        replace_file(name, bytes_of(meta, tensors))
    except PlanError:
        raise
    except Exception as e:
        hint = "pass a path in a directory that exists and may be written to, on a disk with room"
        raise PlanError(f"the plan cannot be written to {name} ({said(e)}): {hint}") from e


def checksum(meta: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """SHA-256 of JSON and tensors, in whatever order a file has them."""
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name, t in sorted(tensors.items()):
        digest.update(f"\n{name} {t.dtype} {tuple(t.shape)}\n".encode())
        digest.update(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _name(path: Any) -> str:
    try:
        return os.fsdecode(path)
    except TypeError as e:
        raise PlanError(f"a plan's path is {path!r}: pass a string or a pathlib.Path") from e


def _metadata(data: bytes) -> str:
    """The JSON in a safetensors header; `safetensors` itself gives metadata of a path only, not of what was read."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(len(data) - 8, _MOST_HEADER):
        raise ValueError("its header is not whole, or too large")
    metadata = read_object(data[8 : 8 + size].decode(), "its header").get("__metadata__")
    if not isinstance(metadata, dict) or set(metadata) != {_KEY} or not isinstance(metadata[_KEY], str):
        raise ValueError(f"its metadata is not {_KEY} alone")
    return metadata[_KEY]
