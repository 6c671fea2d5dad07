"""Saving: the new directory or the old one, whatever happens meanwhile; and nothing else is touched."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from artifact_cases import batch, compiled, equal, load

import sqcompile
from sqcompile import ArtifactError, Recipe
from sqcompile.artifact import directory, manifest
from sqcompile.files import directory as folders

OTHER = Recipe(alpha=0.9)


def names(path):
    return sorted(p.name for p in path.iterdir())


@pytest.mark.parametrize(
    ("where", "what", "error"),
    [
        (folders.os, "fsync", OSError(errno.ENOSPC, "No space left on device")),
        (folders.os, "mkdir", PermissionError(errno.EACCES, "Permission denied")),
        (folders, "_put", OSError(errno.EROFS, "Read-only file system")),
        (directory, "write_tensors", OSError(errno.ENOSPC, "No space left on device")),
        (manifest.json, "dumps", MemoryError()),
        (folders.os, "fsync", KeyboardInterrupt()),
    ],
)
def test_a_save_that_fails_leaves_the_old_directory(where, what, error, tmp_path, monkeypatch):
    compiled().save(tmp_path / "net")

    def fail(*args):
        raise error

    other = compiled(OTHER)
    quantized = other.stages["quantized"]
    with monkeypatch.context() as patch:
        patch.setattr(where, what, fail)
        with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ArtifactError) as found:
            directory.save(quantized, other.plan, other.call, tmp_path / "net")
    assert getattr(error, "strerror", None) is None or error.strerror in str(found.value)
    assert names(tmp_path) == ["net"] and equal(load(tmp_path / "net")(batch()), compiled()(batch()))


@pytest.mark.parametrize("exchange", [True, False])
def test_an_old_directory_is_replaced(exchange, tmp_path, monkeypatch):
    compiled().save(tmp_path / "net", shard_bytes=3000)
    if not exchange:  # file systems that cannot
        monkeypatch.setattr(folders, "_exchanged", lambda a, b: False)
    compiled(OTHER).save(tmp_path / "net")
    assert names(tmp_path) == ["net"] and len(names(tmp_path / "net")) == 3
    assert equal(load(tmp_path / "net")(batch()), compiled(OTHER)(batch()))


def test_what_save_has_not_written_is_not_replaced(tmp_path):
    (tmp_path / "empty").mkdir()
    compiled().save(tmp_path / "empty")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("words")
    (tmp_path / "file").write_text("words")
    for path in (
        tmp_path / "thesis",
        tmp_path / "file",
        tmp_path / "none" / "net",
        "",
        "a\0b",
        tmp_path / ("x" * 300),
        3,
        None,
    ):
        with pytest.raises(ArtifactError):
            compiled().save(path)
    assert names(tmp_path) == ["empty", "file", "thesis"]
    assert (tmp_path / "thesis" / "chapter").read_text() == (tmp_path / "file").read_text() == "words"


def test_a_link_is_followed_and_permissions_are_the_users(tmp_path):
    before = os.umask(0o027)
    try:
        compiled().save(tmp_path / "net")
    finally:
        os.umask(before)
    assert (tmp_path / "net").stat().st_mode & 0o777 == 0o750
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "net").iterdir()} == {0o640}
    os.symlink(tmp_path / "net", tmp_path / "latest")
    compiled(OTHER).save(tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink() and names(tmp_path) == ["latest", "net"]
    assert equal(load(tmp_path / "net")(batch()), compiled(OTHER)(batch()))


def test_directories_saved_at_once_are_whole(tmp_path):
    nets = [compiled(), compiled(OTHER)]
    stages = [net.stages["quantized"] for net in nets]
    failed = []

    def work(net, quantized):
        try:
            for _ in range(8):
                directory.save(quantized, net.plan, net.call, tmp_path / "net")
        except Exception as e:
            failed.append(e)

    threads = [threading.Thread(target=work, args=x) for x in zip(nets, stages, strict=True)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failed and names(tmp_path) == ["net"]
    y = load(tmp_path / "net")(batch())
    assert any(equal(y, net(batch())) for net in nets)


SAVES = """
import sys, resource
sys.path[:0] = sys.argv[2:]
import torch
from artifact_cases import RECIPE, compiled
from sqcompile import Recipe
from sqcompile.artifact import directory
nets = [compiled(), compiled(Recipe(alpha=0.9))]
stages = [net.stages["quantized"] for net in nets]
"""
FOR_EVER = """
print("ready", flush=True)
while True:
    for net, stage in zip(nets, stages):
        directory.save(stage, net.plan, net.call, sys.argv[1] + "/net")
