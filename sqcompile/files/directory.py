"""directory: a directory that appears whole, or not at all.

with new_directory("out", ours=("sqcompile.json",)) as temporary:
    ...                               # write files into it; an error leaves nothing behind
# "out" is the new directory; killed at any moment, it is the old one or the new one
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fnmatch
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator

from sqcompile.errors import CalibrationError
from sqcompile.files.beside import COPIED, FLOAT_CONFIG
from sqcompile.process.ranks import Ranks

# By these a directory is known to be one that sqcompile wrote: as an artifact, its shards, or a checkpoint for other tools.
MANIFEST, SHARDED, MARK = "sqcompile.json", "sharded.json", "sqcompile_export.json"
MANIFESTS = (MANIFEST, SHARDED)
WRITTEN = (*MANIFESTS, MARK)
# What is in such a directory; whatever else is there is somebody else's.
_OURS = (
    *WRITTEN, "plan.safetensors", "model*.safetensors", "model.safetensors.index.json", "config.json", "code.zip", FLOAT_CONFIG,
    "rank-*-of-*", *COPIED,
)  # fmt: skip
_AT_FDCWD, _EXCHANGE = -100, 2  # of renameat2(2)


@contextlib.contextmanager
def new_directory(path: str, within: str | None = None) -> Iterator[str]:
    """A temporary directory beside ``path``, which takes its place when the block ends without an error.

    Files and directory are flushed to the disk first. An old directory is exchanged with the new one in one step where the
    system can do that (Linux), and then removed.

    Args:
        path: where to. What is there may be an empty directory, or one that sqcompile wrote.
        within: where the temporary directory is instead, on the same disk.

    Raises:
        OSError: if it cannot be written, or if what is there is something else.
    """
    target = os.path.realpath(path)
    check_replaceable(target)
    parent = os.path.dirname(target)
    temporary = os.path.join(within or parent, f".{os.path.basename(target)[:100]}-{secrets.token_hex(8)}.tmp")
    os.mkdir(temporary)
    try:
        yield temporary
        for folder, _, files in os.walk(temporary):
            for file in files:
                flush(os.path.join(folder, file))
            flush(folder)
        check_replaceable(target)
        _put(temporary, target)
        flush(parent)
    finally:  # the old directory, or what was written before an error
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def directory_of(ranks: Ranks, path: str, within: str | None = None) -> Iterator[str]:
    """The `new_directory` of rank 0, for all ranks, each of which calls it. It takes its place when all their blocks have ended.

    A rank on another machine may not see it, and leaves all to the others then.

    Raises:
        OSError: as `new_directory`; on rank 0.
        CalibrationError: where another rank has failed or is dead.
    """
    with new_directory(path, within) if ranks.first else contextlib.nullcontext("") as made:
        temporary: str = json.loads(ranks.tell("new directory", json.dumps(made))[0])
        try:
            yield temporary
        except BaseException as e:
            if not ranks.first and isinstance(e, CalibrationError):
                with contextlib.suppress(OSError):  # rank 0 has removed it, but maybe not what came there just then
                    os.rmdir(temporary)
            if not ranks.first and isinstance(e, OSError) and not os.path.isdir(temporary):
                ranks.tell("no directory")  # rank 0 says why
            raise
        ranks.tell("written")
    ranks.tell("in its place")


def writers(ranks: Ranks, folder: str) -> list[int]:
    """The ranks that see a directory, in their order. Each rank calls it."""
    told = ranks.tell("see the directory", "yes" if os.path.isdir(folder) else "")
    return [rank for rank, sees in enumerate(told) if sees]


def check_replaceable(path: str) -> None:
    """Refuses to replace what no `new_directory` has written.

    Raises:
        OSError: if there is something at the path, other than an empty directory or one that sqcompile wrote.
    """
    if not os.path.lexists(path):
        if not os.path.isdir(os.path.dirname(path)):
            raise FileNotFoundError(f"there is no directory {os.path.dirname(path)}: make it first")
        return
    if not os.path.isdir(path):
        raise NotADirectoryError(f"{path} is there, and is no directory: pass the path of a new one")
    if os.path.commonpath([path, os.getcwd()]) == path:  # another directory in its place would leave it in none
        raise OSError(f"{path} is the working directory, or has it: pass the path of a new directory in it")
    files = os.listdir(path)
    if files and not any(name in files for name in WRITTEN):
        raise FileExistsError(
            f"{path} has other files in it, which would be removed: pass the path of a new directory, or empty this one"
        )
    if others := [name for name in files if not any(fnmatch.fnmatchcase(name, pattern) for pattern in _OURS)]:
        raise FileExistsError(
            f"{path} has {others[0]!r}, which sqcompile has not written and would remove: move it, or pass another path"
        )


def check_apart(target: str, sources: Iterable[str | os.PathLike[str]], but: tuple[str, ...]) -> None:
    """Refuses to replace what is read, a directory above it, or a file in it that ends with none of ``but``.

    Raises:
        OSError: if one of the sources is the target, or in it, or has it.
    """
    target = os.path.realpath(target)
    for source in map(os.path.realpath, sources):
        common = os.path.commonpath([target, source])
        if common == target or (common == source and os.path.isfile(target) and not target.endswith(but)):
            raise OSError(f"{source} is read, and would be replaced with {target}: write to another path")


def _put(new: str, target: str) -> None:
    """Renames ``new`` to ``target``; what was there is then at ``new``, or gone."""
    if not os.path.lexists(target):
        os.rename(new, target)
    elif not os.listdir(target):
        os.rename(new, target)  # over an empty directory, in one step
    elif not _exchanged(new, target):
        old = f"{new}.old"
        os.rename(target, old)
        try:
            os.rename(new, target)
        except BaseException:
            os.rename(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchanged(a: str, b: str) -> bool:
    """Exchanges two directories in one step; False where the system, or this file system, cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), b)


def link_or_copy(path: str, new: str) -> None:
    """Makes a file have a second name, or a second file where the file system has no such links.

    Raises:
        OSError: if neither can be done.
    """
    try:
        os.link(path, new)
    except OSError:
        shutil.copyfile(path, new)


def flush(path: str) -> None:
    """Waits until a file, or the names in a directory, are on the disk."""
    if os.name != "posix" and os.path.isdir(path):
        return  # not to be opened there
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
