"""regular: single files. Only regular ones are read and written: a pipe would wait for ever, a device would be replaced."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from typing import BinaryIO


def is_regular(mode: int) -> bool:
    """Whether ``st_mode`` is that of a regular file: no pipe, socket, device or directory."""
    return stat.S_ISREG(mode)


def read_regular(name: str, most: int, kept: str) -> bytes:
    """All bytes of a regular file.

    Args:
        name: its path.
        most: how many bytes it may have.
        kept: what a file of this kind holds, for messages: "a plan".

    Raises:
        OSError: if it cannot be read, is no regular file, or is larger.
    """
    check_regular(name, os.stat(name).st_mode, kept)  # first: to open a pipe or a device does something to it
    fd = os.open(name, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(fd, "rb") as f:
        found = os.fstat(fd)
        check_regular(name, found.st_mode, kept)  # it may be another by now
        if found.st_size > most:
            raise OSError(f"{name} has {found.st_size} bytes, more than {kept} takes")
        return f.read(found.st_size)


def check_regular(name: str, mode: int, kept: str) -> None:
    """Raises OSError for what is no regular file."""
    if not is_regular(mode):
        raise OSError(f"{name} is not a regular file, and {kept} is kept in one")


def replace_file(name: str, data: bytes) -> None:
    """Puts a new file with some bytes in the place of an old one; errors as of `new_file`."""
    with new_file(name) as f:
        f.write(data)


@contextlib.contextmanager
def new_file(name: str) -> Iterator[BinaryIO]:
    """A file beside ``name`` that takes its place, with its permissions, when the block ends without an error.

    Where ``name`` is a link, it is where that points to.

    Raises:
        OSError: if it cannot be written, or what is there is no regular file; what is there is then left as it is.
    """
    target = os.path.realpath(name)
    mode = check_file_replaceable(name)
    temporary = os.path.join(os.path.dirname(target), f".sqcompile-{secrets.token_hex(8)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    fd = os.open(temporary, flags, 0o666)  # less the umask
    try:
        with open(fd, "wb") as f:
            yield f
            f.flush()
            os.fsync(fd)
        if mode is not None:
            os.chmod(temporary, stat.S_IMODE(mode))
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def check_file_replaceable(name: str) -> int | None:
    """The mode of the file at a path, None if there is none.

    Raises:
        OSError: if what is there is no regular file, or may not be written to, or if there is no directory for it.
    """
    target = os.path.realpath(name)
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        if not os.path.isdir(os.path.dirname(target)):
            raise FileNotFoundError(f"there is no directory {os.path.dirname(target)}: make it first") from None
        return None
    if not is_regular(mode):
        raise OSError(f"{name} is not a regular file, and none else is replaced: pass another path")
    if not os.access(target, os.W_OK):
        raise PermissionError("the file there may not be written to")
    return mode


def said(e: Exception) -> str:
    """An error in one short line: a parser's may quote the whole file."""
    lines = str(e).strip().splitlines()
    return f"{type(e).__name__}: {lines[0][:200]}" if lines else type(e).__name__
