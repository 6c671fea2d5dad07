"""Tensor parallel on two GPUs, one process each: beside one GPU, and beside `torch.compile` in bf16 on the same two.

    python -m sqcompile.bench parallel --model 8b --layers 24
    python -m sqcompile.bench parallel --model 70b --layers 8

Linears of attention and MLP are sharded by columns, then by rows, with one all-reduce for each pair. Every contender runs as
CUDA graphs with the collectives in them; both processes replay each as often. Weights are random.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import itertools
import os
import socket
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import sqcompile
from sqcompile.bench.stack import DECODE, LLAMA_8B, LLAMA_70B, PREFILL, Shape, captured, stack
from sqcompile.bench.timing import gpu, publish

MODELS = {"8b": LLAMA_8B, "70b": LLAMA_70B}
BY_COLUMNS, BY_ROWS = ("q", "k", "v", "gate", "up"), ("o", "down")
RECIPE = sqcompile.Recipe(0.5)  # choices of the default take minutes for weights of this size
_PROCESSES = 2


def sharded(model: nn.Module, mesh: Any) -> nn.Module:
    """A `Stack` of which each process of a mesh has a part. In place."""
    styles: dict[str, Any] = {f"layers.*.{name}": ColwiseParallel() for name in BY_COLUMNS}
    return parallelize_module(model, mesh, styles | {f"layers.*.{name}": RowwiseParallel() for name in BY_ROWS})


def _median_us(replay: Callable[[], None], rounds: int) -> float:
    """Median microseconds of a replay. Not as long as it takes, but as often as in the other process."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    for mark in marks[:-1]:
        mark.record()
        replay()
    marks[-1].record()
    torch.cuda.synchronize()
    return statistics.median(1e3 * a.elapsed_time(b) for a, b in itertools.pairwise(marks[2:]))


def _measured(
    name: str, run: Callable[[Tensor], Tensor], inputs: list[Tensor], fresh: bool = False
) -> list[tuple[float, Tensor]]:
    """Microseconds and output for each input, printed when they are there; ``fresh`` compiles each size for itself."""
    found = []
    for x in inputs:
        if fresh:
            torch.compiler.reset()
        replay, read = captured(run, x)
        _median_us(replay, 6)
        found.append((_median_us(replay, 25), read().clone()))
        if not distributed.is_initialized() or distributed.get_rank() == 0:
            print(f"{name}, {x.shape[0]} x {x.shape[1]}: {found[-1][0]:.0f} us", flush=True)
    return found


def _release() -> None:
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def _worker(
    rank: int,
    port: int,
    layers: int,
    widths: Shape,
    shapes: list[tuple[int, int]],
    beside: list[str],
    regional: bool,
    out: Path | None,
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(_PROCESSES))
    torch.cuda.set_device(rank)
    model: nn.Module = stack(layers, widths)
    batches = [torch.randn(2, 256, widths.hidden, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    inputs = [torch.randn(*shape, widths.hidden, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    with torch.no_grad():
        exact = [model(x) for x in inputs]

    def compiled(model: nn.Module, mesh: Any = None) -> nn.Module:
        return sqcompile.compile(model, batches, recipe=RECIPE, progress=False, device_mesh=mesh, regional=regional)

    found: dict[str, list[tuple[float, Tensor]]] = {}
    # before there is a group, whose processes calibrate together; the other one waits for this one
    if rank == 0 and "one" in beside:
        found["one"] = _measured("INT8, 1 GPU", compiled(model), inputs)
        _release()
    distributed.init_process_group(
        "nccl",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=_PROCESSES,
        device_id=torch.device("cuda", rank),
        timeout=datetime.timedelta(minutes=20),
    )
    mesh = init_device_mesh("cuda", (_PROCESSES,))
    sharded(model, mesh)
    if "bf16" in beside:
        if regional:
            for layer in model.get_submodule("layers").children():
                layer.compile(dynamic=False)
        half = model if regional else torch.compile(model, dynamic=False)
        found["bf16"] = _measured("bf16, 2 GPUs", half, inputs, fresh=True)
        model = sharded(stack(layers, widths), mesh)
        _release()
    ours = compiled(model, mesh)
    found["ours"] = _measured("INT8, 2 GPUs", ours, inputs)
    if rank == 0:
        publish(_table(layers, widths, shapes, regional, exact, found), out)
    distributed.barrier()
    distributed.destroy_process_group()


def _table(
    layers: int,
    widths: Shape,
    shapes: list[tuple[int, int]],
    regional: bool,
    exact: list[Tensor],
    found: dict[str, list[tuple[float, Tensor]]],
) -> list[str]:
    def error(y: Tensor, want: Tensor) -> str:
        return f"{float((y.double() - want.double()).norm() / want.double().norm()):.1e}"

    def cells(i: int) -> list[str]:
        """Of one shape; empty for a contender that was not run."""
        us = {name: times[i][0] for name, times in found.items()}
        y = {name: times[i][1] for name, times in found.items()}
        return [
            *(f"{us[name]:.0f}" if name in us else "" for name in ("bf16", "one", "ours")),
            *(f"{us[name] / us['ours']:.2f}x" if name in us else "" for name in ("bf16", "one")),
            *(error(y[name], exact[i]) if name in y else "" for name in ("bf16", "one", "ours")),
            error(y["ours"], y["one"]) if "one" in y else "",
        ]

    return [
        f"{gpu()} {_PROCESSES} of them. {layers} layers, {widths.hidden} channels, {widths.ffn} of the MLP, alpha {RECIPE.alpha}{', compiled by layers' if regional else ''}. Medians of CUDA graphs.",
        "",
        "| batch x tokens | bf16, 2 GPUs, us | INT8, 1 GPU, us | INT8, 2 GPUs, us | vs bf16 | vs 1 GPU | error of bf16 | of INT8, 1 GPU | of INT8, 2 GPUs | of 2 beside 1 |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(f"| {batch} x {tokens} | {' | '.join(cells(i))} |" for i, (batch, tokens) in enumerate(shapes)),
    ]


def _shape(text: str) -> tuple[int, int]:
    """Batch and tokens, from "4x2048"."""
    batch, tokens = text.split("x")
    return int(batch), int(tokens)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m sqcompile.bench parallel", description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="8b")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--shapes", type=_shape, nargs="+", default=[*PREFILL, *DECODE], help="such as 4x2048 1x1")
    parser.add_argument(
        "--beside", choices=("one", "bf16"), nargs="*", default=["one", "bf16"], help="INT8 on one GPU, bf16 on two"
    )
    parser.add_argument("--regional", action="store_true", help="every contender compiles one layer for all")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    if torch.cuda.device_count() < _PROCESSES:
        parser.error(f"needs {_PROCESSES} CUDA GPUs")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    of_worker = port, args.layers, MODELS[args.model], args.shapes, args.beside, args.regional, args.out
    multiprocessing.spawn(_worker, of_worker, nprocs=_PROCESSES)
