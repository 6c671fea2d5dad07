"""interrupts: Ctrl-C takes effect where PyTorch is in no half-done state.

Python raises KeyboardInterrupt between any two instructions: between a mode that is entered and the note to leave it, in
a callback of a weak reference, which swallows it. PyTorch's own state, and with it the next compilation, does not survive
that. So while the pipeline runs, Ctrl-C is noted, and raised at the next `checkpoint`; a second one is raised at once.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

_before: list[Callable[..., Any]] = []  # the handler whose place ours has taken; none where Ctrl-C is not deferred
_noted: list[int] = []  # signals that have not taken effect

watchers: list[Callable[[], None]] = []  # called at each checkpoint, between two operations (`memory`)


def _note(number: int, frame: Any) -> None:
    if _noted and _before:
        _before[-1](number, frame)
    else:
        _noted.append(number)
        print("sqcompile: interrupted, stops after this step; Ctrl-C once more stops at once", file=sys.stderr)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Ctrl-C takes effect at checkpoints meanwhile, or when this ends. Only the main thread gets any."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler) or handler is _note:
        yield
        return
    _noted.clear()
    _before.append(handler)
    try:
        signal.signal(signal.SIGINT, _note)
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        _before.pop()
        noted = _noted.copy()
        _noted.clear()
        if noted:
            handler(noted[0], None)


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Ctrl-C takes effect as without `deferred`: the user's own code runs."""
    if signal.getsignal(signal.SIGINT) is not _note or threading.current_thread() is not threading.main_thread():
        yield
        return
    checkpoint()
    try:
        signal.signal(signal.SIGINT, _before[-1])
        yield
    finally:
        signal.signal(signal.SIGINT, _note)


def each_at_once(batches: Iterable[Any]) -> Iterator[Any]:
    """Each of the user's batches, made `at_once`."""
    iterator = iter(batches)
    while True:
        with at_once():
            try:
                batch = next(iterator)
            except StopIteration:
                return
        yield batch


def checkpoint() -> None:
    """Raises KeyboardInterrupt if Ctrl-C was pressed, in the main thread. Watchers have a look, in any thread."""
    for look in tuple(watchers):
        look()
    if _noted and threading.current_thread() is threading.main_thread():
        _before[-1](_noted.pop(), None)
