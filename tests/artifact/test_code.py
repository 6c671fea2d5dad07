"""Code that is saved with a model: used where it fits, said where it does not, and never by itself."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from artifact_cases import batch, compiled, equal, load

import sqcompile
from sqcompile import ArtifactError, RecipeError
from sqcompile.artifact import code
from sqcompile.artifact.directory import read
from sqcompile.pytorch.inductor import cache_dir

FAKE = "import os; d = os.environ['TORCHINDUCTOR_CACHE_DIR']; os.mkdir(d + '/aa'); open(d + '/aa/x.so', 'w').write('1')"
LOAD = """
import sys, torch
sys.path[:0] = sys.argv[2:]
import sqcompile
from artifact_cases import batch
net = sqcompile.load(sys.argv[1] + "/net", code=CODE)
torch.save(net(batch())["logits"], sys.argv[1] + "/CODE.pt")
"""


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A model saved with something in the place of code, and a cache of its own to load that into."""
    monkeypatch.setattr(code, "_LOAD", FAKE)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    compiled().save(tmp_path / "net", code=True)
    return tmp_path / "net"


def taken(path):
    return code.taken(path, read(path, None).code)


@pytest.mark.slow
def test_a_fresh_process_compiles_nothing(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    compiler = tmp_path / "bin" / "g++"
    real = subprocess.run(["which", "g++"], capture_output=True, text=True, check=True).stdout.strip()
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *.cpp*) echo "$*" >> {tmp_path}/"${{LOG:-save}}";; esac\nexec {real} "$@"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")  # always: hashes are of the compiler, too
    compiled().save(tmp_path / "net", code=True)

    def run(kept: bool) -> tuple[torch.Tensor, int]:
        place = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / f"cache-{kept}"), "LOG": str(kept)}
        source = LOAD.replace("CODE", str(kept))
        paths = [str(Path(__file__).parent.parent), *sys.path]
        command = [sys.executable, "-c", source, str(tmp_path), *paths]
        subprocess.run(command, env={**os.environ, **place}, check=True, timeout=600)
        log = tmp_path / str(kept)
        return torch.load(tmp_path / f"{kept}.pt"), len(log.read_text().splitlines()) if log.exists() else 0

    kept, runs = run(True)
    anew, others = run(False)
    assert equal(kept, anew) and equal(kept, load(tmp_path / "net")(batch())["logits"])
    assert runs == 0 < others


def test_code_goes_into_the_cache_and_replaces_nothing(saved, tmp_path):
    assert taken(saved) is None
    assert (tmp_path / "cache" / "aa" / "x.so").read_text() == "1" and cache_dir() == str(tmp_path / "cache")
    (tmp_path / "cache" / "aa" / "x.so").write_text("2")
    assert taken(saved) is None
    assert (tmp_path / "cache" / "aa" / "x.so").read_text() == "2"


def test_without_being_asked_for_code_is_not_looked_at(saved, tmp_path):
    (saved / "code.zip").write_bytes(b"anything")
    assert equal(load(saved)(batch()), compiled()(batch()))
    assert not (tmp_path / "cache" / "aa" / "x.so").exists()  # a hash of Inductor's own may begin with aa


@pytest.mark.parametrize("what", ["torch", "processor", "GPU"])
def test_code_of_another_machine_is_not_used(what, saved, tmp_path, monkeypatch):
    here = code.machine()
    monkeypatch.setattr(code, "machine", lambda: {**here, what: "other"})
    assert taken(saved) == f"it was compiled with another {what}"
    assert not (tmp_path / "cache" / "aa" / "x.so").exists()


def test_damaged_code_is_refused(saved):
    data = (saved / "code.zip").read_bytes()
    for other, match in (
        (data[:-1], "damaged"),
        (bytes([data[0] ^ 1]) + data[1:], "damaged"),
        (None, "cannot be read"),
    ):
        (saved / "code.zip").unlink()
        if other is not None:
            (saved / "code.zip").write_bytes(other)
        with pytest.raises(ArtifactError, match=match):
            sqcompile.load(saved, code=True)
        (saved / "code.zip").write_bytes(data)
    (saved / "code.zip").rename(saved / "elsewhere")
    (saved / "code.zip").symlink_to(saved / "elsewhere")
    with pytest.raises(ArtifactError, match="is a link"):
        sqcompile.load(saved, code=True)


@pytest.mark.parametrize(
    "name", ["../x.so", "/tmp/x.so", "a/../../x.so", ".hidden", "a/.b", "a\\b", "a" * 300, "a//b", "ü"]
)
def test_names_outside_the_cache_are_refused(name, tmp_path):
    with zipfile.ZipFile(tmp_path / "z", "w") as z:
        z.writestr("aa/fine.so", "1")
        z.writestr(name, "1")
    with pytest.raises(ArtifactError, match=r"^code\.zip has files that save does not write"):
        code._files((tmp_path / "z").read_bytes())


@pytest.mark.parametrize("data", [b"", b"PK", b"PK\x03\x04" + b"\0" * 100])
def test_what_is_no_archive_is_refused(data):
    with pytest.raises(ArtifactError, match="no archive as save writes it"):
        code._files(data)


def test_what_cannot_be_asked_for_is_said(tmp_path, monkeypatch):
    compiled().save(tmp_path / "net")
    with pytest.raises(ArtifactError, match=r"saved without code: save it with code=True, or load it without"):
        sqcompile.load(tmp_path / "net", code=True)
    for options in ({"backend": "eager"}, {"regional": True}):
        with pytest.raises(RecipeError, match="leave out backend and regional, or code"):
            sqcompile.load(tmp_path / "net", code=True, **options)
    monkeypatch.setattr(code, "_LOAD", "raise SystemError('no compiler')")
    with pytest.raises(ArtifactError, match=r"SystemError: no compiler\): leave code out"):
        compiled().save(tmp_path / "net", code=True)
    assert [p.name for p in tmp_path.iterdir()] == ["net"] and not (tmp_path / "net" / "code.zip").exists()
