"""Timing that survives a noisy machine: contenders take turns, and each is judged by its median."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqcompile.kernels.cpu import x86
from sqcompile.pytorch.core import has_amx, has_vnni


def interleaved(contenders: Mapping[str, Callable[[], Any]], seconds: float = 6.0, least: int = 7) -> dict[str, float]:
    """Median milliseconds of each contender; they run in turns until the time is over, at least ``least`` rounds."""
    for run in contenders.values():  # compile and warm up
        run(), run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < least:
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(t) for name, t in times.items()}


def sqnr_db(reference: Tensor, y: Tensor) -> float:
    """Signal to noise ratio of y against a reference of the same shape, in dB."""
    noise = float((y.double() - reference.double()).square().sum())
    return 10 * math.log10(float(reference.double().square().sum()) / noise) if noise > 0 else math.inf


def machine() -> str:
    """The processor, its INT8 instructions and kernels, threads and versions: what a table must say of itself."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as f:
            name = next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    isa = "AMX" if has_amx() else "AVX512-VNNI" if has_vnni() else "no VNNI"
    of = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{name}, {isa}, INT8 linears by {kernels()}, {torch.get_num_threads()} threads, {of}"


def kernels() -> str:
    """What multiplies INT8 linears on this processor."""
    if not x86.available():
        return "our AVX2 kernel" if x86.has_avx2_kernels() else "the reference in plain PyTorch"
    if x86.library() is None:
        return "oneDNN"
    return "our AMX kernel" if x86.amx() else "our VNNI kernel"


def versions(packages: Iterable[str]) -> str:
    """Of packages that a table is about: "onnx 1.23.2, no openvino"."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)


def gpu() -> str:
    """The GPU and versions, and the day."""
    import triton

    p = torch.cuda.get_device_properties(0)
    of = f"torch {torch.__version__}, triton {triton.__version__}"
    return f"{p.name}, {p.multi_processor_count} multiprocessors, {of}, {datetime.date.today()}."


def publish(lines: Iterable[str], out: Path | None) -> None:
    """Prints a benchmark's lines, and writes them to a file if there is one."""
    text = "\n".join(lines) + "\n"
    print(text, flush=True)
    if out:
        out.write_text(text)
