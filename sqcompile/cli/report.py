"""report: what was done with each linear of a quantized directory, or of a plan, as text, as JSON, or as a page."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from typing import Any

from sqcompile.cli.terminal import CommandError, Terminal
from sqcompile.compiled.report import Report
from sqcompile.evaluation import Evaluation
from sqcompile.files.bounded_json import read_object
from sqcompile.files.regular import read_regular, said
from sqcompile.loading import opened
from sqcompile.plan.plan import Plan

_MOST = 2**20  # bytes of a file with an evaluation
_KINDS = {"int": int, "str": str, "float | None": (float, int)}  # of fields of an Evaluation, as they are annotated


def report(folder: str, out: str | None, full: bool, evaluation: str | None, terminal: Terminal) -> None:
    """Prints the report of a directory or of a plan's file, with ``full`` a line for each linear, or writes it as a page.

    Raises:
        SQCompileError: for a directory without a model in INT8, a file that is no plan, an evaluation that is none, or a path that cannot be written.
    """
    if evaluation is not None and out is None:
        raise CommandError("--evaluation is for the page: add -o FILE.html, or leave it out")
    measured = None if evaluation is None else read_evaluation(evaluation)
    alone = os.path.isfile(folder)
    plan = Plan.load(folder) if alone else opened(folder)[0]
    found = Report.of(plan)
    if out is None:
        asked = {"recipe": dataclasses.asdict(plan.recipe)}
        terminal.result(asked | json.loads(found.to_json()), found.to_text(full))
        return
    found.to_html(out, evaluation=measured, title=None if alone else _title(folder), progress=terminal.progress)
    terminal.result({"path": out}, f"written to {out}")


def _title(folder: str) -> str | None:
    """A page's title, from the name of a directory; None where that would be none."""
    name = os.path.basename(os.path.abspath(folder))[:100]
    return name if name.isprintable() and name else None


def read_evaluation(path: str) -> Evaluation:
    """What `sqcompile eval --json` has printed into a file.

    Raises:
        CommandError: if the file holds something else.
    """
    try:
        found = read_object(read_regular(path, _MOST, "an evaluation").decode(), "the evaluation")
        return Evaluation(**_fields(found))
    except Exception as e:  # whatever the system and the parser have to say of it
        hint = "make one with `sqcompile eval DIR --text TEXT --against FLOAT --json > FILE.json`"
        raise CommandError(f"{path} is no evaluation ({said(e)}): {hint}") from e


def _fields(found: dict[str, Any]) -> dict[str, Any]:
    kinds = {f.name: str(f.type) for f in dataclasses.fields(Evaluation)}
    plain = {name: value for name, value in found.items() if kinds.get(name) in _KINDS}
    for name, value in plain.items():
        optional = value is None and kinds[name].endswith("None")
        good = isinstance(value, _KINDS[kinds[name]]) and not isinstance(value, bool)  # type: ignore[arg-type]
        if not (optional or good) or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"its {name} is {value!r:.40}")
    if missing := {"compared", "windows", "tokens"} - plain.keys():
        raise ValueError(f"it has no {min(missing)}")
    numbers = {n: float(v) for n, v in plain.items() if kinds[n] == "float | None" and v is not None}
    return {**plain, **numbers}
