"""Makes a table of tile sizes for the GPU at hand: ``python -m sqcompile.kernels.triton.gemm.tune --out FILE``.

Candidates are compiled first, in parallel and without the GPU (dry.py fills Triton's cache on disk); each one's result is
compared with the reference before it is timed; the file is written after every shape. Put it into tuning/ to ship it.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import gc
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton

from sqcompile.kernels import reference
from sqcompile.kernels.triton.gemm import timing
from sqcompile.kernels.triton.gemm.int8_gemm import int8_gemm
from sqcompile.kernels.triton.gemm.tiles import GEMV_ROWS, Config, Gpu, bucket, default_config, gpu_of

LLAMA_3_8B = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))  # (N, K): qkv, o, gate and up, down
BUCKETS = tuple(2**i for i in range(14))
_REGISTERS = 128  # of int32 sums and loaded weights a thread; more would spill
_SHARED = {80: 163, 90: 227, 100: 227, 103: 227}  # KiB a program may use, by capability; 99 elsewhere


def candidates(gpu: Gpu, m: int, n: int, k: int, quick: bool, specialize: bool) -> list[Config]:
    """What is worth timing for m rows: about 10 (quick) to 40 configurations that fit registers and shared memory."""
    every = [default_config(gpu, m, n, k, aligned=True)]
    if m <= GEMV_ROWS:
        every += _gemvs(m, quick)
    if m <= 256:
        every += _streams(gpu, m, n, quick)
    if m > 32 and gpu.large:
        every += _persistents(gpu, m, quick)
        every += [c for c in SPECIALIZED if specialize and m > c.bm // 2]
    if m > 64 and not gpu.large:
        for bm, bn, bk, warps in (
            (128, 128, 64, 8),
            (128, 128, 128, 8),
            (128, 256, 64, 8),
            (64, 128, 64, 4),
            (64, 256, 64, 8),
        ):
            every += [Config("tile", bm, bn, bk, stages=s, warps=warps) for s in (3, 4)]
    limit = _SHARED.get(gpu.capability, 99) * 1024
    return [c for c in dict.fromkeys(every) if _shared_bytes(c) <= limit and k >= c.split * c.bk]


def _gemvs(m: int, quick: bool) -> Iterator[Config]:
    for bn, bk, warps in itertools.product((2, 4, 8, 16), (1024, 2048), (4,) if quick else (4, 8)):
        words = bn * bk // 4 // (32 * warps)  # int32 a thread holds of the weights, and of each row's sums
        if words >= 8 and words * (m + 1) <= _REGISTERS:
            for stages, split in ((1, 1), (3, 1)) if quick or bn > 8 else ((1, 1), (3, 1), (3, 2)):
                yield Config("gemv", m, bn, bk, stages=stages, warps=warps, split=split)


def _streams(gpu: Gpu, m: int, n: int, quick: bool) -> Iterator[Config]:
    bm = max(16, min(m, 128))
    for bn, bk, split in itertools.product((32, 64, 128), (128, 256), (1, 2, 4, 8)):
        programs = -(-n // bn) * -(-m // bm) * split
        fits = 0.7 * gpu.sms <= programs and (split == 1 or programs <= 3 * gpu.sms)
        if not fits or (bk == 256) == (bn == 128) or (m <= GEMV_ROWS and bn == 128):
            continue
        stages = 6 if bk == 128 and bm + bn <= 256 else 4
        if bn < 128 or bm > 32:
            yield Config("tile", bm, bn, bk, stages=stages, warps=4, split=split)
        if gpu.large and bn == 32 and not quick:
            yield Config("tile", bm, bn, bk, stages=7, warps=4, split=split)
            for deep in (4, 7):
                yield Config("tile", bm, bn, bk, stages=deep, warps=4, split=split, tma=True)
        if gpu.large and bn >= 64:  # yᵀ: the weight's rows are the 64 rows of a wgmma
            for tma in (True,) if quick else (False, True):
                yield Config("tile", bm, bn, bk, stages=stages, warps=bn // 16, split=split, swap=True, tma=tma)


def _persistents(gpu: Gpu, m: int, quick: bool) -> Iterator[Config]:
    for bm, bn, warps, sub, stages, ctas in (
        (128, 256, 8, 2, 4, 1),
        (256, 128, 8, 2, 4, 1),
        (128, 256, 8, 4, 4, 1),
        (128, 256, 8, 1, 3, 1),
        (128, 128, 8, 1, 5, 1),
        (128, 128, 8, 2, 6, 1),
        (128, 128, 4, 2, 3, 2),
        (64, 256, 8, 2, 4, 1),
        (64, 256, 4, 2, 4, 1),
        (64, 128, 4, 1, 4, 2),
        (64, 128, 4, 1, 7, 1),
        (64, 64, 4, 1, 6, 2),
    ):
        if (bm > 64 and m <= bm // 2) or (bm * bn <= 2**13 and m > 512):
            continue
        wide = bm * bn >= 2**15
        for flatten in (False, True) if wide else (False,):
            for group in (8, 16) if wide and m >= 2048 and not quick else (8,):
                yield Config(
                    "persistent",
                    bm,
                    bn,
                    128,
                    stages=stages,
                    warps=warps,
                    sub=sub,
                    ctas=ctas,
                    flatten=flatten,
                    group=group,
                )


SPECIALIZED = (
    *(Config("persistent", 128, 256, 128, stages=3, warps=4, specialize=True, group=g) for g in (1, 2, 4, 6, 8, 12)),
    *(Config("persistent", 256, 128, 128, stages=3, warps=4, specialize=True, group=g) for g in (2, 4, 8)),
    *(Config("persistent", 128, 128, 128, stages=4, warps=4, specialize=True, group=g) for g in (4, 8)),
    Config("persistent", 64, 256, 128, stages=4, warps=4, specialize=True),
)


def _shared_bytes(c: Config) -> int:
    """What a configuration needs at least; Triton reports what it cannot know."""
    if c.kind == "gemv":
        return (c.stages - 1) * c.bn * c.bk
    if c.kind == "persistent":
        return c.stages * (c.bm + c.bn) * c.bk + c.bm * c.bn // c.sub * 2
    return (c.stages - 1) * (c.bm + c.bn) * c.bk


def _compile(job: tuple[Gpu, list[tuple[int, int, int, Config]]]) -> int:
    """Fills Triton's cache, in a process without a GPU; a configuration that does not compile is left for the timing."""
    from sqcompile.kernels.triton.gemm.dry import dry

    gpu, jobs = job
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)  # MLIR prints whole modules when it fails
    for m, n, k, c in jobs:
        try:
            with dry(gpu.capability, gpu.sms, gpu.name):
                q, w = torch.empty(m, k, dtype=torch.int8), torch.empty(n, k, dtype=torch.int8)
                x_scale, w_scale = (torch.empty(s, dtype=torch.float32) for s in ((m, 1), (n,)))
                int8_gemm(q, w, x_scale, w_scale, config=c)
        except Exception:  # any failure of the compiler
            continue
    return len(jobs)


