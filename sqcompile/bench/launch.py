"""What launching costs the host: microseconds of one call, beside the kernel's own time, and decode without CUDA graphs."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import sqcompile
from sqcompile.bench.stack import HIDDEN, stack
from sqcompile.bench.timing import gpu, interleaved, publish, sqnr_db
from sqcompile.kernels.ops import LAUNCHING
from sqcompile.kernels.targets import replay_launches

SHAPES = ((1, 4096, 4096), (1, 4096, 28672), (16, 4096, 4096), (512, 4096, 4096))  # rows, K, N


def host_us(call: Callable[[], Any], calls: int = 100, rounds: int = 7) -> float:
    """Microseconds that the host takes for a call; the GPU works behind it. The median of some rounds."""
    for _ in range(10):
        call()
    found = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - start) / calls * 1e6)
    torch.cuda.synchronize()
    return statistics.median(found)


def launch_table() -> Iterator[str]:
    """Lines of Markdown: what a call of `int8_gemm` costs, in Python and replayed."""
    python = next(f for schema, f in LAUNCHING.items() if schema.startswith("int8_gemm("))
    replayed = replay_launches()
    yield "| rows, K, N | bf16 linear, us | int8_gemm, us | launched by Python, us |"
    yield "|---|---|---|---|"
    for m, k, n in SHAPES:
        q, w = (torch.randint(-127, 128, (rows, k), dtype=torch.int8, device="cuda") for rows in (m, n))
        x_scale, w_scale = torch.rand(m, 1, device="cuda"), torch.rand(n, device="cuda")
        args = (q, x_scale, w, w_scale, None, torch.bfloat16, "none", None, None)
        x, w_float = q.bfloat16(), w.bfloat16()
        times = [
            host_us(lambda x=x, w=w_float: F.linear(x, w)),  # type: ignore[misc]
            host_us(lambda args=args: torch.ops.sqcompile.int8_gemm(*args)),  # type: ignore[misc]
            host_us(lambda args=args: python(*args)),  # type: ignore[misc]
        ]
        yield f"| {m}, {k}, {n} | " + " | ".join(f"{t:.1f}" for t in times) + " |"
    if not replayed:
        yield "Launches are not replayed here, so that Python launches both."


def decode_table(layers: int, batches: tuple[int, ...] = (1, 16), regional: bool = False) -> Iterator[str]:
    """Lines of Markdown: decode of a stack of layers without CUDA graphs, beside `torch.compile` in bf16."""
    model = stack(layers)
    inputs = [torch.randn(b, 1, HIDDEN, dtype=torch.bfloat16, device="cuda") for b in batches]
    with torch.no_grad():
        plain: Any = torch.compile(model, dynamic=False)
        calibration = [torch.randn(1, 256, HIDDEN, dtype=torch.bfloat16, device="cuda")]
        ours = sqcompile.compile(model, calibration, regional=regional, progress=False)
        yield f"| {layers} layers, batch x 1 | torch.compile bf16, us | sqcompile INT8, us | vs bf16 | SQNR |"
        yield "|---|---|---|---|---|"
        for x in inputs:
            ms = interleaved({"bf16": _waited(plain, x), "int8": _waited(ours, x)}, seconds=1.0, least=50)
            float_us, int8_us = 1e3 * ms["bf16"], 1e3 * ms["int8"]
            quality = sqnr_db(plain(x), ours(x))
            yield f"| {len(x)} | {float_us:.0f} | {int8_us:.0f} | {float_us / int8_us:.2f}x | {quality:.1f} dB |"


def _waited(run: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    """A call, and the GPU's work that it has begun."""

    def call() -> None:
        run(x)
        torch.cuda.synchronize()

    return call


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sqcompile.bench launch", description=__doc__)
    parser.add_argument("--layers", type=int, default=8, help="of the stack that decodes")
    parser.add_argument(
        "--regional", action="store_true", help="compile one layer for all, whose calls cost the host more"
    )
    parser.add_argument("--out", type=Path, help="write the tables there too")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    publish([f"{gpu()} Medians.\n", *launch_table(), "", *decode_table(args.layers, regional=args.regional)], args.out)
