"""The code blocks of the documentation: found, and run in their order, each page in one namespace in a folder of its own.

    python docs/tools/pages.py docs/usage.md docs/saving.md

A block begins with ```python or ```sh and is run. Other kinds (```text, ```json, ```diff) are not. Markers, which readers
do not see, are comments on a line of their own:

    <!-- not run: it needs a GPU -->        the next block is not run, and why
    <!-- file: shared.py -->                the next block is written to that file instead of being run
    <!-- setup: what the page takes for granted
    model = ...                             Python that is run where it stands
    -->
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RUN, SHOWN = ("python", "sh"), ("text", "json", "diff", "yaml")
_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,}) *(?P<kind>[^\s`]*) *(?P<rest>.*)$")
_MARKER = re.compile(r"^<!-- (?P<kind>not run|file|setup): (?P<text>.*?)(?P<end> -->)?$")


class PageError(Exception):
    """A page that cannot be read: the file, the line and what is wrong with it."""


@dataclass(frozen=True)
class Block:
    """A block of a page.

    Attributes:
        page: the file.
        line: of its first line of code, from 1.
        kind: "python", "sh", or what is only shown.
        code: its text, without the indentation of its fence.
        skipped: why it is not run; "" where it is.
        file: the name of the file that it is written to, or "".
        hidden: whether it is a setup, which readers do not see.
    """

    page: Path
    line: int
    kind: str
    code: str
    skipped: str = ""
    file: str = ""
    hidden: bool = False


def pages() -> list[Path]:
    """All pages of the documentation, the readmes first."""
    return [*sorted(ROOT.glob("README*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, text: str | None = None) -> list[Block]:
    """The blocks of a page, in its order.

    Raises:
        PageError: for a block of no kind or of an unknown one, one that does not end, and a marker that is none or marks no
            block.
    """
    lines = (page.read_text(encoding="utf-8") if text is None else text).splitlines()
    found, marker, i = [], None, 0
    while i < len(lines):
        line, i = lines[i], i + 1
        if fence := _FENCE.match(line):
            end = next((j for j in range(i, len(lines)) if lines[j].strip() == fence["fence"]), None)
            if end is None:
                raise PageError(f"{page}:{i}: the block does not end")
            if fence["kind"] not in (*RUN, *SHOWN) or fence["rest"]:
                raise PageError(f"{page}:{i}: a block of kind {line.strip()!r}: begin it with one of {(*RUN, *SHOWN)}")
            code = "\n".join(c.removeprefix(fence["indent"]) for c in lines[i:end])
            how = {marker[0]: marker[1]} if marker else {}
            found.append(Block(page, i + 1, fence["kind"], code, how.get("not run", ""), how.get("file", "")))
            marker, i = None, end + 1
        elif line.startswith("<!--"):
            match = _MARKER.match(line)
            if match is None or marker or not match["text"].strip():
                raise PageError(f"{page}:{i}: {line!r} is no marker: see docs/tools/pages.py")
            if match["kind"] == "setup":
                end = next((j for j in range(i, len(lines)) if lines[j] == "-->"), None)
                if end is None or match["end"]:
                    raise PageError(f"{page}:{i}: the setup does not end")
                found.append(Block(page, i + 1, "python", "\n".join(lines[i:end]), hidden=True))
                i = end + 1
            elif not match["end"]:
                raise PageError(f"{page}:{i}: the marker does not end on its line")
            else:
                marker = (match["kind"], match["text"].strip())
        elif line.strip() and marker:
            raise PageError(f"{page}:{i}: a marker, and no block after it")
    if marker:
        raise PageError(f"{page}: a marker at the end, and no block after it")
    return found


def run_block(block: Block, names: dict[str, Any]) -> None:
    """Runs a block in the working directory; Python in the namespace ``names``.

    Raises:
        BaseException: what the code of the block raises.
        subprocess.CalledProcessError: if a command of the block fails.
    """
    if block.file:
        Path(block.file).write_text(block.code + "\n", encoding="utf-8")
    elif block.kind == "sh":
        subprocess.run(["bash", "-euo", "pipefail", "-c", block.code], check=True)
    else:
        # the lines before it are left empty, so that errors name the page's own line
        exec(compile("\n" * (block.line - 1) + block.code, str(block.page), "exec"), names)


def environment() -> dict[str, str]:
    """What the blocks of a page see: this environment's programs first, this checkout, and no network of models."""
    bin_first = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    paths = os.pathsep.join([str(ROOT), str(ROOT / "docs" / "tools"), *filter(None, [os.environ.get("PYTHONPATH")])])
    quiet = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "MPLBACKEND": "agg"}
    # of the tests' own checks users know nothing
    own = {name: v for name, v in os.environ.items() if name != "SQCOMPILE_VERIFY"}
    return {**own, **quiet, "PATH": bin_first, "PYTHONPATH": paths}


def runs(page: Path) -> Iterator[Block]:
    """The blocks of a page that are run."""
    return (b for b in blocks(page) if b.kind in RUN and not b.skipped)


def run_page(page: Path) -> int:
    """Runs the blocks of a page in a process and a temporary folder of their own, and gives the exit status.

    Its stdout has what the blocks print, and a line for each with its seconds.
    """
    command = [sys.executable, "-u", str(Path(__file__).resolve()), "--here", str(page.resolve())]
    with tempfile.TemporaryDirectory(prefix="page-") as folder:
        return subprocess.run(command, cwd=folder, env=environment()).returncode


def _run_here(page: Path) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in runs(page):
        started = time.perf_counter()
        print(f"--- {page.name}:{block.line}: {(block.code.strip() or ' ').splitlines()[0][:80]}", flush=True)
        run_block(block, names)
        print(f"--- {time.perf_counter() - started:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--here", action="store_true", help="in this process and folder; one page")
    args = parser.parse_args()
    if args.here:
        _run_here(args.pages[0])
    elif failed := [str(p) for p in args.pages if run_page(p)]:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
