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

_SAID = "sqcompile: interrupted, stops after this step; Ctrl-C once more stops at once"

watchers: list[Callable[[], None]] = []  # called at each checkpoint, between two operations (`memory`)


class _Deferral:
    """What Ctrl-C does while the pipeline runs, in the place of the handler that was there before.

    That handler is set and set back once. What happens in between, where the user's own code comes and goes, is an
    attribute's value: Python calls a handler after any function, and state of two places could be left half-done there.
    """

    def __init__(self, before: Callable[..., Any]) -> None:
        self.before, self.at_once = before, False
        self.noted: list[int] = []  # signals that have not taken effect

    def handle(self, number: int, frame: Any) -> None:
        if self.at_once or self.noted:
            self.before(number, frame)
        else:
            self.noted.append(number)
            print(_SAID, file=sys.stderr)

    def take_effect(self) -> None:
        if self.noted:
            self.before(self.noted.pop(), None)


_current: _Deferral | None = None  # of the main thread, which alone gets signals


def _here() -> _Deferral | None:
    return _current if threading.current_thread() is threading.main_thread() else None


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Ctrl-C takes effect at checkpoints meanwhile, or when this ends. Only the main thread gets any."""
    global _current
    if (outer := _here()) is not None:
        was = outer.at_once
        try:
            outer.at_once = False
            yield
        finally:
            outer.at_once = was
            if was:
                outer.take_effect()
        return
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    own = _Deferral(handler)
    try:
        _current = own
        signal.signal(signal.SIGINT, own.handle)
        yield
    finally:
        try:
            if signal.getsignal(signal.SIGINT) == own.handle:  # not one that the user's code has set meanwhile
                signal.signal(signal.SIGINT, handler)
        finally:
            _current = None
            own.at_once = True  # whoever has kept the handler, or sets it again, has the one before it
            own.take_effect()


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Ctrl-C takes effect as without `deferred`: the user's own code runs."""
    outer = _here()
    if outer is None or outer.at_once:
        yield
        return
    checkpoint()
    try:
        outer.at_once = True
        outer.take_effect()
        yield
    finally:
        outer.at_once = False


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
    if (current := _here()) is not None:
        current.take_effect()
