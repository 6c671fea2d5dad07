"""One process of tests/whole/test_parallel_faults.py: what comes of wrong plans, and of failures in one process alone."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from parallel_worker import batches, group, said, settled
from torch import Tensor, distributed, nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import sqcompile
from sqcompile.passes.planning import choose, end_to_end, feel
from sqcompile.plan.entries import Shard

STATIC = sqcompile.Recipe(activation="per_tensor_static")
MLP_STYLES = {"up": ColwiseParallel(), "down": RowwiseParallel()}


class Mlp(nn.Module):
    """[B, S, 32] of [B, S, 32]; what ``change`` does to it is done before it is sharded."""

    def __init__(self, change: Callable[[Mlp], None] = lambda m: None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        with torch.no_grad():
            change(self)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class First(Mlp):
    """[B, S, 64] of [B, S, 32], of which each process gives its own half."""

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x).exp()


def too_large(m: Mlp) -> None:
    """What the second process computes overflows, from finite weights."""
    m.up.weight[32:] = 3e38


def high(m: Mlp) -> None:
    """What the second process computes is finite, and its exponential is not."""
    m.up.bias[32:] = 1e3


def silent(m: Mlp) -> None:
    """What the second process computes is zero, and so are its gradients."""
    m.up.bias[32:] = -1e3


def at_marks(m: Mlp) -> None:
    """What the second process computes is zero but for tokens with a mark."""
    m.up.weight[32:] = 0.0
    m.up.weight[32:, 31] = 1.0
    m.up.bias[32:] = 0.0


def marked() -> list[Tensor]:
    """Batches in which tokens of one half alone have a mark; see `InputStats.update` for the halves."""
    found = batches()
    for i, x in enumerate(found):
        rows = x.view(-1, 32)
        half = (torch.arange(len(rows)) >= len(rows) // 2) ^ bool(i % 2)
        rows[:, 31] = torch.where(half, -5.0, 5.0)
    return found


def sharded(mesh: Any, change: Callable[[Mlp], None] = lambda m: None, kind: type[Mlp] = Mlp) -> nn.Module:
    return parallelize_module(kind(change).eval(), mesh, MLP_STYLES)


def plans(mesh: Any, rank: int, folder: Path, whole: sqcompile.Plan) -> dict[str, Any]:
    """What is said of each plan that is not this process's."""
    plan = sqcompile.calibrate(sharded(mesh), batches(), recipe=STATIC, progress=False, device_mesh=mesh)
    plan.save(folder / f"plan-{rank}")
    distributed.barrier()
    other = sqcompile.Plan.load(folder / "plan-0")

    def compiled(given: Any) -> Any:
        return sqcompile.compile(sharded(mesh), plan=given, backend="eager", progress=False, device_mesh=mesh)

    def by_backend(model: nn.Module, given: Any) -> Any:
        torch._dynamo.reset()  # on rank 0 it would raise again what it has raised of an equal plan, without a look
        with torch.no_grad():
            net = torch.compile(model, backend="smoothquant", options={"compiler": "eager", "plan": given})
            return net(batches()[0])

    calls: dict[str, Callable[[], Any]] = {
        "own": lambda: compiled(folder / f"plan-{rank}"),
        "of rank 0": lambda: compiled(folder / "plan-0"),
        "of rank 0, by torch.compile": lambda: by_backend(sharded(mesh), other),
        "of a whole model": lambda: compiled(whole),
        "for a whole model": lambda: sqcompile.compile(Mlp().eval(), plan=plan, backend="eager", progress=False),
        "for a whole model, by torch.compile": lambda: by_backend(Mlp().eval(), plan),
        "of four processes": lambda: compiled(replace(plan, shard=Shard(rank, 4))),
        "edited": lambda: compiled(plan.keep_float("up") if rank else plan),
        "not there": lambda: compiled(folder / ("nothing" if rank else "plan-0")),
        "own again": lambda: by_backend(sharded(mesh), plan),
    }
    found = {name: said(call) for name, call in calls.items()}
    again = sqcompile.Plan.load(folder / f"plan-{rank}")
    return {
        "said": {name: words.replace(str(folder), "FOLDER") for name, words in found.items()},
        "equal": [again == plan, hash(again) == hash(plan), other == plan, replace(plan, shard=None) == plan],
        "repr": repr(plan),
        "html": plan._repr_html_(),
    }


def calibrated(
    mesh: Any, change: Callable[[Mlp], None], data: list[Tensor], recipe: Any = "default", kind: type[Mlp] = Mlp
) -> dict[str, Any]:
    """What is decided of a model, or said."""
    model, plan = sharded(mesh, change, kind), []

    def run() -> None:
        plan.append(sqcompile.calibrate(model, data, recipe=recipe, progress=False, device_mesh=mesh))

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        words = said(run, Exception)
    return {
        "said": words,
        "decided": [x[:5] for p in plan for x in settled(p)],
        "reasons": sorted({l.reason.partition("; ")[2] for p in plan for l in p.layers}),
        "warned": [str(w.message) for w in warned if "was not compared" in str(w.message)],
    }


def failing(rank: int, where: Any, name: str, error: Exception, call: int = 0) -> Any:
    """A function fails in the second process, at one of its calls."""
    real, count = getattr(where, name), [0]

    def run(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if rank == 1 and count[0] == call + 1:
            raise error
        return real(*args, **kwargs)

    return mock.patch.object(where, name, run)


def faults(mesh: Any, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "too large": calibrated(mesh, too_large, batches()),
        "too large outputs": calibrated(mesh, high, batches(), kind=First),
        "silent": calibrated(mesh, silent, batches()),
        "silent, static": calibrated(mesh, silent, batches(), STATIC),
        "in one half": calibrated(mesh, at_marks, marked(), STATIC),
        "in one half, by outputs": calibrated(mesh, at_marks, marked(), replace(STATIC, alpha="auto")),
    }
    memory = MemoryError("no room\nfor it")
    with failing(rank, feel._Found, "see", memory, 1):
        found["gradients"] = calibrated(mesh, lambda m: None, batches())
    with failing(rank, end_to_end, "_noise", memory, 1):
        found["outputs"] = calibrated(mesh, lambda m: None, batches())
    with failing(rank, choose, "choose_attention", memory):
        found["choice"] = calibrated(mesh, lambda m: None, batches())
    return found


def main(rank: int, folder: Path) -> None:
    warnings.simplefilter("ignore")
    whole = sqcompile.calibrate(Mlp().eval(), batches(), recipe=STATIC, progress=False)
    with group(rank, folder) as mesh:
        found = {"plans": plans(mesh, rank, folder, whole), "faults": faults(mesh, rank)}
        (folder / f"found-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
