"""Times on the GPU as a CUDA graph sees them: no launch overhead of Python, weights from memory and not from L2."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from triton.testing import do_bench_cudagraph

_PAST_L2 = 256 * 2**20  # bytes; several times the L2 of any GPU


def copies(nbytes: int) -> int:
    """How many copies of an operand to take turns with, so that each is gone from L2 when its turn comes again."""
    return max(1, min(64, -(-_PAST_L2 // max(1, nbytes))))


def median_us(calls: Sequence[Callable[[], Any]], rep_ms: float = 20.0) -> float:
    """Median microseconds of one call over ten replays of a graph of about ``rep_ms`` in which the calls take turns."""
    turn = itertools.cycle(calls)
    return 1e3 * do_bench_cudagraph(lambda: next(turn)(), rep=rep_ms, return_mode="median")
