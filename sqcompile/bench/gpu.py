"""GPU benchmark: INT8 GEMMs of Llama-3-8B beside bf16, FP8 and torch._int_mm, fused kernels beside a device copy.

All in one run, as CUDA graphs; every timed output is compared with float64 arithmetic on a sample of its rows.
"""

from __future__ import annotations

import argparse
import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sqcompile.bench import stack
from sqcompile.bench.timing import gpu, publish
from sqcompile.kernels import fp8, reference
from sqcompile.kernels.qtypes import FP8
from sqcompile.kernels.rotation import BLOCKS
from sqcompile.pytorch.core import int_mm

SHAPES = (("qkv", 4096, 6144), ("o", 4096, 4096), ("gate, up", 4096, 28672), ("down", 14336, 4096))  # K, N
ROWS = (1, 16, 64, 512, 2048, 4096, 8192)
FUSED_ROWS = 8192
BF16_ERROR = 4e-3  # relative, of a correctly rounded bf16 result: at most 2^-8
FP8_ERROR = 8e-3  # with fast accumulation, whose sums have fewer bits


def _sample(m: int) -> Tensor:
    return torch.unique(torch.linspace(0, m - 1, 16, device="cuda").long())


def _error(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


def _require(name: str, error: float, bound: float) -> float:
    if not error <= bound:
        raise AssertionError(f"{name}: relative error {error:.2e}, more than {bound}")
    return error


def _fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [M, K] in float8_e4m3fn, and a scale of each, float32 [M, 1]."""
    scale = reference.token_scale(x, FP8.q_max)
    return reference.quantize(x, scale, dtype=FP8.dtype), scale


def _us(time: float | None) -> str:
    return "" if time is None else f"{time:.1f}"


def gemm_table(rows: tuple[int, ...], rep_ms: float) -> list[str]:
    """A row per (M, layer): microseconds, and TOPS beside the best of the run."""
    from sqcompile.kernels.triton.gemm import timing
    from sqcompile.kernels.triton.gemm.int8_gemm import int8_gemm
    from sqcompile.kernels.triton.rows.quantize import quantize_rows

    has_fp8 = fp8.available(torch.device("cuda", torch.cuda.current_device()))
    measured = []
    for name, k, n in SHAPES:
        number = timing.copies(n * k)
        floats = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(number)]
        weights = [quantize_rows(w) for w in floats]
        fp8_weights = [_fp8(w) for w in floats] if has_fp8 else []
        for m in rows:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            q, x_scale = quantize_rows(x)
            some = _sample(m)
            w, w_scale = weights[0]
            turns = number if m <= 512 else 1
            acc = q[some].double() @ w.double().t()
            exact = acc * x_scale[some].double() * w_scale.double().t()
            scales = [s.view(-1) for _, s in weights]
            ours: list[Callable[[], Tensor]] = [
                functools.partial(int8_gemm, q, w, x_scale, s)
                for (w, _), s in zip(weights[:turns], scales, strict=False)
            ]
            bf16 = [functools.partial(F.linear, x, w) for w in floats[:turns]]
            error = _require(f"INT8 {name} M={m}", _error(ours[0]()[some], exact), BF16_ERROR)
            _require(
                f"bf16 {name} M={m}", _error(bf16[0]()[some], x[some].double() @ floats[0].double().t()), BF16_ERROR
            )
            us = timing.median_us(ours, rep_ms)
            bf16_us = timing.median_us(bf16, rep_ms)
            fp8_us = None
            if has_fp8:
                xq, xs = _fp8(x)
                products = [
                    functools.partial(fp8.fp8_linear, xq, xs, w, s.view(-1), None, torch.bfloat16)
                    for w, s in fp8_weights[:turns]
                ]
                w, s = fp8_weights[0]
                wanted = (xq[some].double() @ w.double().t()) * xs[some].double() * s.double().t()
                _require(f"FP8 {name} M={m}", _error(products[0]()[some], wanted), FP8_ERROR)
                fp8_us = timing.median_us(products, rep_ms)
            int_mm_us = None
            if m > 16:
                products = [functools.partial(int_mm, q, w.t()) for w, _ in weights[:turns]]
                _require(f"_int_mm {name} M={m}", _error(products[0]()[some], acc), 0.0)
                int_mm_us = timing.median_us(products, rep_ms)
            measured.append((name, m, k, n, us, bf16_us, fp8_us, int_mm_us, error))
        del floats, weights, fp8_weights
        torch.cuda.empty_cache()
    best = max(2e-6 * m * n * k / us for _, m, k, n, us, *_ in measured)
    lines = [
        "| layer | K -> N | M | INT8 with epilogue, us | bf16 linear, us | FP8 with scales, us | torch._int_mm, us | vs bf16 | vs FP8 "
        "| TOPS | of the best | weights, GB/s | error |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, m, k, n, us, bf16_us, fp8_us, int_mm_us, error in measured:
        tops = 2e-6 * m * n * k / us
        lines.append(
            f"| {name} | {k} -> {n} | {m} | {us:.1f} | {bf16_us:.1f} | {_us(fp8_us)} | {_us(int_mm_us)} "
            f"| {bf16_us / us:.2f}x | {'' if fp8_us is None else f'{fp8_us / us:.2f}x'} | {tops:.0f} | {tops / best:.0%} | {1e-3 * n * k / us:.0f} | {error:.1e} |"
        )
    return lines


def _rms_norm(h: Tensor, w: Tensor) -> Tensor:
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5) * w


def fused_table(m: int, rep_ms: float) -> list[str]:
    """A row per fused kernel: GB/s over the bytes it must move, beside a device copy of one GiB."""
    from sqcompile.kernels.triton.gemm import timing
    from sqcompile.kernels.triton.rows.act import act_quantize
    from sqcompile.kernels.triton.rows.norm import norm_quantize
    from sqcompile.kernels.triton.rows.quantize import quantize_rows

    d, f = 4096, 14336
    x, r = (torch.randn(m, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    w, b = (torch.rand(d, device="cuda", dtype=torch.bfloat16) + 0.5 for _ in range(2))
    both = torch.randn(m, 2 * f, device="cuda", dtype=torch.bfloat16)
    gate, up = both.chunk(2, -1)
    static = torch.tensor(0.05, device="cuda")
    some = _sample(m)
    xs, hs, ws = x[some].double(), (x + r)[some].double(), w.double()
    gs, us_ = gate[some].double(), up[some].double()
    # name, call that returns (int8, scale), exact value of the sampled rows, bytes per row
    kernels: list[tuple[str, Callable[[], Any], Tensor, int]] = [
        ("quantize per token", lambda: quantize_rows(x), xs, 3 * d),
        ("quantize per tensor", lambda: quantize_rows(x, "tensor"), xs, 5 * d),
        ("quantize static", lambda: (quantize_rows(x, scale=static)[0], static), xs, 3 * d),
        ("RMSNorm + quantize", lambda: norm_quantize(x, w, 1e-5)[1:3], _rms_norm(xs, ws), 3 * d),
        ("add + RMSNorm + quantize", lambda: norm_quantize(x, w, 1e-5, residual=r)[1:3], _rms_norm(hs, ws), 7 * d),
        (
            "add + LayerNorm + quantize",
            lambda: norm_quantize(x, w, 1e-5, kind="layer", bias=b, residual=r)[1:3],
            F.layer_norm(hs, (d,), ws, b.double(), 1e-5),
            7 * d,
        ),
        ("SiLU(gate) up + quantize", lambda: act_quantize(gate, up), F.silu(gs) * us_, 5 * f),
        ("GELU + quantize", lambda: act_quantize(gate, None, "gelu"), F.gelu(gs), 3 * f),
    ]
    source = torch.empty(2**30, device="cuda", dtype=torch.int8)
    target = torch.empty_like(source)
    words = source.view(torch.int64), target.view(torch.int64)
    # as a node of a graph, a copy may run on a copy engine, which is slower than a kernel
    engine, kernel = (
        2e-3 * source.numel() / timing.median_us([call], rep_ms)
        for call in (lambda: target.copy_(source), lambda: torch.bitwise_not(words[0], out=words[1]))
    )
    copy = max(engine, kernel)
    lines = [
        f"1 GiB from memory to memory: copy_ {engine:.0f} GB/s, an elementwise kernel {kernel:.0f} GB/s.\n",
        f"| kernel, {m} rows | columns | us | GB/s | of the faster | error of q Δ |",
        "|---|---|---|---|---|---|",
    ]
    for name, call, exact, row_bytes in kernels:
        q, s = call()
        y = q[some].double() * (s if s.numel() == 1 else s[some]).double()
        # Quantization itself is off by up to half a step, uniformly; bf16 rounding moves values before it.
        step = (s if s.numel() == 1 else s[some]).double()
        worst = float(((y - exact).abs() - 2**-7 * exact.abs()).div(step).max())
        if worst > 1.01 and name != "quantize static":
            raise AssertionError(f"{name}: a value is {worst:.2f} steps off")
        uniform = float((step.square().expand_as(exact) / 12).sum().sqrt() / exact.norm())
        error = _require(name, _error(y, exact), 1.1 * uniform + BF16_ERROR)
        us = timing.median_us([call], rep_ms)
        speed = 1e-3 * m * row_bytes / us
        lines.append(f"| {name} | {q.shape[-1]} | {us:.1f} | {speed:.0f} | {speed / copy:.0%} | {error:.1e} |")
    return lines


def rotated_table(m: int, rep_ms: float) -> list[str]:
    """A row per kernel of rows: microseconds without a rotation, and with blocks of each size."""
    from sqcompile.kernels.triton.gemm import timing
    from sqcompile.kernels.triton.rows.act import act_quantize
    from sqcompile.kernels.triton.rows.norm import norm_quantize
    from sqcompile.kernels.triton.rows.quantize import quantize_rows

    blocks = (0, *BLOCKS)
    lines = [
        f"| kernel, {m} rows | columns | no rotation, us | {' | '.join(f'blocks of {b}' for b in BLOCKS)} |",
        "|---|---|---|" + "---|" * len(BLOCKS),
    ]
    for k in (4096, 11008, 14336):
        x, w = (
            torch.randn(m, k, device="cuda", dtype=torch.bfloat16),
            torch.ones(k, device="cuda", dtype=torch.bfloat16),
        )
        gate, up = torch.randn(m, 2 * k, device="cuda", dtype=torch.bfloat16).chunk(2, -1)
        kernels: dict[str, Callable[..., Any]] = {
            "quantize per token": functools.partial(quantize_rows, x),
            "SiLU(gate) up + quantize": functools.partial(act_quantize, gate, up),
        }
        if k == 4096:
            kernels["RMSNorm + quantize"] = functools.partial(norm_quantize, x, w, 1e-5)
            kernels["add + RMSNorm + quantize"] = functools.partial(norm_quantize, x, w, 1e-5, residual=x)
        for name, call in kernels.items():
            us = [timing.median_us([functools.partial(call, rotation=b)], rep_ms) for b in blocks]
            lines.append(f"| {name} | {k} | {us[0]:.1f} | {' | '.join(f'{u:.1f}, {us[0] / u:.2f}' for u in us[1:])} |")
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sqcompile.bench gpu", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--rep", type=float, default=20.0, help="milliseconds of one graph; ten are timed")
    parser.add_argument("--out", type=Path, help="write the tables there too")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    torch.manual_seed(0)
    gc.freeze()  # every graph begins with a garbage collection
    lines = [
        f"{gpu()} Medians of CUDA graphs; for M <= 512 weights come from memory, not from L2.\n",
        *gemm_table(tuple(args.rows), args.rep),
        "",
        *fused_table(FUSED_ROWS, args.rep),
        "",
        *rotated_table(FUSED_ROWS, args.rep),
        "",
        *stack.table(),
    ]
    publish(lines, args.out)
