"""lock: one thread compiles at a time, as PyTorch's compilers keep what they are at in globals."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator

from torch import nn

from sqcompile.pytorch.core import EXPORT_PROXIES, FakeTensorMode, TracingContext


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Held around capture, passes and Inductor; never around a user's data or calls, which may wait for other threads.

    It is Dynamo's own lock, and re-entrant. Dynamo holds it when it calls the backend: with another lock, two threads could
    each hold one and wait for the other's.
    """
    from sqcompile.pytorch.dynamo import compile_lock  # here, as Dynamo imports triton

    with compile_lock:
        try:
            yield
        finally:
            _forget()


def _forget() -> None:
    """Frees what PyTorch would keep of a capture for ever: its sizes, and the fake tensors that have them."""
    from sqcompile.pytorch.symbolic import ShapeEnv  # here, as it imports sympy

    EXPORT_PROXIES.clear()
    if TracingContext.try_get() is not None:  # Dynamo goes on with its own
        return
    FakeTensorMode.cache_clear()
    for method in vars(ShapeEnv).values():  # some remember what they were called with
        if hasattr(method, "cache_clear"):
            method.cache_clear()


_analysed: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


@contextlib.contextmanager
def analysing(model: nn.Module) -> Iterator[None]:
    """Held while a model is captured and calibrated: hooks that observe its calls must see those of one calibration."""
    with _lock:
        mine = _analysed.setdefault(model, threading.RLock())
    with mine:
        yield
