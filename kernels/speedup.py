"""How much faster INT8 is than bfloat16 on a GPU, from measured tables: speedups/*.json, one per GPU kind.

A table (written by ``python -m sqcompile.bench speedup``) has rows {"m", "n", "k", "bf16_us", "int8_us"} of
y [m, n] = q [m, k] · w [n, k]ᵀ with its epilogue, weights read from memory; and of attention (written by ``python -m
sqcompile.bench attention``) {"b", "h", "g", "sq", "sk", "d", "sdpa_us", "qk_us", "qk_pv_us"}: scales per token; causal and
with the quantization of q and k where sq > 1, else with keys and values in an INT8 cache. Nothing is timed at a user's
run time.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import torch

ROWS = (1, 512, 2048)  # what is reported: decoding one sequence, a short and a long prefill
# the same for attention: batch, queries, keys
CALLS = ((1, 2048, 2048), (1, 8192, 8192), (1, 1, 2048), (64, 1, 2048))


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


def expected_attention(device: torch.device, products: str, width: int) -> dict[tuple[int, int, int], float]:
    """scaled_dot_product_attention's time in bf16 over INT8 attention's, by call of `CALLS`; without those not measured.

    Args:
        device: of the model.
        products: "qk" or "qk_pv".
        width: D, channels of a head; the nearest measured one, at most a factor of two away, stands for it.
    """
    if device.type != "cuda":
        return {}
    gains = {}
    for call in CALLS:
        rows = [r for r in _content(torch.cuda.get_device_name(device)).get("attention", ())
                if (r["b"], r["sq"], r["sk"]) == call and abs(math.log2(r["d"] / width)) <= 1]  # fmt: skip
        if rows:
            nearest_row = min(rows, key=lambda r: (abs(math.log2(r["d"] / width)), -r["h"] / r["g"]))
            gains[call] = nearest_row["sdpa_us"] / nearest_row[f"{products}_us"]
    return gains


@functools.cache
def _table(gpu: str) -> dict[tuple[int, int, int], float]:
    return {(r["m"], r["n"], r["k"]): r["bf16_us"] / r["int8_us"] for r in _content(gpu).get("rows", ())}


@functools.cache
def _content(gpu: str) -> dict[str, Any]:
    for file in sorted((Path(__file__).parent / "speedups").glob("*.json")):
        content: dict[str, Any] = json.loads(file.read_text())
        if content["name"] in gpu:
            return content
    return {}
