"""What the help says, as a snapshot of each command's options: `EXPECTTEST_ACCEPT=1` renews it."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from cli_cases import run

from sqcompile.cli.app import app
from sqcompile.cli.passed_on import _bench
from sqcompile.errors import RecipeError
from sqcompile.process.memory import bytes_of

SNAPSHOT = Path(__file__).parent / "help.txt"


def text() -> str:
    """The commands with their help, options and defaults, however a terminal would lay them out."""
    commands = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    commands["bench"] = typer.main.get_command(_bench)
    lines = []
    for name, command in commands.items():
        lines += [f"sqcompile {name}", *(f"  | {line}".rstrip() for line in str(command.help).strip().splitlines())]
        for p in command.params:
            if "--install-completion" in p.opts or "--show-completion" in p.opts:
                continue
            shown = p.metavar if p.param_type_name == "argument" else ", ".join([*p.opts, *p.secondary_opts])
            default = "" if p.default is None or p.required or p.default is False else f" [{p.default}]"
            lines.append(f"  {shown}: {getattr(p, 'help', '') or ''}{default}")
        lines.append("")
    return "\n".join(lines)


def test_the_help_of_every_command_is_as_it_was() -> None:
    import os

    if os.environ.get("EXPECTTEST_ACCEPT") == "1":
        SNAPSHOT.write_text(text())
    assert text() == SNAPSHOT.read_text()


@pytest.mark.parametrize("name", ["", "quantize", "eval", "generate", "report", "serve", "bench", "show", "demo"])
def test_help_is_printed(name: str) -> None:
    found = run(*filter(None, [name]), "--help")
    assert found.exit_code == 0 and "sqcompile" in found.output


def test_sizes() -> None:
    assert [bytes_of(t) for t in ("6GiB", "500 MB", "12", "1.5KB")] == [6 * 2**30, 500 * 10**6, 12, 1500]
    for wrong in ("", "6 gigs", "-1", "0", "GiB", "1e9"):
        with pytest.raises(RecipeError, match="is no size"):
            bytes_of(wrong)
