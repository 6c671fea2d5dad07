"""Threads that wait for each other beside busy processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sqcompile.bench.cpu_peers import busy
from sqcompile.kernels.cpu import rows, x86

CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

MANY_CALLS = """
import time, torch
from sqcompile.kernels.cpu import rows
torch.set_num_threads(CPUS)
x, kernels = torch.randn(64, 768), rows.library()
want = [t.clone() for t in rows.quantize(x)]
start = time.perf_counter()
for _ in range(3000):
    got = rows.quantize(x)
print(time.perf_counter() - start, kernels.sqcompile_crowded())
assert all(map(torch.equal, got, want))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux") or CPUS < 2, reason="needs GNU's OpenMP and two CPUs")
@pytest.mark.skipif(rows.library() is None, reason="needs a compiler")
def test_beside_busy_processes_threads_are_not_waited_for_by_spinning():
    """3000 calls of 30 us each. By spinning they took a minute, as each waited for time slices."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "MKL_"))}
    command = [sys.executable, "-c", MANY_CALLS.replace("CPUS", str(min(CPUS, 16)))]
    with busy(CPUS):
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    seconds, crowded = done.stdout.split()
    assert float(seconds) < 8 and int(crowded) >= 1


def test_libraries_say_how_often():
    for library in (rows.library(), x86.library()):
        assert library is None or library.sqcompile_crowded() >= 0
