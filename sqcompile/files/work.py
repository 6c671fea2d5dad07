"""work: a directory of what a long run has finished, so that another one with the same arguments can go on.

out.work/
    state.json     of which arguments it is, and the SHA-256 of each finished file
    lock           held by the run that works in it
    plan, model-00001-of-00002.safetensors, ...

A file counts from the moment that state.json names it, which is replaced in one step. One that is damaged since is made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from sqcompile.errors import ArtifactError, FormatError, NothingToQuantizeError, RecipeError
from sqcompile.files.bounded_json import read_object
from sqcompile.files.directory import flush, link_or_copy
from sqcompile.files.regular import read_regular, replace_file, said

# What the same arguments would meet again: to keep what was finished for them would be in the way of others.
_REFUSALS = (NothingToQuantizeError, RecipeError, FormatError)
_STATE, _LOCK = "state.json", "lock"
_FORMAT = 1
_MOST_BYTES = 2**28
_TEMPORARY = re.compile(r"\..{1,110}-[0-9a-f]{16}\.tmp")  # of `new_file` and `new_directory`


class Work:
    """The directory.

    Attributes:
        folder: its path.
    """

    def __init__(self, folder: str, inputs: Mapping[str, str]) -> None:
        """``inputs``: by name, what distinguishes the run's arguments from others."""
        self.folder, self.inputs = folder, dict(inputs)
        self._files: dict[str, dict[str, Any]] = {}
        self._begun: set[str] = set()  # files that were asked for, finished or not

    @contextlib.contextmanager
    def held(self) -> Iterator[Work]:
        """Works in it. When the block ends without an error, or with a refusal that would come again, the directory is removed;
        else it is kept.

        Raises:
            ArtifactError: if it is of other arguments, another run works in it, or something else is at its path.
        """
        try:
            if not os.path.lexists(self.folder):
                os.mkdir(self.folder)
            if not os.path.isdir(self.folder) or not self._ours():
                raise ArtifactError(f"{self.folder} is there, and no other run has begun it: move it away")
            lock = os.open(os.path.join(self.folder, _LOCK), os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as e:
            raise ArtifactError(
                f"nothing can be written to {self.folder} ({said(e)}): write to another directory"
            ) from e
        entered = done = False
        try:
            self._lock(lock)
            self._read()
            entered = True
            for left in os.listdir(self.folder):  # of a run that was cut off while it wrote
                if _TEMPORARY.fullmatch(left):
                    path = os.path.join(self.folder, left)
                    shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)
            yield self
            done = True
        except _REFUSALS:
            done = True
            raise
        finally:
            os.close(lock)
            if done or (entered and not self._files):  # or an error before anything was finished
                self._remove()

    def _remove(self) -> None:
        """Removes what is ours; a system that keeps open files under other names may leave the directory."""
        for name in (*self._files, *self._begun, _STATE, _LOCK):
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(self.folder, name))
        with contextlib.suppress(OSError):
            os.rmdir(self.folder)

    def find(self, name: str) -> tuple[str, Any] | None:
        """The path of a finished file, and what was said of it; None if there is none, or not as it was."""
        entry = self._files.get(name)
        path = os.path.join(self.folder, name)
        if entry is None or os.path.islink(path) or not os.path.isfile(path) or sha256_of_file(path) != entry["sha256"]:
            return None
        return path, entry["said"]

    def add(self, name: str, path: str, about: Any = None, sha256: str | None = None) -> None:
        """Takes over a file that is finished: a link to it, or it itself where it is in the directory.

        Args:
            name: under which it is found again.
            path: of the file, on the same disk.
            about: JSON that is kept with it.
            sha256: of the file, where it is known.

        Raises:
            OSError: if that fails.
        """
        own = os.path.join(self.folder, name)
        if os.path.abspath(path) != os.path.abspath(own):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(own)
            link_or_copy(path, own)
        flush(own)
        self._files[name] = {"sha256": sha256 or sha256_of_file(own), "said": about}
        self._write()

    def path(self, name: str) -> str:
        """Where a new file is to be written; what is left there of an earlier run is removed."""
        own = os.path.join(self.folder, name)
        self._begun.add(name)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(own)
        return own

    def _ours(self) -> bool:
        """Whether nothing else is there than what a run leaves: with a state that can be read, or none yet."""
        left = [name for name in os.listdir(self.folder) if not _TEMPORARY.fullmatch(name) and name != _LOCK]
        return not left or _STATE in left

    def _lock(self, lock: int) -> None:
        try:
            import fcntl
        except ImportError:  # no lock on this system
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise ArtifactError(f"another run works in {self.folder}: wait for it, or write elsewhere") from e

    def _read(self) -> None:
        path = os.path.join(self.folder, _STATE)
        if not os.path.lexists(path):
            self._write()
            return
        try:
            found = read_object(read_regular(path, _MOST_BYTES, "a state").decode(), _STATE)
            inputs, files = found["inputs"], found["files"]
            good = found.get("format") == _FORMAT and isinstance(inputs, dict) and isinstance(files, dict)
            good = good and all(isinstance(e, dict) and e.keys() == {"sha256", "said"} for e in files.values())
        except Exception:
            good = False
        if not good:
            raise ArtifactError(f"{path} cannot be read: remove {self.folder}, and begin anew")
        if not files:  # nothing is lost
            self._write()
            return
        if other := [name for name in self.inputs if inputs.get(name) != self.inputs[name]]:
            raise ArtifactError(
                f"{self.folder} was begun with {' and '.join(f'other {name}' for name in other)}: pass what it was begun "
                "with, or remove it and begin anew"
            )
        self._files = files

    def _write(self) -> None:
        text = json.dumps({"format": _FORMAT, "inputs": self.inputs, "files": self._files})
        replace_file(os.path.join(self.folder, _STATE), text.encode())


def sha256_of_file(path: str) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while part := f.read(2**24):
            digest.update(part)
    return digest.hexdigest()
