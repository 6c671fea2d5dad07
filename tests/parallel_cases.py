"""Starts the processes of tests/whole/test_parallel*.py, and reads what they have found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from parallel_worker import SIZE


def run(worker: str, folder: Path, seconds: int = 300) -> list[dict[str, Any]]:
    """What each process of a worker has found; one that waits for ever is a failure."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen([sys.executable, worker, str(rank), str(folder)], env=env) for rank in range(SIZE)]
    try:
        end = time.monotonic() + seconds
        while any(p.poll() is None for p in started):
            assert time.monotonic() < end and not any(p.poll() for p in started)
            time.sleep(0.05)
        assert not any(p.wait() for p in started)
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(SIZE)]
