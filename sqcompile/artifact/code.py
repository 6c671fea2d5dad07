"""code: what Inductor compiled for a saved model, beside its weights. It is code: loading it is trusting who saved it.

    code.zip    files of Inductor's own cache: C++ libraries, GPU kernels, compiled graphs (which it pickles)

A fresh process loads the model with an empty cache, and what it leaves there is kept. Loading puts the files back into the
cache of this machine; Inductor finds them by hashes of the graph, the sources and the flags, and compiles what is missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import platform
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from sqcompile.errors import ArtifactError
from sqcompile.files.regular import read_regular, replace_file, said
from sqcompile.files.safetensors_files import check_no_link

CODE = "code.zip"
_MOST_BYTES = 2**31 - 1
_NAME = re.compile(r"(?!.*(^|/)\.)[A-Za-z0-9_.-]{1,200}(/[A-Za-z0-9_.-]{1,200}){0,6}")
_LEFT_OUT = {"locks"}
_LOAD = """
import sys
from sqcompile.kernels.cpu import rows, x86
from sqcompile.loading import loaded

loaded(sys.argv[1], target=sys.argv[2] or None, constants=False)
rows.library()  # our own kernels, which a first call would build
if x86.available() or x86.has_avx2():
    x86.library()
"""


def write_code(folder: str, target: str | None) -> dict[str, Any]:
    """Compiles the model of a directory in a fresh process, and writes the code beside it.

    Args:
        folder: of a whole artifact but for this.
        target: what to lower for, as of `load`.

    Returns:
        What a manifest says of the code: "sha256" of the file, and "machine".

    Raises:
        ArtifactError: if the model cannot be loaded and compiled there.
        OSError: if the file cannot be written.
    """
    with tempfile.TemporaryDirectory() as cache:
        paths = os.pathsep.join(p for p in sys.path if p)
        switches = {"TORCHINDUCTOR_FX_GRAPH_CACHE": "1", "TORCHINDUCTOR_AUTOGRAD_CACHE": "1"}
        place = {
            "TORCHINDUCTOR_CACHE_DIR": cache,
            "TRITON_CACHE_DIR": os.path.join(cache, "triton"),
            "PYTHONPATH": paths,
        }
        command = [sys.executable, "-c", _LOAD, folder, target or ""]
        done = subprocess.run(
            command, env={**os.environ, **switches, **place}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no word"])[-1]
            raise ArtifactError(f"its code cannot be compiled in a process of its own ({last[:300]}): leave code out")
        data = _zipped(Path(cache))
    with open(os.path.join(folder, CODE), "wb") as f:
        f.write(data)
    return {"sha256": hashlib.sha256(data).hexdigest(), "machine": machine()}


def _zipped(cache: Path) -> bytes:
    found = io.BytesIO()
    with zipfile.ZipFile(found, "w", zipfile.ZIP_DEFLATED) as z:
        for file in sorted(cache.rglob("*")):
            name = file.relative_to(cache).as_posix()
            if (
                file.is_file()
                and not file.is_symlink()
                and name.split("/")[0] not in _LEFT_OUT
                and _NAME.fullmatch(name)
            ):
                z.writestr(zipfile.ZipInfo(name), file.read_bytes())  # without times: the same code, the same file
    return found.getvalue()


def taken(path: str | os.PathLike[str], entry: Any) -> str | None:
    """Puts the code of a directory into Inductor's cache.

    Args:
        path: of the directory.
        entry: what its manifest says of the code.

    Returns:
        Why the code cannot be used here, None if it can.

    Raises:
        ArtifactError: if the directory has no code, or it is damaged.
    """
    if entry is None:
        raise ArtifactError(f"{os.fsdecode(path)} was saved without code: save it with code=True, or load it without")
    name, here = os.fsdecode(path), machine()
    if not (isinstance(entry, dict) and entry.keys() == {"sha256", "machine"} and isinstance(entry["machine"], dict)):
        raise ArtifactError(f"what {name} says of its code is nothing that save writes: save the model again")
    if other := [k for k in here if entry["machine"].get(k) != here[k]]:
        return f"it was compiled with another {' and '.join(other)}"
    file = os.path.join(name, CODE)
    check_no_link(file, file)
    try:
        data = read_regular(file, _MOST_BYTES, "code")
    except OSError as e:
        raise ArtifactError(f"{file} cannot be read ({said(e)}): copy the directory again, whole") from e
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise ArtifactError(f"{file} is damaged: its SHA-256 is another than was saved. Copy the file again")
    from sqcompile.pytorch.inductor import cache_dir

    try:
        for name, content in _files(data):
            place = os.path.join(cache_dir(), *name.split("/"))
            if not os.path.lexists(place):  # what is there was compiled here from the same source
                os.makedirs(os.path.dirname(place), exist_ok=True)
                replace_file(place, content)
    except OSError as e:
        return f"it cannot be put into Inductor's cache ({said(e)})"
    return None


def _files(data: bytes) -> list[tuple[str, bytes]]:
    """The files of an archive: plain names below the cache, and no more bytes than they may have."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as z:
            infos = z.infolist()
            if sum(i.file_size for i in infos) > _MOST_BYTES or not all(_NAME.fullmatch(i.filename) for i in infos):
                raise ArtifactError(f"{CODE} has files that save does not write: save the model again")
            return [(info.filename, z.read(info)) for info in infos]
    except ArtifactError:
        raise
    except Exception as e:  # of the archive's format
        raise ArtifactError(f"{CODE} is no archive as save writes it ({said(e)}): save the model again") from e


def machine() -> dict[str, str]:
    """What compiled code depends on: versions, the processor's instructions and the GPU."""
    triton = ""
    with contextlib.suppress(ImportError):
        import triton as installed

        triton = installed.__version__
    gpu = ""
    if torch.cuda.is_available():
        gpu = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return {
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _instructions(),
        "GPU": gpu,
    }


def _instructions() -> str:
    """A digest of the processor's flags: libraries are compiled for exactly this one."""
    text = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        text = next(
            (" ".join(sorted(l.split(":")[1].split())) for l in lines if l.startswith(("flags", "Features"))), text
        )
    return hashlib.sha256(text.encode()).hexdigest()[:16]
