"""Which kernel and tile sizes a GEMM runs with: a shipped table per GPU kind, else a rule. Never timed at run time.

A table (tuning/*.json, written by `tune.py`) has rows {"m", "n", "k", "us", "config"}: the fastest configuration for up
to m rows (a power of two) of a [n, k] weight. A shape that is not in the table takes the row of the nearest one within
a factor of two, as a tile that suits a matrix suits its neighbours; further away the rule of `default_config` decides.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

LARGEST_BUCKET = 8192
GEMV_ROWS = 4


@dataclass(frozen=True)
class Config:
    """One way to run a GEMM. Sizes are elements; m, n and k are those of y [m, n] = q [m, k] · w [n, k]ᵀ.

    kind: "persistent": TMA descriptors, programs that loop over tiles (sm_90 and later, aligned rows);
        "tile": a program per tile and K split, any shape; "gemv": no tensor cores, at most 4 rows.
    tma: "tile" only: load through descriptors.
    swap: "tile" only: compute yᵀ, so that the weight's rows fill the 64 rows of a wgmma and few tokens its columns.
    split: "tile" and "gemv": parts of K, summed in int32 by a second kernel.
    sub: "persistent": the tile is stored in this many column parts, so that staging it takes less shared memory.
    flatten, specialize: "persistent": one pipelined loop over all tiles; separate warps for loads.
    ctas: "persistent": programs per multiprocessor.
    group: tiles in m that run side by side and share weight tiles in L2.
    """

    kind: str
    bm: int
    bn: int
    bk: int
    stages: int = 3
    warps: int = 4
    group: int = 8
    split: int = 1
    sub: int = 1
    ctas: int = 1
    tma: bool = False
    swap: bool = False
    flatten: bool = False
    specialize: bool = False

    @property
    def needs_tma(self) -> bool:
        return self.kind == "persistent" or self.tma

    def to_json(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        values = dataclasses.asdict(self)
        return {
            f.name: values[f.name]
            for f in dataclasses.fields(self)
            if f.default is dataclasses.MISSING or values[f.name] != f.default
        }


@dataclass(frozen=True)
class Gpu:
    """What a choice of tiles depends on: the device's name, its compute capability and its multiprocessors."""

    name: str
    capability: int
    sms: int

    @property
    def large(self) -> bool:
        """TMA and 227 KiB of shared memory a program: Hopper and Blackwell of data centers, not of desktops (sm_120)."""
        return self.capability in (90, 100, 103)


CPU_STANDS_FOR = Gpu(
    "CPU", 90, 132
)  # what tensors on the CPU are planned for: the interpreter, compiling without a GPU


@functools.cache
def _cuda_gpu(index: int) -> Gpu:
    p = torch.cuda.get_device_properties(index)
    return Gpu(p.name, p.major * 10 + p.minor, p.multi_processor_count)


def gpu_of(device: torch.device) -> Gpu:
    return _cuda_gpu(device.index) if device.type == "cuda" else CPU_STANDS_FOR


def bucket(m: int) -> int:
    """The next power of two, at most 8192."""
    return min(LARGEST_BUCKET, 1 << max(0, m - 1).bit_length())


@functools.cache
def table(gpu: Gpu) -> dict[int, dict[tuple[int, int], Config]]:
    """The rows of the table for a GPU, {m: {(n, k): config}}: by name, else by capability; empty if there is none."""
    files = [json.loads(f.read_text()) for f in sorted((Path(__file__).parent / "tuning").glob("*.json"))]
    found = [f for f in files if f["name"] in gpu.name] or [f for f in files if f["capability"] == gpu.capability]
    rows: dict[int, dict[tuple[int, int], Config]] = {}
    for row in found[0]["rows"] if found else ():
        rows.setdefault(row["m"], {})[row["n"], row["k"]] = Config(**row["config"])
    return rows


@functools.cache
def tiles(gpu: Gpu, m: int, n: int, k: int, aligned: bool = True) -> Config:
    """The configuration for up to m rows (a bucket) of a [n, k] weight; cached, as decoding asks at every launch.

    Args:
        aligned: rows and base addresses of both operands and of the result are multiples of 16 bytes. If not, bytes
            are loaded one at a time, and nothing measured with aligned rows applies.
    """

    def distance(shape: tuple[int, int]) -> float:
        return abs(math.log2(shape[0] / n)) + abs(math.log2(shape[1] / k))

    rows = table(gpu).get(m, {}) if aligned else {}
    nearest = min(rows, key=distance, default=None)
    if nearest is not None and distance(nearest) <= 1 and (gpu.large or not rows[nearest].needs_tma):
        return rows[nearest]
    return default_config(gpu, m, n, k, aligned)


def default_config(gpu: Gpu, m: int, n: int, k: int, aligned: bool) -> Config:
    """The rule for shapes without a table.

    Few rows: the weight is streamed once, and what counts is enough programs with enough loads in flight. Many rows:
    the tile that wastes the least of the last wave, larger tiles being faster per element.
    """
    if m <= GEMV_ROWS:
        bk = min(2048, max(64, _floor_power(k)))
        return Config("gemv", m, 8 if m < 4 else 4, bk, stages=3, warps=4)
    few_tiles = m <= 128 or -(-m // 128) * -(-n // 128) < gpu.sms
    if m <= 64:
        large_l1 = gpu.large or gpu.capability == 80
        bk = 32 if not aligned else 256 if k >= 2048 and m <= 32 and large_l1 else 128 if k > 64 else 64
        split = 1
        while -(-n // 64) * split < gpu.sms and split < 8 and k // (2 * split) >= 1024:
            split *= 2
        return Config("tile", max(16, m), 64, bk, stages=4 if aligned else 2, warps=4, split=split)
    if not aligned:
        return Config("tile", 64, 64, 32, 2, 4) if few_tiles else Config("tile", 128, 128, 32, 2, 8)
    if not gpu.large:
        return Config("tile", 64, 128, 64, 4, 4) if few_tiles else Config("tile", 128, 128, 64, 4, 8)
    # a wave of 128x256 tiles runs at about 1.0 of the tensor cores' pace, of 128x128 at 0.85, of 64x128 at 0.6
    candidates = [
        (128 * 256, 1.0, Config("persistent", 128, 256, 128, stages=4, warps=8, sub=2)),
        (128 * 128, 0.85, Config("persistent", 128, 128, 128, stages=4, warps=8)),
        (64 * 128, 0.6, Config("persistent", 64, 128, 128, stages=5, warps=4)),
    ]

    def cost(c: tuple[int, float, Config]) -> float:
        waves = -(-(-(-m // c[2].bm) * -(-n // c[2].bn)) // gpu.sms)
        return waves * c[0] / c[1]

    return min(candidates, key=cost)[2]


def _floor_power(x: int) -> int:
    return 1 << max(0, x.bit_length() - 1)
