"""How much faster INT8 is than float on a machine, from measured tables: speedups/*.json, one per kind of GPU and CPU.

A table (written by ``python -m sqcompile.bench speedup``) has rows {"m", "n", "k", "bf16_us", "int8_us"} of
y [m, n] = q [m, k] · w [n, k]ᵀ with its epilogue, weights read from memory, on CPUs also "float32_us"; and of attention (written by ``python -m
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

from sqcompile.kernels.targets import Target
from sqcompile.pytorch.core import has_bf16

ROWS = (1, 512, 2048)  # what is reported: decoding one sequence, a short and a long prefill
# the same for attention: batch, queries, keys
CALLS = ((1, 2048, 2048), (1, 8192, 8192), (1, 1, 2048), (64, 1, 2048))


def expected(device: torch.device, rows: int, n: int, k: int, of: str = "bf16") -> float | None:
    """Float time over INT8 time of the nearest measured shape; None where none is within a factor of two.

    Zero on a device without INT8 kernels.

    Args:
        device: of the weight.
        rows: M, tokens of a call.
        n, k: of the weight [n, k], merged linears counted together.
        of: the float, as `against` gives it.
    """
    if device.type == "cpu" and not Target.of(device).has_kernels:
        return 0.0
    kind = kind_of(device)
    return None if kind is None else nearest(_table(kind, of), rows, n, k)


def against(device: torch.device, dtype: torch.dtype) -> str:
    """What INT8 is compared with: "bf16" on GPUs, on CPUs that or "float32", as the model is."""
    return "float32" if device.type == "cpu" and dtype in (torch.float32, torch.float64) else "bf16"


def kind_of(device: torch.device) -> str | None:
    """What a table is looked for by: a GPU's name; a CPU's target, and whether it multiplies bfloat16; None for another."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{Target.of(device).name}{'-bf16' if has_bf16() else ''}" if device.type == "cpu" else None


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
def _table(kind: str, against: str) -> dict[tuple[int, int, int], float]:
    return {(r["m"], r["n"], r["k"]): r[f"{against}_us"] / r["int8_us"] for r in _content(kind).get("rows", ())}


@functools.cache
def _content(kind: str) -> dict[str, Any]:
    """The table of a device: of the longest name that is a part of its own."""
    every = [json.loads(file.read_text()) for file in sorted((Path(__file__).parent / "speedups").glob("*.json"))]
    found: list[dict[str, Any]] = [content for content in every if content["name"] in kind]
    return max(found, key=lambda content: len(content["name"]), default={})
