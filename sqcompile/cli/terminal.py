"""terminal: what the commands print. Results on stdout, as a table or as one JSON object; all else on stderr."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sqcompile.errors import SQCompileError
from sqcompile.files.regular import said

_OURS = str(Path(__file__).resolve().parent.parent)
FAILED, INTERRUPTED = 2, 130  # exit codes


class CommandError(SQCompileError):
    """A command that cannot do what its arguments say."""


class Terminal:
    """Where a command prints.

    Attributes:
        progress: whether bars are shown: not with ``--quiet``, nor where stderr is no terminal.
        left: gives what Ctrl-C leaves, in words.
    """

    def __init__(self, as_json: bool = False, quiet: bool = False) -> None:
        self._json, self._quiet, self._heard = as_json, quiet, True
        self.left: Callable[[], str] = lambda: "nothing was written"
        self._out, self._err = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False)
        self.progress = not self._quiet and sys.stderr.isatty()

    def hush(self) -> None:
        """Says nothing more, as another process does that for all."""
        self._heard, self._quiet, self.progress = False, True, False

    def say(self, text: str) -> None:
        """A line for those who wait."""
        if not self._quiet:
            self._err.print(text, style="dim", markup=False)

    def result(self, found: Mapping[str, Any], text: str | Table) -> None:
        """What the command found: as JSON, or as text for people."""
        if not self._heard:
            return
        if self._json:
            print(json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False))
        elif isinstance(text, str):
            self._out.print(text, markup=False)
        else:
            self._out.print(text)

    def ended(self) -> None:
        """Says that the launcher of several processes ends this one, and ends at once."""
        why = "the launcher ends this process, as it does with all when one of them has ended"
        os.write(2, f"error: {why}: {self.left()}\n".encode())  # a signal may come while something is printed
        os._exit(FAILED)

    def fail(self, error: BaseException) -> None:
        """One sentence on stderr; with ``--json`` an object on stdout, too."""
        if self._json and self._heard:
            print(json.dumps({"error": type(error).__name__, "message": str(error)}, ensure_ascii=False))
        print(f"error: {error}", file=sys.stderr)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Rows under headings, numbers aligned to the right."""
    found = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        found.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        found.add_row(*row)
    return found


@contextmanager
def command(as_json: bool = False, quiet: bool = False) -> Iterator[Terminal]:
    """Around what a command does: its errors are a sentence and exit code 2, and Ctrl-C is exit code 130."""
    terminal = Terminal(as_json, quiet)
    _silence()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_nothing if quiet else _show_own  # type: ignore[assignment]
            yield terminal
    except SQCompileError as e:
        terminal.fail(e)
        sys.exit(FAILED)
    except KeyboardInterrupt:
        print(f"interrupted: {terminal.left()}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(INTERRUPTED)  # at once: threads of a pool or of a compiler would be waited for
    except OSError as e:  # of a disk, as the system says it
        if isinstance(e, BrokenPipeError):  # the reader of a pipe has seen enough
            os._exit(0)
        terminal.fail(CommandError(said(e)))
        sys.exit(FAILED)


def _show_own(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
    """Our own warnings as a line; those of other packages about themselves are nothing a user can act on."""
    if os.path.realpath(filename).startswith(_OURS) and issubclass(category, UserWarning):
        print(f"warning: {message}", file=sys.stderr)


def _show_nothing(*_: Any) -> None:
    pass


def _silence() -> None:
    """Keeps other packages from printing notes and bars of their own."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is read from the directory
    logging.getLogger("torch").setLevel(logging.ERROR)
    try:
        from transformers.utils import logging as of_transformers
    except ImportError:
        return
    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()