def compile_all(gpu: Gpu, jobs: list[tuple[int, int, int, Config]]) -> None:
    """Compiles every distinct kernel among (m, n, k, config) once, over all cores."""
    # the kernels of a configuration differ with: m of a gemv, one tile of rows or more, whether K divides evenly
    distinct = {
        (c, m if c.kind == "gemv" else m <= c.bm, k % (c.split * c.bk) == 0): (m, n, k, c) for m, n, k, c in jobs
    }
    todo = list(distinct.values())
    workers = max(1, min(len(todo), os.cpu_count() or 1))
    start = time.perf_counter()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile, [(gpu, todo[i :: 4 * workers]) for i in range(4 * workers)]))
    print(f"compiled {len(todo)} kernels in {time.perf_counter() - start:.0f} s on {workers} cores", flush=True)


def _operands(m: int, n: int, k: int, number: int) -> tuple[Any, list[Any], Any, Any]:
    g = torch.Generator(device="cuda").manual_seed(0)

    def gaussian(*shape: int) -> Any:  # as quantized weights and activations are, which draws less power than uniform
        x = torch.empty(shape, dtype=torch.int8, device="cuda")
        for part in x.split(4096):
            part.copy_(torch.randn(part.shape, generator=g, device="cuda").mul_(36).clamp_(-127, 127).round_())
        return x

    sizes = ((m, 1), (n,))
    x_scale, w_scale = (torch.rand(s, generator=g, dtype=torch.float32, device="cuda") + 0.5 for s in sizes)
    return gaussian(m, k), [gaussian(n, k) for _ in range(number)], x_scale, w_scale


