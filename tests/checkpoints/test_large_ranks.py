"""quantize_checkpoint on several ranks: the bytes of one process, also after ranks were killed; one sentence where one fails."""

from __future__ import annotations

import filecmp
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import large_worker
import pytest
from conftest import tiny_lm


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "model"
    tiny_lm("llama", num_hidden_layers=1).save_pretrained(path)
    return path


def run(what: str, checkpoint: Path, folder: Path) -> str:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "SQCOMPILE_VERIFY": "0"}
    command = [sys.executable, large_worker.__file__, what, str(checkpoint), str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    return done.stdout


def same(a: Path, b: Path) -> bool:
    names = sorted(os.listdir(a))
    return names == sorted(os.listdir(b)) and filecmp.cmpfiles(a, b, names, shallow=False) == (names, [], [])


def told(folder: Path, name: str, rank: int) -> tuple[str, list[str]]:
    """What a rank raised, and the files of weights that it wrote."""
    said, wrote, seconds = json.loads((folder / f"{name}-{rank}.json").read_text())
    assert seconds < 90
    return said, wrote


def test_two_ranks_write_the_bytes_of_one_and_share_the_files(checkpoint, tmp_path):
    run("sizes", checkpoint, tmp_path)
    assert same(tmp_path / "native-1", tmp_path / "native-2")
    assert not [name for name in os.listdir(tmp_path) if name.endswith((".work", ".tmp"))]
    shares = [told(tmp_path, "native-2", rank) for rank in (0, 1)]
    assert all(said == "nothing" for said, _ in shares)
    want = [f for f in sorted(os.listdir(tmp_path / "native-1")) if f.startswith("model-")]
    assert len(want) > 3 and [shares[0][1], shares[1][1]] == [want[::2], want[1::2]]


@pytest.fixture(scope="module")
def formats(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("formats")
    run("formats", checkpoint, folder)
    return folder


@pytest.fixture(scope="module")
def failures(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("failures")
    run("failures", checkpoint, folder)
    return folder


@pytest.mark.slow
def test_every_format_and_number_of_ranks_gives_the_same_bytes(formats):
    assert same(formats / "native-1", formats / "native-3")
    for kind in ("compressed-tensors", "smoothed"):
        assert same(formats / f"{kind}-1", formats / f"{kind}-2")
        assert told(formats, f"{kind}-2", 1)[1]  # blocks, which are in no directory at the end
    assert not [name for name in os.listdir(formats) if name.endswith((".work", ".tmp"))]


@pytest.mark.slow
def test_a_rank_that_does_not_see_the_directory_leaves_the_files_to_others(formats):
    assert same(formats / "native-1", formats / "blind-2")
    assert told(formats, "blind-2", 1) == ("nothing", [])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "alive", "size"), [("one", 0, 2), ("first", 1, 3), ("all", None, 1)])
def test_a_run_whose_ranks_were_killed_as_they_wrote_goes_on(failures, name, alive, size):
    if alive is not None:
        said, _ = told(failures, f"{name}-cut", alive)
        dead = f"rank {1 - alive} has ended: it gave no sign of life for {large_worker.SILENT:g} s"
        assert said == f"CalibrationError: {dead}"
    assert same(failures / f"{name}-before", failures / "old")
    left = json.loads((failures / f"{name}.left").read_text())
    finished = {f for f in left if f.startswith("model-")}
    assert len(finished) == 2 and {"plan.safetensors", "statistics.safetensors"} < set(left)
    assert same(failures / name, failures / "native-1")
    wrote = [f for rank in range(size) for f in told(failures, f"{name}-on", rank)[1]]
    assert sorted(wrote) == sorted(
        f for f in os.listdir(failures / name) if f.startswith("model-") and f not in finished
    )


@pytest.mark.slow
def test_a_full_disk_of_one_rank_ends_all_and_loses_nothing(failures):
    said = [told(failures, "full", rank)[0] for rank in (0, 1)]
    assert re.fullmatch(
        r"ArtifactError: the model cannot be saved to .*/full \(OSError: .*No space left on device\)", said[1]
    )
    assert said[0] == f"CalibrationError: rank 1 failed: {said[1].removeprefix('ArtifactError: ')}"
    assert same(failures / "full", failures / "native-1")


@pytest.mark.slow
def test_ranks_with_other_batches_are_refused(failures):
    for rank in (0, 1):
        assert told(failures, "other", rank)[0] == (
            "CalibrationError: rank 1 has other batches than rank 0: pass every rank the same"
        )
    assert not (failures / "other").exists() and not (failures / "other.work").exists()


@pytest.mark.slow
def test_killed_at_random_moments_it_writes_the_same_bytes(checkpoint, tmp_path):
    ended = run("killed", checkpoint, tmp_path).split()
    assert ended.count("9") >= 3  # of four that are killed, but for those that had ended
    assert [i for i in range(3) if not same(tmp_path / "whole", tmp_path / f"{i}")] == []
    assert not [name for name in os.listdir(tmp_path) if name.endswith((".work", ".tmp"))]
