"""Memory of large results of x86 CPUs' operators: used again, given back, and not shared with a forked process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from sqcompile.kernels.cpu import dispatch, x86
from sqcompile.kernels.ops import ON_X86, on_x86_library, sqcompile_ops

pytestmark = pytest.mark.skipif(not x86.available(), reason="for CPUs with VNNI")


@pytest.fixture(autouse=True)
def _installed():
    assert dispatch.install(ON_X86, on_x86_library)


def product(rows):
    """A result of 2 KiB a row."""
    w = torch.zeros(512, 64, dtype=torch.int8)
    packed, sums = x86.pack(w)
    q = torch.full((rows, 64), 128, dtype=torch.uint8)
    return sqcompile_ops.matmul_u8s8(q, packed, torch.ones(512), sums, torch.float32)


@pytest.fixture
def kept():
    """What is kept of memory, from nothing on."""
    library = dispatch.library()
    library.sqcompile_release()
    assert library.sqcompile_kept() == 0
    return library.sqcompile_kept


def test_memory_of_large_results_is_used_again(kept):
    large = product(4096)  # 8 MiB
    address = large.data_ptr()
    assert address % 64 == 0 and not large.any()
    view = large[5:]
    del large
    assert kept() == 0
    del view  # the last that uses it
    assert kept() == 4096 * 2048
    again = product(4096)
    assert again.data_ptr() == address and kept() == 0
    some = [product(2000) for _ in range(3)]
    assert len({again.data_ptr(), *(y.data_ptr() for y in some)}) == 4


@pytest.mark.parametrize("rows", [16, 40])  # less than 64 KiB, and more
def test_memory_of_results_that_were_larger_once_goes_back(kept, rows):
    every = [product(512) for _ in range(100)]
    del every
    assert kept() > 0
    for _ in range(4200):
        product(rows)
    assert kept() <= 2 * rows * 2048 * 1.125


def test_no_more_than_twice_what_was_in_use_at_once_is_held(kept):
    most = 0
    for rows in (4096, 2900, 3300, 2500, 3700, 2200):
        some = [product(rows) for _ in range(4)]
        most = max(most, 4 * rows * 2048 * 1.125)
        assert kept() + 4 * rows * 2048 <= 2 * most, rows
        del some
        assert kept() <= 2 * most, rows


FORKED = """
import os, threading, torch
from test_pool import product
from sqcompile.kernels.cpu import dispatch
from sqcompile.kernels.ops import ON_X86, on_x86_library
torch.set_num_threads(1)
assert dispatch.install(ON_X86, on_x86_library)
product(64)
stop = False
def busy():
    while not stop:
        product(64)  # takes and gives blocks all the time
thread = threading.Thread(target=busy)
thread.start()
for _ in range(20):
    child = os.fork()
    if child == 0:
        product(64)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
stop = True
thread.join()
print("all ended")
"""


def test_a_forked_process_has_memory_of_its_own():
    where = os.path.dirname(__file__)
    run = subprocess.run([sys.executable, "-c", FORKED], cwd=where, capture_output=True, text=True, timeout=120)
    assert run.stdout == "all ended\n", run.stderr
