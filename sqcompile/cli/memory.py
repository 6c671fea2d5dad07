"""memory: sizes as people write them."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext

from sqcompile.cli.terminal import CommandError
from sqcompile.process.memory import memory_limit

_UNITS = {"": 1, "B": 1} | {
    f"{letter}{kind}": (1000 if kind == "B" else 1024) ** (i + 1)
    for i, letter in enumerate("KMGT")
    for kind in ("B", "iB")
}


def size(text: str) -> int:
    """The bytes that "6GiB", "500 MB" or "1000000" stands for.

    Raises:
        CommandError: for other text.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?(?:i?B)?)", text.strip())
    if found is None or found[2] not in _UNITS or not float(found[1]):
        raise CommandError(f"{text!r} is no size: write it as 6GiB, 500MB or a number of bytes")
    return int(float(found[1]) * _UNITS[found[2]])


def limited(most: int | None) -> AbstractContextManager[None]:
    """`memory_limit` of some bytes; nothing without them."""
    return nullcontext() if most is None else memory_limit(most)
