"""Which kernel and tile sizes a GEMM runs with: a shipped table per GPU kind, else a rule. Never timed at run time.

A table (tuning/*.json, written by `tune.py`) has rows {"m", "n", "k", "us", "config"}: the fastest configuration for up
to m rows (a power of two) of a [n, k] weight. A shape that is not in the table takes the row of the nearest one within
a factor of two, as a tile that suits a matrix suits its neighbours; further away the rule of `default_config` decides.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

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


log = logging.getLogger("sqcompile")


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
def _shipped(gpu: Gpu) -> dict[str, Any]:
    """The table of a GPU: by name, else by capability; {} if there is none."""
    files = [json.loads(f.read_text()) for f in sorted((Path(__file__).parent / "tuning").glob("*.json"))]
    found = [f for f in files if f["name"] in gpu.name.split()] or [
        f for f in files if f["capability"] == gpu.capability
    ]
    return found[0] if found else {}


def specializes(gpu: Gpu) -> bool:
    """Whether warp specialization was seen to run here: it depends on Triton's version, and may hang with others."""
    return any(triton.__version__.startswith(f"{v}.") for v in _shipped(gpu).get("specialize", ()))


@functools.cache
def table(gpu: Gpu) -> dict[int, dict[tuple[int, int], Config]]:
    """The rows of the table for a GPU, {m: {(n, k): config}}, but for those that this version of Triton may not run."""
    rows: dict[int, dict[tuple[int, int], Config]] = {}
    for row in _shipped(gpu).get("rows", ()):
        c = Config(**row["config"])
        if not c.specialize or specializes(gpu):
            rows.setdefault(row["m"], {})[row["n"], row["k"]] = c
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
        log.debug("GEMM of up to %d rows, %d -> %d: tiles measured for %d -> %d", m, k, n, nearest[1], nearest[0])
        return rows[nearest]
    log.debug("GEMM of up to %d rows, %d -> %d: tiles by the rule for shapes without a table", m, k, n)
    return default_config(gpu, m, n, k, aligned)


def for_epilogue(c: Config, activation: str, residual: bool) -> Config:
    """A choice for a GEMM that does more than scale its result, which is how the choices were measured.

    The erf of gelu takes registers that the large tiles do not have, and warp specialization has fewer of them; a
    residual takes shared memory.
    """
    if c.kind != "persistent" or c.bm * c.bn < 128 * 128:
        return c
    if activation == "gelu" or (residual and not c.specialize and c.bm * c.bn > 128 * 128):
        return Config("persistent", 128, 128, 128, stages=3, warps=4, sub=4, ctas=2)
    return c


def default_config(gpu: Gpu, m: int, n: int, k: int, aligned: bool) -> Config:
    """The rule for shapes without a table.

    Few rows: the weight is streamed once, and what counts is enough programs with enough loads in flight. Many rows:
    the tile whose waves take least, a wave being one tile in each slot of the GPU.
    """
    if m <= GEMV_ROWS:
        bn, bk, stages = (4, 2048, 1) if m <= 2 else (8, 1024, 3)
        return Config("gemv", m, bn, min(bk, max(64, _floor_power(k))), stages=stages, warps=4)
    few_tiles = m <= 128 or -(-m // 128) * -(-n // 128) < gpu.sms
    if m <= 64:
        large_l1 = gpu.large or (gpu.capability == 80 and m <= 32)
        bk = 32 if not aligned else 256 if k >= 2048 and large_l1 else 128 if k > 64 else 64
        if gpu.capability == 90 and bk == 256 and -(-n // 64) < 0.7 * gpu.sms:
            return Config("tile", max(16, m), 32, bk, stages=7, warps=4)
        split = 1
        while -(-n // 64) * split < 0.7 * gpu.sms and split < 8 and k // (2 * split) >= 1024:
            split *= 2
        swap = aligned and gpu.capability == 90
        return Config("tile", max(16, m), 64, bk, stages=4 if aligned else 2, warps=4, split=split, swap=swap)
    if not aligned:
        return Config("tile", 64, 64, 32, 2, 4) if few_tiles else Config("tile", 128, 128, 32, 2, 8)
    if not gpu.large:
        return Config("tile", 64, 128, 64, 4, 4) if few_tiles else Config("tile", 128, 128, 64, 4, 8)

    def cost(wave: float, c: Config) -> float:
        return wave * -(-(-(-m // c.bm) * -(-n // c.bn)) // (c.ctas * gpu.sms))

    return min(_WAVES[specializes(gpu)], key=lambda wave: cost(*wave))[1]


# Microseconds of one wave at K = 4096 on an H100, and the tile; without and with warp specialization.
_WAVES: tuple[tuple[tuple[float, Config], ...], ...]
_WAVES = (
    (
        (12.2, Config("persistent", 64, 64, 128, stages=6, warps=4, ctas=2)),
        (16.6, Config("persistent", 64, 128, 128, stages=4, warps=4, ctas=2)),
        (26.0, Config("persistent", 128, 128, 128, stages=3, warps=4, sub=2, ctas=2)),
        (29.0, Config("persistent", 128, 256, 128, stages=3, warps=8, flatten=True)),
    ),
    (
        (12.2, Config("persistent", 64, 64, 128, stages=6, warps=4, ctas=2)),
        (15.2, Config("persistent", 128, 128, 128, stages=4, warps=4, specialize=True)),
        (16.6, Config("persistent", 64, 128, 128, stages=4, warps=4, ctas=2)),
        (25.0, Config("persistent", 128, 256, 128, stages=3, warps=4, specialize=True)),
        (26.0, Config("persistent", 128, 128, 128, stages=3, warps=4, sub=2, ctas=2)),
    ),
)


def _floor_power(x: int) -> int:
    return 1 << max(0, x.bit_length() - 1)
