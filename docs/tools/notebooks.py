"""The tutorials as notebooks: made of the same pages by jupytext, executed, and written beside them into the site.

    python docs/tools/notebooks.py site

Blocks that a page marks as not run stay text; what a page shows of outputs is left out, as a notebook has its own.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jupytext
import nbclient
import nbformat
from pages import ROOT, Block, blocks, environment

SOURCES = [ROOT / "docs" / "quickstart.md", *sorted((ROOT / "docs" / "tutorials").glob("*.md"))]
SECONDS = 900  # of a cell


def as_notebook(page: Path) -> Any:
    """The page as a notebook that is not executed yet."""
    lines = page.read_text(encoding="utf-8").splitlines()
    for block in reversed(blocks(page)):
        first, last = block.line - 2, block.line - 1 + len(block.code.splitlines())  # its fences, from 0
        lines[first : last + 1] = _rewritten(block)
    text = re.sub(r"\]\(([^):\s]+)\.md(#[^)\s]*)?\)", r"](\1.html\2)", "\n".join(lines))
    text = re.sub(r"^<!-- not run: .*\n|^.*\.ipynb\" download>.*\n", "", text, flags=re.M)
    found = jupytext.reads(text, fmt="md")
    for cell in found.cells:
        cell.source = cell.source.replace(" .noeval\n", "\n")
    found.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return found


def _rewritten(block: Block) -> list[str]:
    if block.kind in ("text",):
        return []
    if block.skipped or block.kind not in ("python", "sh"):
        return [f"```{block.kind} .noeval", *block.code.splitlines(), "```"]
    if block.file:
        return ["```python", f"%%writefile {block.file}", *block.code.splitlines(), "```"]
    return [f"```{'bash' if block.kind == 'sh' else 'python'}", *block.code.splitlines(), "```"]


def executed(page: Path) -> tuple[Any, float]:
    """The page as a notebook with its outputs, and the seconds that it took.

    Raises:
        nbclient.exceptions.CellExecutionError: for a cell that fails.
    """
    started = time.perf_counter()
    os.environ.update(environment())
    notebook = as_notebook(page)
    with tempfile.TemporaryDirectory(prefix="notebook-") as folder:
        resources = {"metadata": {"path": folder}}
        nbclient.NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=resources).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":  # progress bars and warnings of libraries are no results
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
            cell.metadata.pop("execution", None)
    return notebook, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path, help="where mkdocs wrote the pages")
    parser.add_argument("pages", nargs="*", type=Path, help="these instead of all tutorials")
    args = parser.parse_args()
    sources = [p.resolve() for p in args.pages] or SOURCES
    with ProcessPoolExecutor(2) as pool:
        for page, (notebook, seconds) in zip(sources, pool.map(executed, sources), strict=True):
            target = args.site / page.relative_to(ROOT / "docs").with_suffix(".ipynb")
            target.parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(notebook, target)
            print(f"{target}: {seconds:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
