"""Measures how much faster INT8 GEMMs are than bf16 on this GPU, the table behind reports and `Recipe.min_speedup`."""

from __future__ import annotations

import argparse
import datetime
import functools
import gc
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

ROWS = (1, 16, 64, 512, 2048, 8192)
SIZES = (1024, 2048, 4096)
LLAMA_3_8B = ((6144, 4096), (28672, 4096), (4096, 14336))


def write_table(path: Path, table: Mapping[str, Any]) -> None:
    """A file of kernels/speedups, one measured row a line."""

    def text(x: Any) -> str:
        return "[\n  " + ",\n  ".join(map(json.dumps, x)) + "\n ]" if isinstance(x, list) else json.dumps(x)

    path.write_text("{\n" + ",\n".join(f" {json.dumps(k)}: {text(v)}" for k, v in table.items()) + "\n}\n")


def main(argv: list[str] | None = None) -> None:
    import triton

    from sqcompile.kernels.triton.gemm import timing
    from sqcompile.kernels.triton.gemm.int8_gemm import int8_gemm

    parser = argparse.ArgumentParser(prog="python -m sqcompile.bench speedup", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a file for kernels/speedups/")
    parser.add_argument("--name", help="what to look for in the device's name; by default all of it")
    args = parser.parse_args(argv)
    gc.freeze()
    rows = []
    for (n, k), m in itertools.product((*LLAMA_3_8B, *itertools.product(SIZES, SIZES)), ROWS):
        number = timing.copies(n * k) if m <= 512 else 1
        w = [torch.randint(-127, 128, (n, k), device="cuda", dtype=torch.int8) for _ in range(number)]
        q = torch.randint(-127, 128, (m, k), device="cuda", dtype=torch.int8)
        x_scale, w_scale = torch.rand(m, 1, device="cuda"), torch.rand(n, device="cuda")
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        float_w = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(max(1, number // 2))]
        int8 = timing.median_us([functools.partial(int8_gemm, q, v, x_scale, w_scale) for v in w], 3.0)
        bf16 = timing.median_us([functools.partial(F.linear, x, v) for v in float_w], 3.0)
        rows.append({"m": m, "n": n, "k": k, "bf16_us": round(bf16, 2), "int8_us": round(int8, 2)})
        print(f"{m:5} x {k:5} -> {n:5}: {bf16 / int8:.2f}", flush=True)
        name = torch.cuda.get_device_name()
        measured = f"{name}, torch {torch.__version__}, triton {triton.__version__}, {datetime.date.today()}"
        write_table(args.out, {"name": args.name or name, "measured": measured, "rows": rows})


if __name__ == "__main__":
    main()
