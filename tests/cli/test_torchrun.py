"""The command line in several processes, as torchrun starts them: one result, and a run that goes on after a kill."""

from __future__ import annotations

import filecmp
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from cli_cases import FAST, jsonl, llama, process, run

pytestmark = pytest.mark.slow  # each of its processes imports everything


def same(a: Path, b: Path) -> bool:
    names = sorted(os.listdir(a))
    return names == sorted(os.listdir(b)) and filecmp.cmpfiles(a, b, names, shallow=False) == (names, [], [])


def rank_of(launcher: subprocess.Popen[str], rank: int) -> int:
    """The process of a rank."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            parent = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1]
            if parent == str(launcher.pid) and f"\0RANK={rank}\0" in Path(f"/proc/{name}/environ").read_text():
                return int(name)
        except OSError:  # it has ended
            continue
    raise ProcessLookupError(f"rank {rank}")


@pytest.mark.parametrize("killed", [(1,), (0, 1)])
def test_a_run_that_was_killed_goes_on_and_writes_the_bytes_of_one_process(killed, tmp_path):
    llama(tmp_path / "float", num_hidden_layers=1)
    calib = ("--calib", jsonl(tmp_path / "texts.jsonl"), "--samples", "8", "--batch-size", "1", *FAST)
    arguments = ("quantize", tmp_path / "float", *calib, "--max-memory", "1TiB", "-o", tmp_path / "out")
    started = process(*arguments, cwd=tmp_path, ranks=2)
    end = time.monotonic() + 200
    while not (tmp_path / "out.work" / "statistics.safetensors").exists():
        assert time.monotonic() < end and started.poll() is None
        time.sleep(0.02)
    for rank in killed:
        os.kill(rank_of(started, rank), signal.SIGKILL)
    out, err = started.communicate(timeout=100)
    assert started.returncode != 0 and not out and not (tmp_path / "out").exists()
    assert (tmp_path / "out.work" / "statistics.safetensors").exists()
    ours = [line for line in err.splitlines() if line.startswith("error: ")]
    if killed == (1,):
        why = "the launcher ends this process, as it does with all when one of them has ended"
        assert ours == [f"error: {why}: the same command goes on with what {tmp_path}/out.work has"]
    again = process(*arguments, cwd=tmp_path, ranks=2)
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0 and out.startswith(f"{tmp_path}/out: sqcompile, ") and out.count(": sqcompile") == 1, (
        err
    )
    alone = run("quantize", tmp_path / "float", *calib, "-o", tmp_path / "alone")
    assert alone.exit_code == 0 and same(tmp_path / "alone", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["alone", "float", "out", "texts.jsonl"]
