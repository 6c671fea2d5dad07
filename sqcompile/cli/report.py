"""report: what was done with each linear of a quantized directory, as text, as JSON, or as a page."""

from __future__ import annotations

import dataclasses
import html
import json
from typing import Any

from sqcompile.cli.terminal import CommandError, Terminal
from sqcompile.compiled.report import Report
from sqcompile.files.regular import replace_file, said
from sqcompile.loading import opened
from sqcompile.plan.plan import Plan

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; width: 100%; font-size: 13px; }}
th, td {{ text-align: left; padding: 3px 8px; border-bottom: 1px solid #ddd; vertical-align: top; }}
td:nth-child(n+4):nth-child(-n+7) {{ text-align: right; white-space: nowrap; }}
td:first-child {{ font-family: monospace; }}
tr.float {{ background: #fff4e5; }}
</style>
<h1>{title}</h1>
<p>{summary}</p>
<p>Recipe: <code>{recipe}</code></p>
<table><tr><th>linear<th>runs in<th>smoothing<th>α<th>rotation<th>SQNR, dB<th>weight<th>why</tr>
{rows}
</table>
</html>
"""


def report(folder: str, out: str | None, terminal: Terminal, full: bool = False) -> None:
    """Prints the report of a directory, with ``full`` a line for each linear, or writes it as a page.

    Raises:
        SQCompileError: for a directory without a model in INT8, or a path that cannot be written.
    """
    plan = opened(folder)[0]
    found = Report.of(plan)
    if out is None:
        asked = {"recipe": dataclasses.asdict(plan.recipe)}
        terminal.result(asked | json.loads(found.to_json()), found.to_text(full))
        return
    if not out.endswith(".html"):
        raise CommandError(f"-o {out}: name a file that ends in .html, or leave it out for text")
    try:
        replace_file(out, page(plan, folder).encode())
    except OSError as e:
        raise CommandError(f"{out} cannot be written ({said(e)}): name a file in a directory that exists") from e
    terminal.result({"path": out}, f"written to {out}")


def page(plan: Plan, title: str) -> str:
    """The report as an HTML page that needs nothing else."""
    rows = []
    for l in plan.layers:
        cells: list[Any] = [
            l.name,
            plan.recipe.dtype.upper() if l.quantized else "float",
            l.smoothing,
            "" if l.alpha is None else f"{l.alpha:.2f}",
            l.rotation or "",
            "" if l.sqnr_db is None else f"{l.sqnr_db:.1f}",
            " x ".join(map(str, l.shape)),
            l.reason,
        ]
        kind = "" if l.quantized else ' class="float"'
        rows.append(f"<tr{kind}>" + "".join(f"<td>{html.escape(str(c))}" for c in cells) + "</tr>")
    summary = str(Report.of(plan)).splitlines()[-1]
    named = {k: html.escape(v) for k, v in {"title": title, "summary": summary, "recipe": str(plan.recipe)}.items()}
    return _PAGE.format(**named, rows="\n".join(rows))
