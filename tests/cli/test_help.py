"""What the help says, as a snapshot of each command's options: `EXPECTTEST_ACCEPT=1` renews it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
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


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["quantize"], "Missing argument 'MODEL_DIR': see .* quantize --help"),
        (["quantize", "x", "--samples", "0"], "Invalid value for '--samples': .*: see .* quantize --help"),
        (["eval", "x", "--text", "y", "--seed", "-1"], "Invalid value for '--seed'"),
        (["quantise", "x"], "No such command 'quantise'"),
        (["report", "x", "--fulll"], "No such option: --fulll"),
        (["bench", "x", "--seconds", "0"], "Invalid value for '--seconds'"),
    ],
    ids=str,
)
def test_a_wrong_option_is_one_sentence(command, said):
    plain, as_json = run(*command), run(*command, "--json")
    assert plain.exit_code == as_json.exit_code == 2 and not plain.stdout
    assert re.fullmatch(f"error: {said}.*\n", plain.stderr), plain.stderr
    assert json.loads(as_json.stdout)["message"] == plain.stderr.removeprefix("error: ").strip()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tune_says_that_there_is_no_gpu():
    found = run("tune", "--out", "x")
    assert found.exit_code == 2 and found.stderr.startswith("error: there is no GPU here") and not found.stdout
