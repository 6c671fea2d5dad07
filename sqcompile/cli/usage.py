"""usage: wrong options as any other error: one sentence on stderr, exit code 2, and with ``--json`` an object on stdout."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from typer.core import TyperGroup

from sqcompile.cli.terminal import FAILED, CommandError, Terminal


class Commands(TyperGroup):
    """The commands."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """As click's, which writes a usage text, a hint and a box instead."""
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except Exception as e:  # typer has a click of its own, or the package: they are told by what they do
            if not standalone_mode or not hasattr(e, "format_message"):
                raise
            if type(e).__name__ == "NoArgsIsHelpError":
                e.show()  # type: ignore[attr-defined]
                sys.exit(FAILED)
            words = " ".join(str(e.format_message()).split()).rstrip(".")
            where = getattr(getattr(e, "ctx", None), "command_path", "sqcompile")
            Terminal("--json" in (sys.argv if args is None else args)).fail(
                CommandError(f"{words}: see {where} --help")
            )
            sys.exit(FAILED)
        if not standalone_mode:
            return code
        sys.exit(code if isinstance(code, int) else 0)
