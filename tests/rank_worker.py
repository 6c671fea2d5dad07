"""One process of tests/whole/test_ranks.py: joins groups of several sizes, calibrates in them, and writes what came of it."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

import sqcompile
from sqcompile.passes.ir import pieces
from sqcompile.process import ranks
from sqcompile.statistics import observe

SILENT = 3.0
FAMILIES = (("llama", "O3"), ("mixtral", "default"))


class Tiny(nn.Module):
    """Logits [B, S, 50] of token ids [B, S]: one block of attention with a mask, and an MLP."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.head = nn.Embedding(50, 32), nn.Linear(32, 50)
        self.norm, self.qkv, self.o = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.after, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        with torch.no_grad():
            self.norm.weight[3], self.after.weight[5] = 20.0, 30.0

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind(0)
        mask = attention_mask[:, None, None, :].bool()
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))
        return self.head(x + self.down(torch.relu(self.up(self.after(x)))))


def batches(n: int = 11, seed: int = 0) -> list[dict[str, Tensor]]:
    """Padded in different places; more than a sample of calls holds, and than ranks."""
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, 50, (2, 12), generator=g) for _ in range(n)]
    masks = [(torch.arange(12) >= i % 4).long().expand(2, -1).contiguous() for i in range(n)]
    return [{"input_ids": x, "attention_mask": m} for x, m in zip(ids, masks, strict=True)]


def running(model: nn.Module) -> None:
    for batch in batches():
        model(**batch)


class Small(nn.Module):
    """[B, 16] of [B, 16]."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.norm(x))))


def rows(n: int = 11) -> list[Tensor]:
    return list(torch.randn(n, 4, 16, generator=torch.Generator().manual_seed(0)).unbind(0))


def after(n: int, act: Callable[[], Any]) -> Iterator[Tensor]:
    """Does something after n batches."""
    yield from rows()[:n]
    act()


def fails() -> None:
    raise ValueError("no text\nis left")


def dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def infinite() -> list[Tensor]:
    """Batch 4 is, which of three ranks is rank 1's."""
    found = rows()
    found[4][0, 5] = float("inf")
    return found


def within_a_limit() -> sqcompile.Plan:
    """Piece by piece, with a part of the sample's calls among those that a rank runs beside its own."""
    small, few = mock.patch.multiple(pieces, PIECE=2, MOST=0, _SMALL=1), mock.patch.object(observe, "_AHEAD", 3)
    with small, few, sqcompile.memory_limit(2**40):
        return sqcompile.calibrate(Tiny().eval(), batches(), progress=False)


def plan_of(what: str) -> sqcompile.Plan:
    if what == "limited":
        return within_a_limit()
    if what == "compiled":
        return sqcompile.compile(Tiny().eval(), batches(), backend="eager", progress=False).plan
    recipe = "O3" if what == "O3" else "default"
    loader = {"callable": running, "one batch": batches(1)}.get(what, batches())
    return sqcompile.calibrate(Tiny().eval(), loader, recipe=recipe, progress=False)


# by the size of the group; 0 for none
PLANS = {
    0: ("default", "O3", "one batch"),
    1: ("default", "limited"),
    2: ("default", "callable", "compiled", "limited"),
    3: ("O3", "one batch", "limited"),
}


def plans(rank: int, folder: Path, size: int) -> None:
    for what in PLANS[size]:
        plan_of(what).save(folder / f"{what}-{size}-{rank}")


FAILURES: dict[str, Callable[[int], Any]] = {
    "raises": lambda rank: (Small(), after(3, fails) if rank == 1 else rows()),
    "first raises": lambda rank: (Small(), after(3, fails) if rank == 0 else rows()),
    "not finite": lambda rank: (Small(), infinite()),
    "model": lambda rank: (Small(seed=int(rank == 2)), rows()),
    "more": lambda rank: (Small(), rows()[: 10 if rank == 1 else 11]),
    "shuffled": lambda rank: (Small(), rows()[:: -1 if rank == 1 else 1]),
    "in another order": lambda rank: (Small(), rows()[:9] + rows()[9:][:: -1 if rank == 2 else 1]),
    "recipe": lambda rank: (Small(), rows(), "O1" if rank == 1 else "default"),
    "no recipe": lambda rank: (Small(), rows(), "O7" if rank == 1 else "default"),
    "again": lambda rank: (Small(), rows()),
    "late": lambda rank: (time.sleep(4 if rank == 2 else 0), Small(), rows())[1:],
    "killed": lambda rank: (Small(), after(4, dies) if rank == 2 else rows()),
    "first killed": lambda rank: (Small(), after(4, dies) if rank == 0 else rows()),
}


def attempt(name: str, rank: int, folder: Path) -> None:
    start, said = time.monotonic(), "none"
    model, loader, *recipe = FAILURES[name](rank)
    try:
        sqcompile.calibrate(model.eval(), loader, recipe=recipe[0] if recipe else "default", progress=False)
    except Exception as e:
        said = f"{type(e).__name__}: {e}"
    (folder / f"{name}-{rank}").write_text(json.dumps([said, time.monotonic() - start]))


@contextlib.contextmanager
def group(where: str, rank: int, size: int, late: float = 300.0) -> Iterator[None]:
    """A group of a size; ``late``: seconds in which all ranks of it begin a calibration."""
    distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=size)
    world = distributed.group.WORLD
    assert world is not None
    world.get_group_store().set_timeout(datetime.timedelta(seconds=late))
    yield
    distributed.destroy_process_group()


def in_each(plans: Callable[[int, Path, int], None], sizes: Iterable[int], rank: int, folder: Path) -> None:
    """Makes plans without a group, in rank 0 alone, and in a group of each size."""
    if rank == 0:
        plans(rank, folder, 0)
    for size in sizes:
        if rank < size:
            with group(f"file://{folder}/store-{size}", rank, size):
                plans(rank, folder, size)


def family_plans(rank: int, folder: Path, size: int) -> None:
    from conftest import tiny_lm

    for family, recipe in FAMILIES:
        loader = [{k: v + 3 * (k == "input_ids") for k, v in batch.items()} for batch in batches(5)]
        plan = sqcompile.calibrate(tiny_lm(family, num_hidden_layers=1), loader, recipe=recipe, progress=False)
        plan.save(folder / f"{family}-{recipe}-{size}-{rank}")


def main(rank: int, folder: Path, what: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    ranks.BEAT, ranks.SILENT = 0.1, SILENT
    if what == "families":
        return in_each(family_plans, (2,), rank, folder)
    in_each(plans, PLANS, rank, folder)
    two = [name for name in FAILURES if name == "first killed"]
    with group(f"file://{folder}/store-failures", rank, 3, late=3.0):
        for name in FAILURES:
            if name not in two:
                attempt(name, rank, folder)
    with group(f"tcp://127.0.0.1:{(folder / 'port').read_text()}", rank, 2):
        for name in two:
            attempt(name, rank, folder)
        os._exit(0)  # the group cannot be ended without the rank that is dead


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
