"""plan_file: a plan's container. One safetensors file: float32 tensors, and all else as JSON in its header.

Files come from anywhere: what is read is bounded in size and nesting, its checksum is looked at, and whatever is wrong is
a PlanError. What the fields mean is for `check_plan`. Only regular files are read and written: a pipe would wait for ever,
and a device would be replaced.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import stat
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from sqcompile.errors import PlanError

_KEY = "sqcompile_plan"  # of the JSON in the metadata of safetensors
_MOST_HEADER = 2**26  # bytes; some 100,000 linears
_MOST_BYTES = 2**32
_MOST_NESTING = 64
_MOST_DIGITS = 20  # of an integer

_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"?|([\[{])|([\]}])', re.DOTALL)  # whole strings, so that theirs are not counted


def read_plan_file(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON of a file, an object with anything in it, and its tensors, of any shape and dtype.

    Raises:
        PlanError: if the path is no regular file, or no file that `write_plan_file` has made.
    """
    name = _name(path)
    try:
        data = _read(name)
        meta = _json(_metadata(data), "its JSON")
        tensors = safetensors.torch.load(data)
    except PlanError:
        raise
    except Exception as e:  # whatever the system and the parsers have to say of it
        raise PlanError(f"{name} is not a sqcompile plan ({_said(e)}): make one with Plan.save") from e
    return meta, tensors


def write_plan_file(path: str | os.PathLike[str], meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes JSON and float32 tensors, or nothing: the old file stays whole until the new one is.

    Raises:
        PlanError: if the path is something else than a regular file, or cannot be written.
    """
    name = _name(path)
    try:
        whole = {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}  # names that share a tensor, too
        data = safetensors.torch.save(whole, {_KEY: json.dumps(meta)})
        if len(data) > _MOST_BYTES or int.from_bytes(data[:8], "little") > _MOST_HEADER:
            raise PlanError(f"the plan takes {len(data)} bytes, more than a plan file may")
        _replace(name, data)
    except PlanError:
        raise
    except Exception as e:
        hint = "pass a path in a directory that exists and may be written to, on a disk with room"
        raise PlanError(f"the plan cannot be written to {name} ({_said(e)}): {hint}") from e


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


def is_regular(mode: int) -> bool:
    """Whether ``st_mode`` is that of a regular file: no pipe, socket, device or directory."""
    return stat.S_ISREG(mode)


def _read(name: str) -> bytes:
    _check_regular(name, os.stat(name).st_mode)  # first: to open a pipe or a device does something to it
    fd = os.open(name, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(fd, "rb") as f:
        found = os.fstat(fd)
        _check_regular(name, found.st_mode)  # it may be another by now
        if found.st_size > _MOST_BYTES:
            raise PlanError(f"{name} is not a sqcompile plan: {found.st_size} bytes are more than a plan takes")
        return f.read(found.st_size)


def _check_regular(name: str, mode: int) -> None:
    if not is_regular(mode):
        raise PlanError(
            f"{name} is not a regular file, and a plan is kept in one: pass the path that Plan.save was given"
        )


def _metadata(data: bytes) -> str:
    """The JSON in a safetensors header; `safetensors` itself gives metadata of a path only, not of what was read."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(len(data) - 8, _MOST_HEADER):
        raise ValueError("its header is not whole, or too large")
    metadata = _json(data[8 : 8 + size].decode(), "its header").get("__metadata__")
    if not isinstance(metadata, dict) or set(metadata) != {_KEY} or not isinstance(metadata[_KEY], str):
        raise ValueError(f"its metadata is not {_KEY} alone")
    return metadata[_KEY]


def _json(text: str, what: str) -> dict[str, Any]:
    depth = 0
    for token in _TOKENS.finditer(text):
        depth += (token[1] is not None) - (token[2] is not None)
        if depth > _MOST_NESTING:
            raise ValueError(f"{what} is nested too deeply")
    found = json.loads(text, parse_int=_integer)
    if not isinstance(found, dict):
        raise ValueError(f"{what} is no object")
    return found


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _replace(name: str, data: bytes) -> None:
    """Puts a new file in the place of an old one, with its permissions, or where a link points to."""
    target = os.path.realpath(name)
    mode = None
    with contextlib.suppress(FileNotFoundError):
        mode = os.stat(target).st_mode
    if mode is not None:
        if not is_regular(mode):
            raise PlanError(f"{name} is not a regular file: Plan.save writes none else, pass another path")
        if not os.access(target, os.W_OK):
            raise PermissionError("the file there may not be written to")
    temporary = os.path.join(os.path.dirname(target), f".sqcompile-{secrets.token_hex(8)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    fd = os.open(temporary, flags, 0o666)  # less the umask
    try:
        with open(fd, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(fd)
        if mode is not None:
            os.chmod(temporary, stat.S_IMODE(mode))
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _said(e: Exception) -> str:
    """One short line: a parser's error may quote the whole file."""
    lines = str(e).strip().splitlines()
    return f"{type(e).__name__}: {lines[0][:200]}" if lines else type(e).__name__
