"""The list of long tests names tests that there are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_every_long_test_is_a_test() -> None:
    folder = Path(__file__).parent
    names = (folder / "long.txt").read_text().splitlines()[1:]
    files = sorted({name.partition("::")[0] for name in names})
    collect = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", *files]
    found = subprocess.run(collect, cwd=folder.parent, capture_output=True, text=True).stdout.splitlines()
    assert set(names) <= set(found)
