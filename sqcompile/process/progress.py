"""progress: what a long operation is at, for those who wait for it: a line on a terminal, a function of the user, a log.

    with stages(("trace", "calibrate"), progress) as enter:
        enter("trace")
        enter("calibrate")
        for batch in each(batches):             # counted
            ...
            for site in each(sites, "choose"):  # a part of the stage, "calibrate: choose", while it runs

What runs far below `stages` finds it by a context variable, which is each thread's own. Without `stages` around it, nothing
is told.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tqdm import tqdm

from sqcompile.errors import RecipeError
from sqcompile.process.interrupts import at_once

log = logging.getLogger("sqcompile")

Enter = Callable[[str], None]
_T = TypeVar("_T")

_APART = 0.05  # seconds at least between two calls of a user's function, but for the first and the last of a stage
_EVERY = 0.5  # seconds between two drawings of a line that nothing happens to
_DONE = {
    "emit": "compiled", "plan": "planned", "calibrate": "measured", "evaluate": "evaluated", "layers": "evaluated",
    "write": "written",
}  # fmt: skip


@dataclass(frozen=True)
class Progress:
    """What an operation is at, as a function that is passed as ``progress`` is told.

    Attributes:
        stage: "trace", "calibrate", ...; with a part of it behind a colon, "plan: choose", while that runs.
        done: how many of the stage's steps, or the part's, are done.
        total: of how many; None where nothing is counted, or nobody knows.
        seconds: since the stage, or the part, began.
        remaining: seconds that the rest will take at this rate; None where that is not known.
    """

    stage: str
    done: int
    total: int | None
    seconds: float
    remaining: float | None


Show = bool | Callable[[Progress], Any]


@dataclass(eq=False)
class _Step:
    name: str
    total: int | None
    done: int = 0
    since: float = field(default_factory=time.perf_counter)


class _Raised(BaseException):
    """What a user's function has raised, on its way out: nothing on the way takes it for an error of its own."""

    def __init__(self, error: Exception) -> None:
        self.error, self.context = error, error.__context__


class _Steps:
    """What one operation is at: the stage, and the parts of it that are open, the innermost last."""

    def __init__(self, tell: Callable[[Progress], Any] | None, line: _Line | None) -> None:
        self.open: list[_Step] = []
        self.seconds: dict[str, float] = {}  # of what is over
        self._tell, self._line, self._last = tell, line, 0.0

    def begin(self, name: str, total: int | None) -> _Step:
        self.open.append(step := _Step(name, total))
        self.told()
        return step

    def end(self, step: _Step) -> None:
        """Ends a step, and what was left open in it. Nobody is asked: it may be an error that ends it."""
        if step not in self.open:
            return
        now = self._now(step)
        log.debug("%s: %.2f s", now.stage, now.seconds)
        del self.open[self.open.index(step) :]
        if all(other.name != step.name for other in self.open):  # a part of a part of the same name is in that
            self.seconds[now.stage] = self.seconds.get(now.stage, 0.0) + now.seconds
        if self._line is not None and self.open:
            self._line.show(self._now(self.open[-1]))

    def seconds_of_open(self) -> dict[str, float]:
        now = [self._now(step) for step in self.open]
        return {n.stage: self.seconds.get(n.stage, 0.0) + n.seconds for n in now}

    def told(self) -> None:
        now = self._now(self.open[-1])
        if self._line is not None:
            self._line.show(now)
        if self._tell is not None and (now.done in (0, now.total) or time.perf_counter() - self._last >= _APART):
            self._last = time.perf_counter()
            try:
                with at_once():
                    self._tell(now)
            except Exception as e:
                raise _Raised(e) from None

    def _now(self, step: _Step) -> Progress:
        seconds = time.perf_counter() - step.since
        counted = step.total is not None and 0 < step.done <= step.total
        remaining = seconds / step.done * (step.total - step.done) if counted and step.total is not None else None
        stage = step.name if step is self.open[0] else f"{self.open[0].name}: {step.name}"
        return Progress(stage, step.done, step.total, seconds, remaining)


_running: ContextVar[_Steps | None] = ContextVar("sqcompile_progress", default=None)
_carrier: ContextVar[Callable[[Exception], Exception] | None] = ContextVar("sqcompile_carrier", default=None)


def check_show(progress: Any) -> None:
    """Raises RecipeError for what ``progress`` cannot be."""
    if not isinstance(progress, bool) and not callable(progress):
        raise RecipeError(f"progress={progress!r}: True, False, or a function that takes a sqcompile.Progress")


@contextlib.contextmanager
def carried(by: Callable[[Exception], Exception]) -> Iterator[None]:
    """What a user's function raises meanwhile comes as ``by(error)``, where there is somebody who takes it out of that."""
    token = _carrier.set(by)
    try:
        yield
    finally:
        _carrier.reset(token)


