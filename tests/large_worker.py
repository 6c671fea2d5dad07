"""What tests/checkpoints/test_large_ranks.py runs: a process that has imported everything forks into the ranks of groups."""

from __future__ import annotations

import datetime
import errno
import functools
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from families import token_ids
from torch import distributed

import sqcompile
from sqcompile.artifact import tensors as artifact
from sqcompile.checkpoints import dealt
from sqcompile.files import directory
from sqcompile.process import ranks
from sqcompile.programs import export
from sqcompile.statistics import observe

SILENT = 2.0
MOST = 30_000  # bytes of a file of weights
WROTE: list[str] = []  # files of weights, by this rank


def quantize(checkpoint: str, target: Path, seeds: tuple[int, ...] = (1, 2, 3), **changes: Any) -> None:
    given = {"recipe": sqcompile.Recipe(0.5), "progress": False, **changes}
    sqcompile.quantize_checkpoint(checkpoint, [{"input_ids": token_ids(seed=s)} for s in seeds], target, **given)


def noted(write: Callable[..., None], before: Callable[[str], None], path: str, *args: Any, **kwargs: Any) -> None:
    """`write_weights` that notes what it writes, and does something before."""
    WROTE.append(os.path.basename(path))
    before(WROTE[-1])
    write(path, *args, **kwargs)


def begin(
    folder: Path, name: str, size: int, act: Callable[[int], Any], before: dict[int, Callable[[str], None]]
) -> list[int]:
    """Forks into a group's ranks, which write what became of it; gives the processes. Of one process there is no group."""
    children = []
    for rank in range(size):
        child = os.fork()
        if child:
            children.append(child)
            continue
        said, start = "nothing", time.monotonic()
        try:
            write = functools.partial(noted, artifact.write_weights, before.get(rank, lambda file: None))
            artifact.write_weights = dealt.write_weights = write  # type: ignore[assignment]
            if size > 1:
                distributed.init_process_group(
                    "gloo", init_method=f"file://{folder}/{name}.store", rank=rank, world_size=size,
                    timeout=datetime.timedelta(seconds=60),
                )  # fmt: skip
            try:
                act(rank)
            except Exception as e:
                said = f"{type(e).__name__}: {e}"
            found = [said, [f for f in WROTE if f.startswith(("model-", "block-"))], time.monotonic() - start]
            (folder / f"{name}-{rank}.json").write_text(json.dumps(found))
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    return children


def run(folder: Path, name: str, size: int, act: Callable[[int], Any], **before: Callable[[str], None]) -> None:
    """Runs the ranks of a group until all have ended. ``before``: what rank_0, rank_1, ... do before each file."""
    for child in begin(folder, name, size, act, {int(k.removeprefix("rank_")): v for k, v in before.items()}):
        os.waitpid(child, 0)


def die_at(number: int) -> Callable[[str], None]:
    """Kills the process before it writes its file of that number, from 0."""

    def before(file: str) -> None:
        if sum(f.startswith("model-") for f in WROTE) == number + 1:
            os.kill(os.getpid(), signal.SIGKILL)

    return before


def full(file: str) -> None:
    if file.startswith("model-"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def blind(rank: int, act: Callable[[], None]) -> None:
    """Rank 1 is on another machine, which has another disk."""
    if rank == 1:
        seen = os.path.isdir
        directory.os.path.isdir = lambda path: not str(path).endswith(".tmp") and seen(path)  # type: ignore[attr-defined]
    act()


def call_of(checkpoint: str, target: Path, **changes: Any) -> Callable[[int], None]:
    return lambda rank: quantize(checkpoint, target, **changes)


def sizes(checkpoint: str, folder: Path) -> None:
    """One process, and groups, of which one has a limit of memory."""
    run(folder, "native-1", 1, call_of(checkpoint, folder / "native-1"))
    run(folder, "native-2", 2, call_of(checkpoint, folder / "native-2", memory=2**40))


def formats(checkpoint: str, folder: Path) -> None:
    """Other formats and numbers of ranks."""

    go = functools.partial(call_of, checkpoint)
    run(folder, "native-1", 1, go(folder / "native-1"))
    run(folder, "native-3", 3, go(folder / "native-3"))
    run(folder, "blind-2", 2, lambda rank: blind(rank, lambda: quantize(checkpoint, folder / "blind-2")))
    for kind in ("compressed-tensors", "smoothed"):
        for size in (1, 2):
            run(folder, f"{kind}-{size}", size, go(folder / f"{kind}-{size}", format=kind))


def failures(checkpoint: str, folder: Path) -> None:
    """Ranks that are killed as they write, have a full disk, or other batches."""
    go = functools.partial(call_of, checkpoint)
    run(folder, "native-1", 1, go(folder / "native-1"))
    run(folder, "old", 1, go(folder / "old", seeds=(7,)))
    deaths: dict[str, dict[str, Callable[[str], None]]] = {
        "one": {"rank_1": die_at(1)},
        "first": {"rank_0": die_at(1)},
        "all": {"rank_0": die_at(1), "rank_1": die_at(1)},
    }
    for name, before in deaths.items():
        shutil.copytree(folder / "old", folder / name)
        run(folder, f"{name}-cut", 2, go(folder / name), **before)
        (folder / f"{name}.left").write_text(json.dumps(sorted(os.listdir(folder / f"{name}.work"))))
        os.rename(folder / name, folder / f"{name}-before")
        run(folder, f"{name}-on", {"one": 2, "first": 3, "all": 1}[name], go(folder / name))
    run(folder, "full", 2, go(folder / "full"), rank_1=full)
    run(folder, "full-on", 2, go(folder / "full"))
    run(folder, "other", 2, lambda rank: quantize(checkpoint, folder / "other", seeds=(1, 2, 3 + rank)))


def killed(checkpoint: str, folder: Path) -> None:
    """Killed at random moments, one rank or both, and called again."""
    start = time.monotonic()
    run(folder, "whole", 2, lambda rank: quantize(checkpoint, folder / "whole"))
    whole, draw = time.monotonic() - start, random.Random(5)
    for i in range(3):

        def act(rank: int, target: Path = folder / f"{i}") -> None:
            quantize(checkpoint, target)

        children = begin(folder, f"{i}-cut", 2, act, {})
        time.sleep(draw.uniform(0.1, 1) * whole)
        for child in children if i % 3 == 0 else children[i % 3 - 1 :][:1]:
            os.kill(child, signal.SIGKILL)
        print(*(os.waitpid(child, 0)[1] for child in children), flush=True)
        run(folder, f"{i}-on", 2, act)


if __name__ == "__main__":
    torch.set_num_threads(1)  # a forked process has no threads of its parent
    warnings.simplefilter("ignore")
    ranks.BEAT, ranks.SILENT = 0.1, SILENT
    observe.CALLS = 2
    export.save = functools.partial(export.save, most=MOST)  # type: ignore[assignment]
    {f.__name__: f for f in (sizes, formats, failures, killed)}[sys.argv[1]](sys.argv[2], Path(sys.argv[3]))
