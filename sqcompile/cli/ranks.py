"""ranks: a command that torchrun has started in several processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import distributed as dist


@contextmanager
def process_group(ended: Callable[[], object]) -> Iterator[bool]:
    """The process group of torchrun, where it has started more than one; gives whether this is the first rank.

    ``ended`` is called where torchrun ends this process, which it does when another one has ended, long before that is missed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
        return
    before = signal.signal(signal.SIGTERM, lambda *_: ended())
    try:
        dist.init_process_group("gloo")
        try:
            yield dist.get_rank() == 0
        finally:
            dist.destroy_process_group()
    finally:
        signal.signal(signal.SIGTERM, before)


def follows() -> bool:
    """Whether torchrun has started this process beside a first one, which speaks for all."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1") and os.environ.get("RANK", "0") not in ("", "0")
