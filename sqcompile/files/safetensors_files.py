"""safetensors_files: reading one safetensors file of a directory of unknown origin."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from typing import Any

import safetensors

from sqcompile.errors import ArtifactError
from sqcompile.files.regular import said

# The names a file may have: one of the directory itself, whatever an index says.
FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}\.safetensors")


@contextlib.contextmanager
def opened(folder: str, file: str) -> Iterator[Any]:
    """The file, mapped into memory, as `safetensors.safe_open` gives it.

    Raises:
        ArtifactError: if it is a link, no regular file, missing or damaged; or if the block fails otherwise than by one.
    """
    path = os.path.join(folder, file)
    check_no_link(path, file)
    try:
        with safetensors.safe_open(path, "pt") as f:
            yield f
    except ArtifactError:
        raise
    except Exception as e:  # of the system, or of the parser
        raise ArtifactError(f"{file} cannot be read ({said(e)}): copy the directory again, whole") from e


def check_no_link(path: str, file: str) -> None:
    """Raises ArtifactError, which calls it ``file``, for what is a link, missing, or no regular file."""
    try:
        regular = stat.S_ISREG(os.lstat(path).st_mode)
    except OSError as e:
        raise ArtifactError(f"{file} cannot be read ({said(e)}): copy the directory again, whole") from e
    if not regular:
        raise ArtifactError(f"{file} is a link, or no file: copy the directory with the files themselves in it")