"""
FULL = """
from sqcompile import ArtifactError
directory.save(stages[0], nets[0].plan, nets[0].call, sys.argv[1] + "/net")
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    directory.save(stages[1], nets[1].plan, nets[1].call, sys.argv[1] + "/net")
except ArtifactError as e:
    print(e)
"""


def run(source, path):
    paths = [str(Path(__file__).parent.parent), *sys.path]
    return subprocess.Popen(
        [sys.executable, "-c", source, str(path), *paths], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_file_that_may_not_grow_leaves_the_old_directory(tmp_path):
    """As on a full disk: the system itself stops the writing."""
    out, error = run(SAVES + FULL, tmp_path).communicate(timeout=300)
    assert "cannot be saved" in out, error[-2000:]
    assert names(tmp_path) == ["net"] and equal(load(tmp_path / "net")(batch()), compiled()(batch()))


@pytest.mark.slow
def test_killed_at_any_moment_it_is_the_old_or_the_new_one(tmp_path):
    wants = [net(batch()) for net in (compiled(), compiled(OTHER))]
    seen = set()
    r = random.Random(0)
    for _ in range(6):
        process = run(SAVES + FOR_EVER, tmp_path)
        assert process.stdout.readline() == "ready\n", process.stderr.read()[-2000:]
        time.sleep(0.05 + r.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
        y = sqcompile.load(tmp_path / "net", backend="eager")(batch())
        seen |= {i for i, want in enumerate(wants) if equal(y, want)}
        assert any(equal(y, want) for want in wants)
    assert seen <= {0, 1} and torch.is_tensor(y["logits"])
    left = [n for n in names(tmp_path) if n != "net"]
    assert all(n.startswith(".net-") and n.endswith(".tmp") for n in left)  # of what was killed, and no more


MEMORY = """
import sys, resource, torch
sys.path[:0] = sys.argv[2:]
import sqcompile
from torch import nn
class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(2000, 3072)
        self.layers = nn.ModuleList(nn.Linear(3072, 3072) for _ in range(48))
    def forward(self, ids):
        x = self.table(ids)
        for layer in self.layers:
            x = x + layer(x)
        return x
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
"""
SAVE_WIDE = """
model = Wide().eval().bfloat16()
net = sqcompile.compile(model, [torch.arange(32)[None]], recipe=sqcompile.Recipe(alpha=0.5), progress=False, backend="eager")
net.save(sys.argv[1] + "/net")
"""
LOAD_WIDE = """
small = sqcompile.load(sys.argv[1] + "/small", backend="eager")  # what is loaded and built for the first model of all
start = int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) * 1024
net = sqcompile.load(sys.argv[1] + "/net", backend="eager")
print(peak() - start)
"""


@pytest.mark.slow
def test_loading_takes_the_memory_of_the_artifact(tmp_path):
    compiled().save(tmp_path / "small")
    _, error = run(MEMORY + SAVE_WIDE, tmp_path).communicate(timeout=600)
    size = sum(p.stat().st_size for p in (tmp_path / "net").iterdir())
    assert size > 400e6, error[-2000:]
    out, error = run(MEMORY + LOAD_WIDE, tmp_path).communicate(timeout=600)
    print(f"artifact {size / 1e6:.0f} MB, loading it {int(out) / 1e6:.0f} MB")
    assert int(out) <= 1.1 * size, error[-2000:]
