"""Measures how much faster INT8 GEMMs are than float on this machine, the table behind reports and `Recipe.min_speedup`."""

from __future__ import annotations

import argparse
import datetime
import functools
import gc
import itertools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sqcompile.bench.timing import interleaved, machine
from sqcompile.kernels.ops import sqcompile_ops
from sqcompile.kernels.speedup import kind_of
from sqcompile.kernels.targets import Operands, Target

ROWS = (1, 16, 64, 512, 2048, 8192)
SIZES = (1024, 2048, 4096)
LLAMA_3_8B = ((6144, 4096), (28672, 4096), (4096, 14336))
CPU_ROWS = (1, 4, 16, 64, 128, 512, 2048)
CPU_SHAPES = (  # of linears: encoders of 384 and 768 channels, decoders of 2048 and 4096
    (384, 384), (1536, 384), (384, 1536), (768, 768), (2304, 768), (3072, 768), (768, 3072), (2048, 2048), (3072, 2048),
    (16384, 2048), (2048, 8192), (4096, 4096), (28672, 4096), (4096, 14336),
    (4096, 13824), (4096, 16384),  # bf16 at one row of 14336 takes thrice what it takes here, with AMX
)  # fmt: skip
_CACHE = 2**26  # bytes: weights take turns, so that each comes from memory, as in a model of many layers
_MOST = 2e11  # multiplications of a call: larger products gain what those do


def write_table(path: Path, table: Mapping[str, Any]) -> None:
    """A file of kernels/speedups, one measured row a line."""

    def text(x: Any) -> str:
        return "[\n  " + ",\n  ".join(map(json.dumps, x)) + "\n ]" if isinstance(x, list) else json.dumps(x)

    path.write_text("{\n" + ",\n".join(f" {json.dumps(k)}: {text(v)}" for k, v in table.items()) + "\n}\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sqcompile.bench speedup", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a file for kernels/speedups/")
    parser.add_argument("--name", help="what to look for in the device's name; by default all of it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seconds", type=float, default=0.4, help="for each shape on a CPU")
    args = parser.parse_args(argv)
    gc.freeze()
    name = kind_of(torch.device(args.device))
    about = machine() if args.device == "cpu" else f"{name}, torch {torch.__version__}, triton {_triton()}"
    rows: list[dict[str, Any]] = []
    shapes = CPU_SHAPES if args.device == "cpu" else (*LLAMA_3_8B, *itertools.product(SIZES, SIZES))
    for (n, k), m in itertools.product(shapes, CPU_ROWS if args.device == "cpu" else ROWS):
        if args.device == "cpu" and m * n * k > _MOST:
            continue
        found = _on_cpu(m, n, k, args.seconds) if args.device == "cpu" else _on_gpu(m, n, k)
        rows.append({"m": m, "n": n, "k": k, **{f"{kind}_us": round(us, 2) for kind, us in found.items()}})
        gains = ", ".join(f"{us / found['int8']:.2f} of {kind}" for kind, us in found.items() if kind != "int8")
        print(f"{m:5} x {k:5} -> {n:5}: {gains}", flush=True)
        write_table(
            args.out, {"name": args.name or name, "measured": f"{about}, {datetime.date.today()}", "rows": rows}
        )


def _triton() -> str:
    import triton

    return str(triton.__version__)


def _on_gpu(m: int, n: int, k: int) -> dict[str, float]:
    from sqcompile.kernels.triton.gemm import timing
    from sqcompile.kernels.triton.gemm.int8_gemm import int8_gemm

    number = timing.copies(n * k) if m <= 512 else 1
    w = [torch.randint(-127, 128, (n, k), device="cuda", dtype=torch.int8) for _ in range(number)]
    q = torch.randint(-127, 128, (m, k), device="cuda", dtype=torch.int8)
    x_scale, w_scale = torch.rand(m, 1, device="cuda"), torch.rand(n, device="cuda")
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    float_w = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(max(1, number // 2))]
    int8 = timing.median_us([functools.partial(int8_gemm, q, v, x_scale, w_scale) for v in w], 3.0)
    bf16 = timing.median_us([functools.partial(F.linear, x, v) for v in float_w], 3.0)
    return {"bf16": bf16, "int8": int8}


def _on_cpu(m: int, n: int, k: int, seconds: float) -> dict[str, float]:
    """Microseconds of a product by what this machine's target lowers linears to, and of PyTorch's in bfloat16 and float32."""
    target = Target.of(torch.device("cpu"))
    number = math.ceil(_CACHE / (n * k)) if m <= 128 else 1
    q = torch.randint(1, 256, (m, k), dtype=torch.uint8) if target.zero_point else torch.ones((m, k), dtype=torch.int8)
    scale, one = torch.rand(m, 1), torch.rand(n)
    calls = []
    for _ in range(number):
        w = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        packed, beside = target.pack(w) if target.pack else (w, None)
        calls.append(target.linear(Operands(q, scale, packed, one, beside, None, torch.bfloat16)))
    int8 = itertools.cycle(calls)

    def run_int8() -> Tensor:
        operator, arguments = next(int8)
        if (
            operator is sqcompile_ops.int8_linear_packed.default
        ):  # most are followed by an operator of rows, which applies the scale
            return sqcompile_ops.matmul_u8s8.default(q, *arguments[2:5], torch.bfloat16)
        return operator(*arguments)

    contenders: dict[str, Callable[[], Tensor]] = {"int8": run_int8}
    for kind, dtype in (("bf16", torch.bfloat16), ("float32", torch.float32)):
        contenders[kind] = _float(m, n, k, dtype, max(1, number // dtype.itemsize))
    return {kind: 1e3 * ms for kind, ms in interleaved(contenders, seconds, 3).items()}


def _float(m: int, n: int, k: int, dtype: torch.dtype, number: int) -> Callable[[], Tensor]:
    x = torch.randn(m, k).to(dtype)
    weights = itertools.cycle([torch.randn(n, k).to(dtype) for _ in range(number)])
    return lambda: F.linear(x, next(weights))


if __name__ == "__main__":
    main()