def silent(stage: str) -> None:
    """Shows nothing."""


@contextlib.contextmanager
def stages(names: Sequence[str], progress: Show) -> Iterator[Enter]:
    """Around an operation; what it yields is called with the name of each stage as it begins.

    Args:
        names: the stages, in their order.
        progress: True for a line on the terminal, if there is one; a function that is told; False for neither.

    Raises:
        RecipeError: for anything else.
        Exception: what the function raises.
    """
    check_show(progress)
    line = _Line(names) if progress is True and is_watched() else None
    steps = _Steps(None if isinstance(progress, bool) else progress, line)
    token = _running.set(steps)
    raised: _Raised | None = None

    def enter(stage: str) -> None:
        if steps.open:
            steps.end(steps.open[0])
        log.info("%s", stage)
        steps.begin(stage, None)

    try:
        yield enter
        if steps.open:
            steps.end(steps.open[0])
        if line is not None:
            line.finish(_DONE.get(names[-1], "done"))
    except _Raised as e:
        raised = e
    finally:
        _running.reset(token)
        if line is not None:
            line.close()
    if raised is not None:
        by = _carrier.get()
        try:
            raise raised.error if by is None else by(raised.error)
        finally:  # what it was raised in is the user's own, and not what was in between
            raised.error.__context__ = raised.context
            raised = None  # its traceback has this frame


def seconds_so_far() -> dict[str, float]:
    """The seconds of each stage of the operation that runs, and of each part ("plan: choose"), as often as it ran.

    In the order in which they ended, the stage that is under way last. Empty where no operation runs.
    """
    steps = _running.get()
    if steps is None:
        return {}
    open_ = steps.seconds_of_open()
    return {**{name: s for name, s in steps.seconds.items() if name not in open_}, **open_}


@contextlib.contextmanager
def part(name: str = "", total: int | None = None) -> Iterator[Callable[..., None]]:
    """A part of the stage that is under way; without a name, that stage itself, counted.

    What it yields is called when a step is done, or with the number of steps that are done by now.
    """
    steps = _running.get()
    if steps is None or not steps.open:
        yield lambda done=None: None
        return
    if name:
        step = steps.begin(name, total)
    else:
        step = steps.open[0]
        step.total, step.done = total, 0
        steps.told()

    def add(done: int | None = None) -> None:
        step.done = step.done + 1 if done is None else done
        if steps.open and steps.open[-1] is step:
            steps.told()

    try:
        yield add
    finally:
        if name:
            steps.end(step)


def each(items: Sequence[_T], name: str = "") -> Iterator[_T]:
    """The items, counted as they are done with: as a part of the stage, or as the stage itself."""
    with part(name, len(items)) as add:
        for item in items:
            yield item
            add()


def is_watched() -> bool:
    """Whether somebody sees a line that is drawn over and over: on a terminal, or in a notebook; and wants tqdm's bars."""
    if sys.stderr is None or os.environ.get("TQDM_DISABLE"):
        return False
    return sys.stderr.isatty() or type(sys.stderr).__module__.startswith("ipykernel")


class _Line:
    """One line on stderr. A thread redraws it, so that its time goes on where nothing is counted."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names, self._start, self._drawn = list(names), time.perf_counter(), 0.0
        self._bar = tqdm(total=None, bar_format="{desc}", smoothing=0, leave=False, file=sys.stderr)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._redraw, name="sqcompile-progress", daemon=True)
        self._thread.start()

    def show(self, now: Progress) -> None:
        stage, bar = now.stage.partition(":")[0], self._bar
        several = stage in self._names and len(self._names) > 1
        place = f"[{self._names.index(stage) + 1}/{len(self._names)}] " if several else ""
        new = bar.desc != place + now.stage
        bar.desc, bar.n, bar.total = place + now.stage, now.done, now.total
        bar.start_t = time.time() - now.seconds
        count = " {n_fmt}/{total_fmt} |{bar:20}| {elapsed}, {remaining} left" if now.total else " {elapsed}"
        bar.bar_format = "{desc}" + (" {n_fmt}, {elapsed}" if now.done and not now.total else count)
        if new or time.perf_counter() - self._drawn > _EVERY / 5:
            self._draw()

    def finish(self, word: str) -> None:
        """The last line, which stays."""
        self._stop()
        self._bar.desc, self._bar.total, self._bar.bar_format = word, None, "{desc} in {elapsed}"
        self._bar.start_t, self._bar.leave = time.time() - (time.perf_counter() - self._start), True
        self._draw()

    def close(self) -> None:
        self._stop()
        self._bar.close()

    def _stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _draw(self) -> None:
        self._drawn = time.perf_counter()
        self._bar.refresh()

    def _redraw(self) -> None:
        while not self._over.wait(_EVERY):
            self._draw()
