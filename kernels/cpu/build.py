"""C++ code: built once per machine by the compiler that Inductor uses, while something else is done where it is begun ahead."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

log = logging.getLogger("sqcompile")

CPU_KERNELS = "sqcompile's CPU kernels do not build here, slower ones of PyTorch take their place"

_begun: dict[tuple[str, ...], Future[Any]] = {}
_beginning = threading.Lock()


def begin(*libraries: Sequence[str], probe: bool) -> None:
    """Begins to build libraries, each of some files as for `built`, and returns; what does not build is said by `built`.

    ``probe``: whether Inductor is to find out now what vectors the compiler knows: it takes seconds, and many processes.
    """
    inductor = _inductor()
    pool = ThreadPoolExecutor(2, "sqcompile build", _give_way)  # its threads end with what they were given
    with _beginning, contextlib.suppress(RuntimeError):  # no more threads, or the interpreter ends: `built` does it
        for names in libraries:
            if tuple(names) not in _begun:
                _begun[tuple(names)] = _in(pool, functools.partial(_build, tuple(names)))
        if probe and () not in _begun:
            _begun[()] = _in(pool, inductor.pick_vec_isa)
    pool.shutdown(wait=False)


def built(*names: str, otherwise: str = CPU_KERNELS) -> Any | None:
    """The library of some files beside this one, one after the other; None, with a warning, where they do not build."""
    with contextlib.suppress(Exception):  # of a compiler that Ctrl-C ended, too
        if (library := _ended(names)) is not None:
            return library
    try:
        return _build(names)
    except Exception as e:
        warnings.warn(
            f"{otherwise}. Install a C++ compiler for Inductor, such as g++: {e}",
            stacklevel=2,
        )
        return None


def probed() -> None:
    """Waits until Inductor knows the vectors, where `begin` has it find out: who compiles would do so at the same time.

    Its probe changes flags for a while, and may leave those of another thread: the same code has another hash then.
    """
    with contextlib.suppress(Exception):  # which Inductor meets again, and tells
        _ended(())


def _ended(names: tuple[str, ...]) -> Any | None:
    """What was begun ahead, when it is there; None where nothing was, or it has not begun."""
    ahead = _begun.get(names)
    return None if ahead is None or ahead.cancel() else ahead.result()


def _give_way() -> None:
    """A compiler that takes a core from threads that wait for each other makes what they do several times slower."""
    if sys.platform == "linux":  # where threads have priorities, which the processes that they start inherit
        with contextlib.suppress(OSError):  # a sandbox that forbids it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(19, os.getpriority(os.PRIO_PROCESS, 0) + 5))


def _forget() -> None:
    """In a forked process: there are no threads that would end what they were at."""
    global _beginning
    _beginning = threading.Lock()
    _begun.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _in(pool: ThreadPoolExecutor, do: Callable[[], Any]) -> Future[Any]:
    """Does it in a thread that sees the configuration of this one, which PyTorch keeps by context."""
    return pool.submit(contextvars.copy_context().run, do)


def _build(names: tuple[str, ...]) -> Any:
    start = time.perf_counter()
    library = _inductor().build("\n".join((Path(__file__).parent / name).read_text() for name in names))
    log.debug(
        "C++ of %s: built, or found in Inductor's cache, in %.2f s", ", ".join(names), time.perf_counter() - start
    )
    return library


def _inductor() -> Any:
    """Imported here, as it takes its time, and before any thread needs it: two that import may get halves of modules."""
    import torch.utils.cpp_extension  # noqa: F401  which finds the compiler

    from sqcompile.pytorch import inductor

    return inductor
