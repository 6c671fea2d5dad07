"""Calibration on several processes: one plan, whatever their number, and one sentence where one of them fails."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rank_worker

pytestmark = pytest.mark.slow  # its processes take half a minute of two cores

RANKS = 3
SAME_DATA = "pass every rank the same loader, with all batches in one order (no DistributedSampler, and one seed where it shuffles)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What three processes have written."""
    return run(tmp_path_factory.mktemp("ranks"), "all")


def run(folder: Path, what: str) -> Path:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(s.getsockname()[1]))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    started = [
        subprocess.Popen([sys.executable, rank_worker.__file__, str(r), str(folder), what], env=env)
        for r in range(RANKS)
    ]
    try:
        end = time.monotonic() + 200
        while any(p.poll() is None for p in started):
            assert time.monotonic() < end and all((p.poll() or 0) <= 0 for p in started)  # less than 0: a signal
            time.sleep(0.1)
    finally:
        for process in started:
            process.kill()
            process.wait()
    return folder


@pytest.mark.parametrize(
    ("size", "what"), [(size, what) for size, found in rank_worker.PLANS.items() for what in found if size]
)
def test_every_number_of_ranks_gives_the_same_plan(folder, size, what):
    """To the byte; of the calls that a callable makes, and of a compilation, too."""
    alone = what if what in rank_worker.PLANS[0] else "default"
    want = (folder / f"{alone}-0-0").read_bytes()
    assert all((folder / f"{what}-{size}-{rank}").read_bytes() == want for rank in range(size))


def test_families_have_the_same_plan_too(tmp_path):
    """A Llama and a mixture of experts, with padding in most of the batches."""
    run(tmp_path, "families")
    for family, recipe in rank_worker.FAMILIES:
        plans = [
            (tmp_path / f"{family}-{recipe}-{size}-{rank}").read_bytes() for size in (0, 2) for rank in range(size or 1)
        ]
        assert len(set(plans)) == 1, (family, recipe)


@pytest.mark.parametrize(
    ("name", "own", "others"),
    [
        ("raises", {1: "ValueError: no text\nis left"}, "CalibrationError: rank 1 failed: ValueError: no text is left"),
        ("first raises", {0: "ValueError: no text\nis left"}, "CalibrationError: rank 0 failed: ValueError: no text is left"),
        ("model", {}, "CalibrationError: rank 2 has another model than rank 0: load the same model with the same weights on every rank"),
        ("more", {}, f"CalibrationError: rank 1 has more or fewer batches than rank 0: {SAME_DATA}"),
        ("shuffled", {}, f"CalibrationError: rank 1 has another first batch than rank 0: {SAME_DATA}"),
        ("in another order", {}, f"CalibrationError: rank 2 has other batches than rank 0: {SAME_DATA}"),
        ("recipe", {}, "CalibrationError: rank 1 has another recipe than rank 0: pass every rank the same"),
        ("no recipe", {1: "RecipeError: unknown recipe 'O7': pass one of default, O1, O2, O3, fp8, or a sqcompile.Recipe"}, "CalibrationError: rank 1 failed: unknown recipe 'O7': pass one of default, O1, O2, O3, fp8, or a sqcompile.Recipe"),
        ("again", {}, "none"),
        ("late", {}, "CalibrationError: rank 2 has not begun in 3 s: every rank of a process group makes the same calls of sqcompile, such as calibrate, with the same model and data"),
    ],
)  # fmt: skip
def test_the_ranks_end_together(folder, name, own, others):
    for rank in range(RANKS):
        assert said(folder, name, rank) == own.get(rank, others)


def said(folder: Path, name: str, rank: int, most: float = 30.0) -> str:
    """What a rank's calibration raised, in no more than so many seconds."""
    words, seconds = json.loads((folder / f"{name}-{rank}").read_text())
    assert seconds < most
    return words


def test_an_activation_that_is_not_finite_is_found_by_the_rank_that_has_its_batch(folder):
    words = said(folder, "not finite", 1).removeprefix("CalibrationError: ")
    assert words.startswith("the input of ") and " is not finite in calibration batch 4: check the batch" in words
    assert {said(folder, "not finite", rank) for rank in (0, 2)} == {f"CalibrationError: rank 1 failed: {words}"}


def test_a_rank_that_is_killed_ends_the_others(folder):
    for rank in (0, 1):
        words = said(folder, "killed", rank)
        assert words == f"CalibrationError: rank 2 has ended: it gave no sign of life for {rank_worker.SILENT:g} s"
    assert not (folder / "killed-2").exists() and not (folder / "first killed-0").exists()
    assert said(folder, "first killed", 1).startswith(
        "CalibrationError: rank 0, or the launcher that keeps the process group's store in its place, has ended: "
    )
