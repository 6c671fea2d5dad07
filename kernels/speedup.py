"""How much faster an INT8 GEMM is than bfloat16 on a GPU, from measured tables: speedups/*.json, one per GPU kind.

A table (written by ``python -m sqcompile.bench speedup``) has rows {"m", "n", "k", "bf16_us", "int8_us"} of
y [m, n] = q [m, k] · w [n, k]ᵀ with its epilogue, weights read from memory. Nothing is timed at a user's run time.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import torch

ROWS = (1, 512, 2048)  # what is reported: decoding one sequence, a short and a long prefill


def expected(device: torch.device, rows: int, n: int, k: int) -> float | None:
    """bf16 time over INT8 time of the nearest measured shape; None where none is within a factor of two.

    Args:
        device: of the weight.
        rows: M, tokens of a call.
        n, k: of the weight [n, k], merged linears counted together.
    """
    if device.type != "cuda":
        return None
    return nearest(_table(torch.cuda.get_device_name(device)), rows, n, k)


def nearest(table: dict[tuple[int, int, int], float], rows: int, n: int, k: int) -> float | None:
    """The entry of {(m, n, k): speedup} with the smallest distance in octaves, at most one in each size."""

    def octaves(shape: tuple[int, int, int]) -> tuple[float, ...]:
        return tuple(abs(math.log2(a / b)) for a, b in zip(shape, (rows, n, k), strict=True))

    found = [shape for shape in table if max(octaves(shape)) <= 1]
    return table[min(found, key=lambda shape: sum(octaves(shape)))] if found else None


@functools.cache
def _table(gpu: str) -> dict[tuple[int, int, int], float]:
    for file in sorted((Path(__file__).parent / "speedups").glob("*.json")):
        content = json.loads(file.read_text())
        if content["name"] in gpu:
            return {(r["m"], r["n"], r["k"]): r["bf16_us"] / r["int8_us"] for r in content["rows"]}
    return {}