def time_one(gpu: Gpu, m: int, n: int, k: int, found: list[Config], rep_ms: float) -> list[tuple[float, Config]]:
    """(microseconds, configuration) of those that run and are right, fastest first; wrong ones are reported."""
    number = timing.copies(n * k) if m <= 512 else 1
    q, ws, x_scale, w_scale = _operands(m, n, k, number)
    expected = reference.int8_linear(q, x_scale, ws[0], w_scale, None, torch.bfloat16)
    times = []
    for c in found:
        try:
            right = torch.equal(int8_gemm(q, ws[0], x_scale, w_scale, config=c), expected)
            if not right:
                print(f"  WRONG at {m}x{k}->{n}: {c.to_json()}", flush=True)
                continue
            calls = [functools.partial(int8_gemm, q, w, x_scale, w_scale, config=c) for w in ws]
            times.append((timing.median_us(calls, rep_ms), c))
        except (triton.runtime.errors.OutOfResources, triton.CompilationError, RuntimeError) as error:
            if "CUDA error" in str(error):
                raise
            print(f"  {type(error).__name__} at {m}x{k}->{n}: {c.to_json()}", flush=True)
    return sorted(times, key=lambda t: t[0])


def _specialized_runs() -> bool:
    """Whether the warp-specialized kernels finish, asked in a process of its own: a deadlock would hang this one."""
    code = "from sqcompile.kernels.triton.gemm import tune; tune.check_specialized()"
    try:
        return subprocess.run([sys.executable, "-c", code], timeout=90).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def check_specialized() -> None:
    for m, n, k in ((300, 1000, 512), (4096, 4096, 4096)):
        q, ws, x_scale, w_scale = _operands(m, n, k, 1)
        expected = reference.int8_linear(q, x_scale, ws[0], w_scale, None, torch.bfloat16)
        for c in SPECIALIZED:
            if not torch.equal(int8_gemm(q, ws[0], x_scale, w_scale, config=c), expected):
                raise AssertionError(f"wrong: {c}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sqcompile.kernels.triton.gemm.tune", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", help="what to look for in the device's name; by default all of it")
    parser.add_argument("--quick", action="store_true", help="fewer candidates")
    parser.add_argument("--specialize", action="store_true", help="try warp specialization too (Hopper)")
    parser.add_argument("--rows", type=int, nargs="*", default=BUCKETS, help="M, rounded up to powers of two")
    parser.add_argument("--shapes", nargs="*", help="N,K of other layers than Llama-3-8B's")
    parser.add_argument("--rep", type=float, default=3.0, help="milliseconds of one graph; ten are timed")
    parser.add_argument("--log", type=Path, help="write every candidate's time there, JSON lines")
    args = parser.parse_args(argv)
    torch.backends.cuda.matmul.allow_tf32 = False  # the reference multiplies integers in float32
    gpu = gpu_of(torch.device("cuda", torch.cuda.current_device()))
    shapes = [tuple(map(int, s.split(","))) for s in args.shapes] if args.shapes else LLAMA_3_8B
    specialize = args.specialize and gpu.capability == 90 and _specialized_runs()
    if args.specialize:
        print("warp specialization:", "tried too" if specialize else "does not run here")
    rows_timed = sorted({bucket(m) for m in args.rows})
    plan = {(m, n, k): candidates(gpu, m, n, k, args.quick, specialize) for n, k in shapes for m in rows_timed}
    compile_all(gpu, [(*shape, c) for shape, found in plan.items() for c in found])
    versions = f"{gpu.name}, torch {torch.__version__}, triton {triton.__version__}, {datetime.date.today()}"
    rows: list[dict[str, Any]] = []
    gc.freeze()  # every graph begins with a garbage collection
    print(
        "| M | K -> N | us | TOPS | weights GB/s | second | rule | configuration |\n|---|---|---|---|---|---|---|---|"
    )
    for (m, n, k), found in plan.items():
        times = time_one(gpu, m, n, k, found, args.rep)
        if not times:
            continue
        us, best = times[0]
        rows.append({"m": m, "n": n, "k": k, "us": round(us, 2), "config": best.to_json()})
        second = f"{times[1][0] / us:.2f}x" if len(times) > 1 else ""
        rule = default_config(gpu, m, n, k, aligned=True)
        without = "".join(f"{t / us:.2f}x" for t, c in times if c == rule)  # what a missing table costs
        print(
            f"| {m} | {k} -> {n} | {us:.1f} | {2e-6 * m * n * k / us:.0f} | {1e-3 * n * k / us:.0f} "
            f"| {second} | {without} | {best.to_json()} |",
            flush=True,
        )
        if args.log:
            with args.log.open("a") as log:
                log.writelines(json.dumps({"m": m, "n": n, "k": k, "us": t, **c.to_json()}) + "\n" for t, c in times)
        head = {"name": args.name or gpu.name, "capability": gpu.capability, "measured": versions}
        if specialize:
            head["specialize"] = [".".join(triton.__version__.split(".")[:2])]
        lines = ",\n  ".join(json.dumps(r) for r in rows)
        args.out.write_text(json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n  {lines}\n ]\n}}\n')


if __name__ == "__main__":
    main()
