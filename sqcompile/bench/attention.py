"""GPU benchmark of INT8 attention beside scaled_dot_product_attention in bf16, and SageAttention where it is installed.

Medians of CUDA graphs in one run; every timed output is compared with float32 attention of the unquantized operands on
a sample of its heads. TOPS count 4 · B · H · Sq · Sk · D operations, half of them where causal, whatever was computed.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import sqcompile
from sqcompile.bench import stack
from sqcompile.bench.speedup import write_table
from sqcompile.bench.timing import gpu, publish, sqnr_db
from sqcompile.kernels import reference

PREFILL = (
    *((1, 32, 8, s, s, 128) for s in (2048, 4096, 8192)),
    (1, 32, 32, 4096, 4096, 128),
    (4, 32, 8, 2048, 2048, 128),
    *((1, 32, 8, s, s, 64) for s in (2048, 8192)),
    (4, 32, 8, 2048, 2048, 64),
)
MASKED = (  # prefill and decode over a static cache that has room for more
    (1, 32, 8, 2048, 2177, 128),
    (16, 32, 8, 128, 257, 128),
    (2, 8, 4, 1024, 1100, 256),
    *((b, 32, 8, 1, s, 128) for b, s in ((1, 257), (1, 2177), (1, 8192), (16, 257), (64, 257), (16, 2177))),
)
DECODE = tuple((b, 32, 8, 1, s, 128) for b in (1, 16, 64) for s in (2048, 8192))  # B, H, G, Sq, Sk, D
HALF = torch.bfloat16


@dataclass(frozen=True)
class Operands:
    """bf16 q [B, H, Sq, D], k and v [B, G, Sk, D]; k has a mean and outlier channels, as after rotary embeddings."""

    q: Tensor
    k: Tensor
    v: Tensor

    @staticmethod
    def make(shape: tuple[int, ...]) -> Operands:
        b, h, g, sq, sk, d = shape
        q, k, v = (torch.randn(b, n, s, d, device="cuda") for n, s in ((h, sq), (g, sk), (g, sk)))
        k[..., :: d // 4] *= 4
        return Operands(q.to(HALF), k.to(HALF), v.to(HALF))

    def call(self, kind: str, causal: bool, **options: Any) -> Callable[[], Tensor]:
        """INT8 attention from q and k in bf16, which it quantizes in its own time; in decode k and v are an INT8 cache.

        ``kind``: "qk" or "qk_pv", " per token" or " static" (one scale, as calibration gives it). V of "qk_pv" is given in
        INT8, as a projection with a static scale per channel leaves it.
        """
        from sqcompile.kernels.triton.attention.int8_attention import int8_attention
        from sqcompile.kernels.triton.rows.quantize import quantize_rows

        values, static = kind.startswith("qk_pv"), kind.endswith("static")
        q_scale, k_scale = (reference.tensor_scale(x) if static else None for x in (self.q, self.k))
        v, v_scale = self.v, None
        if values:
            v_scale = reference.absmax_scale(v.abs().amax((0, 2), keepdim=True))
            v = reference.quantize(v, v_scale)
            if self.prefill:  # as the tensor cores read it
                v = v.transpose(2, 3).contiguous().transpose(2, 3)
        cache = None if self.prefill else quantize_rows(self.k, scale=k_scale)
        tail: tuple[Any, ...] = (None, None, 0 if causal else None, self.q.shape[3] ** -0.5, 0.0, HALF)

        def run() -> Tensor:
            k, scale = cache or quantize_rows(self.k, scale=k_scale)
            return int8_attention(self.q, q_scale, k, scale, v, v_scale, *tail, **options)

        return run

    @property
    def prefill(self) -> bool:
        return self.q.shape[2] > 1


KINDS = ("qk per token", "qk_pv per token", "qk static", "qk_pv static")


def _cosine(y: Tensor, o: Operands, causal: bool) -> float:
    """The smallest cosine over the last query rows and the first ones of two heads."""
    group = o.q.shape[1] // o.k.shape[1]
    worst = 1.0
    for b, h in ((0, 0), (o.q.shape[0] - 1, o.q.shape[1] - 1)):
        q, k, v = o.q[b, h].float(), o.k[b, h // group].float(), o.v[b, h // group].float()
        rows = torch.unique(torch.linspace(0, len(q) - 1, 256, device=q.device).long())
        scores = q[rows] @ k.T * q.shape[1] ** -0.5
        if causal:
            scores.masked_fill_(torch.arange(len(k), device=q.device) > rows[:, None], -torch.inf)
        exact = torch.softmax(scores, -1) @ v
        worst = min(worst, float(F.cosine_similarity(y[b, h][rows].float().flatten(), exact.flatten(), 0)))
    return worst


def contenders(o: Operands, causal: bool) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """(name, call) of every implementation; calls return [B, H, Sq, D]."""
    gqa = o.q.shape[1] != o.k.shape[1]
    for kind in KINDS:
        yield kind, o.call(kind, causal)
    sdpa = functools.partial(F.scaled_dot_product_attention, is_causal=causal, enable_gqa=gqa)
    yield "SDPA bf16", functools.partial(sdpa, o.q, o.k, o.v)
    if causal and importlib.util.find_spec("sageattention"):
        import sageattention

        yield "SageAttention", functools.partial(sageattention.sageattn, o.q, o.k, o.v, is_causal=True)


def table(
    shapes: tuple[tuple[int, ...], ...], causal: bool, rep_ms: float, measured: list[dict[str, float]]
) -> list[str]:
    """A row per shape: microseconds of each contender, with TOPS (prefill) or GB/s of keys and values (decode).

    Rows of a table in kernels/speedups are appended to ``measured``.
    """
    from sqcompile.kernels.triton.gemm import timing

    rows: list[str] = []
    names: list[str] = []
    for shape in shapes:
        b, h, g, sq, sk, d = shape
        o = Operands.make(shape)
        cells, times = [], {}
        names = []
        for name, call in contenders(o, causal):
            names.append(name)
            try:
                cosine = _cosine(call(), o, causal)
                times[name] = us = timing.median_us([call], rep_ms)
            except Exception as error:  # another package's kernel may fail on a shape
                cells.append(type(error).__name__)
                continue
            if not cosine >= (0.999 if "SDPA" in name else 0.98):
                raise AssertionError(f"{name} at {shape}: cosine {cosine}")
            if sq > 1:
                speed = f"{4e-6 * b * h * sq * sk * d / (2 if causal else 1) / us:.0f} T"
            else:
                nbytes = {"qk_pv": 2, "qk": 3}.get(name.split()[0], 4) * b * g * sk * d
                speed = f"{1e-3 * nbytes / us:.0f} GB/s"
            cells.append(f"{us:.1f}, {speed}, {cosine:.5f}")
        ours = min(t for n, t in times.items() if n.startswith("qk"))
        ratios = [f"{times[n] / ours:.2f}x" if n in times else "" for n in ("SDPA bf16", "SageAttention")]
        rows.append(f"| {' '.join(map(str, shape))} | " + " | ".join([*cells, *ratios]) + " |")
        print(rows[-1], flush=True)
        compared = {"sdpa_us": "SDPA bf16", "qk_us": "qk per token", "qk_pv_us": "qk_pv per token"}
        if times.keys() >= set(compared.values()):
            sizes = dict(zip(("b", "h", "g", "sq", "sk", "d"), shape, strict=True))
            measured.append(sizes | {key: round(times[name], 1) for key, name in compared.items()})
        del o, call
        torch.cuda.empty_cache()
    columns = [f"{n}: us, speed, cosine" for n in names] + ["SDPA / best INT8", "Sage / best INT8"]
    return ["| B H G Sq Sk D | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|", *rows]


def with_a_mask(rep_ms: float) -> Iterator[str]:
    """Lines of a table: attention with a mask tensor, as a traced model calls it: the room behind the tokens is blocked.

    PyTorch repeats the shared key heads before. INT8 keys have scales per token, and are given, as is the mask's list.
    """
    from sqcompile.kernels.ops import sqcompile_ops
    from sqcompile.kernels.triton.gemm import timing
    from sqcompile.kernels.triton.rows.quantize import quantize_rows

    yield "| B H G Sq Sk D | SDPA bf16, repeated heads, us | ours in bf16, us | INT8 QKᵀ, us | SDPA / ours | SDPA / INT8 |"
    yield "|---" * 6 + "|"
    for shape in MASKED:
        o = Operands.make(shape)
        (b, h, g, sq, sk, d), seen = shape, shape[4] - 9
        rows = torch.arange(sq, device="cuda")[:, None] + (seen - sq)
        keep = (torch.arange(sk, device="cuda") <= rows).expand(b, 1, sq, sk)
        mask = sqcompile_ops.aligned_mask(keep)
        blocks = sqcompile_ops.mask_blocks(mask)
        k, k_scale = quantize_rows(o.k)
        tail = (mask, blocks, None, d**-0.5, 0.0, HALF)

        def sdpa(o: Operands = o, keep: Tensor = keep, group: int = h // g) -> Tensor:
            k, v = (x if group == 1 else x.repeat_interleave(group, 1) for x in (o.k, o.v))
            return F.scaled_dot_product_attention(o.q, k, v, keep)

        calls: list[Callable[[], Tensor]] = [
            sdpa,
            functools.partial(sqcompile_ops.attention, o.q, o.k, o.v, mask, blocks, False, None),
            functools.partial(sqcompile_ops.int8_attention, o.q, None, k, k_scale, o.v, None, *tail),
        ]
        exact = calls[0]().float()
        for call, bound in zip(calls, (1.0, 0.999, 0.98), strict=True):
            cosine = float(F.cosine_similarity(call().float().flatten(), exact.flatten(), 0))
            if not cosine > bound - 1e-4:
                raise AssertionError(f"with a mask at {shape}: cosine {cosine}")
        us = [timing.median_us([call], rep_ms) for call in calls]
        cells = " | ".join(f"{t:.1f}" for t in us)
        yield f"| {' '.join(map(str, shape))} | {cells} | {us[0] / us[1]:.2f}x | {us[0] / us[2]:.2f}x |"


def in_a_model(layers: int = 2, seconds: float = 0.5) -> Iterator[str]:
    """Lines of a table: layers of Llama-3-8B shape with INT8 linears, and attention as each recipe has it.

    Keys and values are quantized by code that Inductor fuses with what makes them, queries by the attention kernel.
    """
    model = stack.stack(layers)
    batches = [torch.randn(2, 256, stack.HIDDEN, device="cuda", dtype=HALF)]
    recipes: dict[str, Any] = {"bf16": "none", "qk": "qk", "qk_pv": "qk_pv"}
    compiled = {
        name: sqcompile.compile(model, batches, recipe=sqcompile.Recipe(attention=attention), progress=False)
        for name, attention in recipes.items()
    }
    yield f"| batch x tokens | {' | '.join(f'attention {name}, us' for name in recipes)} | bf16 / qk | SQNR, qk and bf16 |"
    yield "|---" * (3 + len(recipes)) + "|"
    for shape in ((1, 2048), (4, 2048), (1, 8192)):
        x = torch.randn(*shape, stack.HIDDEN, device="cuda", dtype=HALF)
        with torch.no_grad():
            want = model(x)
        us, sqnr = {}, {}
        for name, run in compiled.items():
            replay, read = stack.captured(run, x)
            us[name] = stack.median_us(replay, seconds)
            sqnr[name] = sqnr_db(want, read())
        cells = " | ".join(f"{t:.0f}" for t in us.values())
        quality = f"{sqnr['qk']:.1f} and {sqnr['bf16']:.1f} dB"
        yield f"| {shape[0]} x {shape[1]} | {cells} | {us['bf16'] / us['qk']:.2f}x | {quality} |"


def candidates(prefill: bool) -> Iterator[Any]:
    """Tiles worth timing on an H100."""
    from sqcompile.kernels.triton.attention.int8_attention import Tile

    if not prefill:
        for bn, stages, warps, splits in itertools.product((64, 128), (2, 3, 4), (2, 4), (0, 1, 2, 4, 8, 16, 32)):
            yield Tile(16, bn, stages, warps, splits=splits)
        return
    for bm, bn, warps, stages in (
        (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 256, 8, 2),
        (64, 128, 4, 2), (64, 128, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (128, 64, 4, 3), (64, 256, 4, 2),
    ):  # fmt: skip
        for registers in (None, 128) if warps == 8 and bn == 64 else (None,):
            yield Tile(bm, bn, stages, warps, tma=True, registers=registers)


def tune(shapes: tuple[tuple[int, ...], ...], causal: bool, rep_ms: float) -> list[str]:
    """The five fastest tiles of each shape, per kind of values and scales, after a check of each one's result."""
    from sqcompile.kernels.triton.gemm import timing

    lines = []
    for shape, kind in itertools.product(shapes, KINDS):
        o = Operands.make(shape)
        found = []
        for tile in candidates(shape[3] > 1):
            try:
                call = o.call(kind, causal, tile=tile)
                cosine = _cosine(call(), o, causal)
                if cosine < 0.98:
                    print(f"  WRONG {cosine:.3f} at {shape}: {tile}", flush=True)
                    continue
                found.append((timing.median_us([call], rep_ms), str(tile)))
            except Exception as error:  # what does not fit
                if "CUDA error" in str(error):
                    raise
                print(f"  {type(error).__name__} at {shape}: {tile}", flush=True)
        operations = 4e-6 * torch.tensor(shape).prod().item() / shape[2] / (2 if causal else 1)
        for us, name in sorted(found)[:5]:
            lines.append(f"| {' '.join(map(str, shape))} | {kind} | {us:.1f} | {operations / us:.0f} | {name} |")
            print(lines[-1], flush=True)
    return ["| B H G Sq Sk D | kind | us | TOPS | tile |", "|---|---|---|---|---|", *lines]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sqcompile.bench attention", description=__doc__)
    parser.add_argument("--rep", type=float, default=10.0, help="milliseconds of one graph; ten are timed")
    parser.add_argument("--tune", action="store_true", help="time tile candidates instead of the shipped choice")
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--out", type=Path, help="write the tables there too")
    parser.add_argument("--speedups", type=Path, help='a file of kernels/speedups/, whose "attention" to replace')
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    gc.freeze()  # every graph begins with a garbage collection
    few = ((1, 32, 8, 2048, 2048, 128), (1, 32, 8, 8192, 8192, 128), (4, 32, 8, 2048, 2048, 64))
    prefill, decode = (few if args.quick or args.tune else PREFILL), (DECODE[::2] if args.quick else DECODE)
    measured: list[dict[str, float]] = []
    make = tune if args.tune else functools.partial(table, measured=measured)
    lines = [
        f"{gpu()} Medians of CUDA graphs.\n",
        *make(prefill, True, args.rep),
        "",
        *make(decode, False, args.rep),
        "",
        *([] if args.tune else with_a_mask(args.rep)),
        "",
        *([] if args.tune else in_a_model()),
    ]
    publish(lines, args.out)
    if args.speedups:
        write_table(args.speedups, json.loads(args.speedups.read_text()) | {"attention": measured})
