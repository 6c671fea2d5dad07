"""ranks: what the processes of a torch.distributed group say to each other while they work together.

They are collectives: each rank makes the same calls in the same order. Words go through the group's store, which every
backend has, and where a rank that waits sees at once that another has failed. Tensors go through the group's backend, once
all ranks have said that they are there: NCCL ends a process that waits for a rank which does not come. A thread in each
process counts in the store that it lives; a rank that stops counting is taken for dead.

Ranks of a default group share the batches, what is chosen for each site, and the files that are written; rank 0 makes the
plan for all. Ranks of a tensor-parallel group hold one model together: each runs every batch, and makes the plan of its own
shard, all of them in step (`parallel`).
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import distributed as dist

from sqcompile.errors import CalibrationError, SQCompileError, first_line
from sqcompile.process.interrupts import checkpoint
from sqcompile.process.parallel import FAILED, Elsewhere, device_of, watched

# seconds between two signs of life, and without one until a rank is taken for dead: some parsers let no other thread run
BEAT, SILENT = 0.5, 60.0
_LINGER = 5.0  # seconds for which a rank that has failed stays, so that the others read why: the store may be its own
_SHORTEST, _PAUSE = 1e-4, 0.02  # seconds between two looks into the store, at first and later


class Ranks:
    """A process without a group, to which every batch belongs, and which has nobody to agree with.

    Attributes:
        rank, count: of this process, and of all.
        shares: whether other processes observe a part of the data.
    """

    rank, count, shares = 0, 1, False

    @property
    def plans(self) -> bool:
        """Whether this process makes a plan."""
        return self.first or not self.shares

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def owns(self, batch: int) -> bool:
        """Whether a batch, by its index, counts in this process."""
        return not self.shares or batch % self.count == self.rank

    def check(self) -> None:
        """Raises CalibrationError where another rank has failed or is dead."""

    def agree(self, said: Mapping[str, tuple[str, str]]) -> None:
        """Compares what should be the same on all ranks.

        Args:
            said: a value, and what to do where it differs, by what a rank then has: "another model".

        Raises:
            CalibrationError: where it is not.
        """

    def tell(self, what: str, text: str = "") -> list[str]:
        """What each rank says at this step, by rank; see `Watch.tell`."""
        return [text]

    def to_first(self, data: bytes) -> Iterator[bytes]:
        """What each other rank gives, on rank 0; nothing elsewhere."""
        return iter(())

    def from_first(self, data: bytes) -> bytes:
        """What rank 0 gives."""
        return data

    def done(self) -> None:
        """The ranks need each other no more."""


ALONE = Ranks()


@contextlib.contextmanager
def together(wanted: bool = True, device_mesh: Any = None, group: Any = None) -> Iterator[Ranks]:
    """The ranks of the default process group, if there is one of several processes and they are ``wanted``.

    With a ``device_mesh`` of one dim, those of its group, which is a tensor-parallel one; or those of such a ``group``. Where
    this rank raises an error in it, the others end with a CalibrationError that says so.
    """
    if not wanted or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        yield ALONE
        return
    one_dim = getattr(device_mesh, "ndim", None) == 1 and hasattr(device_mesh, "get_group")  # else it is refused later
    group = device_mesh.get_group() if one_dim else group
    ranks = _Group(group)
    try:
        with contextlib.nullcontext() if group is None else watched(group, ranks):
            yield ranks
        ranks.done()
    except BaseException as e:
        ranks.fail(e)
        raise
    finally:
        ranks.close()


class _Group(Ranks):
    def __init__(self, group: Any = None) -> None:
        """``group``: a tensor-parallel one, in which all ranks observe all data; None for the default one, which shares it."""
        self.shares = group is None
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)
        world = group or dist.group.WORLD
        assert world is not None
        self._store: dist.Store = world.get_group_store()
        # calls that are the k-th on their rank belong together, as those of collectives do
        self._run = f"sqcompile/{self._store.add(f'sqcompile/runs/{self.rank}', 1)}"
        self._began, self._steps = time.monotonic(), 0
        self._why: str | None = None  # why this calibration ends
        self._dead: set[int] = set()
        self._over = threading.Event()
        self._store.add(self._key("beat", self.rank), 1)
        self._watch = threading.Thread(target=self._watch_others, name="sqcompile ranks", daemon=True)
        self._watch.start()

    def check(self) -> None:
        if self._why is not None:
            raise CalibrationError(self._why)

    def agree(self, said: Mapping[str, tuple[str, str]]) -> None:
        first, *others = map(json.loads, self.tell("agree", json.dumps({k: v for k, (v, _) in said.items()})))
        for rank, other in enumerate(others, 1):
            for what, (_, advice) in said.items():
                if other.get(what) != first.get(what):
                    self._why = self._why or f"rank {rank} has {what} than rank 0: {advice}"
        self.check()

    def to_first(self, data: bytes) -> Iterator[bytes]:
        sizes = [int(text) for text in self.tell("to first", str(len(data)))]
        for rank in range(1, self.count):
            found = self._sent(data if rank == self.rank else None, sizes[rank], rank)
            if self.first:
                yield found

    def from_first(self, data: bytes) -> bytes:
        size = int(self.tell("from first", str(len(data)))[0])
        return self._sent(data if self.first else None, size, 0)

    def done(self) -> None:
        if self._over.is_set():
            return
        with self._answering():
            self._store.set(self._key("done", self.rank), "")
            for rank in range(self.count if self.first else 0):  # the store may be rank 0's, which leaves last
                self._wait_for("done", rank)
        self.close()

    def fail(self, error: BaseException) -> None:
        """Says why this rank leaves, and stays until the others that are there know."""
        if self._over.is_set():
            return
        words = str(error) if isinstance(error, SQCompileError) else f"{type(error).__name__}: {error}"
        words = " ".join(words.split()).rstrip(": ")
        with contextlib.suppress(RuntimeError):  # a store that has ended
            if self._store.add(self._key("failing"), 1) == 1:
                why = words if words == self._why else f"rank {self.rank} failed: {words}"
                self._store.set(self._key("failed"), why)
            self._store.set(self._key("knows", self.rank), "")
            end = time.monotonic() + _LINGER
            while time.monotonic() < end and not all(self._is_told(r) for r in range(self.count)):
                time.sleep(_PAUSE)

    def close(self) -> None:
        """Ends the thread."""
        self._over.set()
        self._watch.join(_LINGER)

    def _key(self, *parts: object) -> str:
        return "/".join([self._run, *map(str, parts)])

    def _has(self, *parts: object) -> bool:
        return self._store.check([self._key(*parts)])

    def _is_told(self, rank: int) -> bool:
        gone = rank in self._dead or self._has("done", rank)
        return gone or self._has("knows", rank) or not self._has("beat", rank)

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        """What the store raises meanwhile is a CalibrationError."""
        try:
            yield
        except SQCompileError:
            raise
        except RuntimeError as e:
            raise CalibrationError(_storeless(e)) from e

    def tell(self, what: str, text: str = "") -> list[str]:
        self._steps += 1
        with self._answering():
            self._store.set(self._key(self._steps, self.rank), f"{what}\n{text}")
            found = [self._wait_for(self._steps, rank).partition("\n") for rank in range(self.count)]
            if self._steps > 1:  # which all have read that are at this step
                self._store.delete_key(self._key(self._steps - 1, self.rank))
        failed = next((rank for rank, (at, *_) in enumerate(found) if at == FAILED), None)
        if failed is not None and what != FAILED:
            raise Elsewhere(f"rank {failed} failed: {' '.join(found[failed][2].split())}")
        for rank, (at, *_) in enumerate(found if failed is None else ()):
            if at != found[0][0]:
                self._why = self._why or (
                    f"rank {rank} is at {at!r} and rank 0 at {found[0][0]!r}: pass every rank the same model, data and options"
                )
        self.check()
        return [said for *_, said in found]

    def _wait_for(self, step: object, rank: int) -> str:
        """What a rank says at a step."""
        most = self._store.timeout.total_seconds()  # type: ignore[attr-defined]  # of init_process_group
        pause = _SHORTEST
        while not self._has(step, rank):
            checkpoint()
            self.check()
            if time.monotonic() > self._began + most and not self._has("beat", rank):
                self._why = (
                    f"rank {rank} has not begun in {most:g} s: every rank of a process group makes the same calls of "
                    "sqcompile, such as calibrate, with the same model and data"
                )
            time.sleep(pause)
            pause = min(2 * pause, _PAUSE)
        return self._store.get(self._key(step, rank)).decode()

    def _sent(self, data: bytes | None, size: int, source: int) -> bytes:
        """The bytes that a rank sends to all; ``data`` where it is this one."""
        if not size:
            return b""
        device = device_of(None)
        if data is None:
            tensor = torch.empty(size, dtype=torch.uint8, device=device)
        else:
            tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
        try:
            dist.broadcast(tensor, source)
            return data if data is not None else tensor.cpu().numpy().tobytes()
        except RuntimeError as e:
            end = time.monotonic() + SILENT + 4 * BEAT
            while time.monotonic() < end:  # the backend does not say which rank is dead: who is silent does
                checkpoint()
                self.check()
                time.sleep(_PAUSE)
            raise CalibrationError(f"the ranks cannot exchange their statistics: {first_line(e)}") from e

    def _watch_others(self) -> None:
        """Runs in a thread: shows that this process lives, and looks whether the others do."""
        heard: dict[int, tuple[bytes, float]] = {}
        try:
            while not self._over.wait(BEAT):
                self._store.add(self._key("beat", self.rank), 1)
                if self._has("failed"):
                    self._why = self._why or self._store.get(self._key("failed")).decode()
                    self._store.set(self._key("knows", self.rank), "")
                for rank in range(self.count):
                    if rank == self.rank or not self._has("beat", rank) or self._has("done", rank):
                        continue
                    beat, now = self._store.get(self._key("beat", rank)), time.monotonic()
                    if rank not in heard or heard[rank][0] != beat:
                        heard[rank] = beat, now
                    elif now - heard[rank][1] > SILENT:
                        self._dead.add(rank)
                        self._why = self._why or f"rank {rank} has ended: it gave no sign of life for {SILENT:g} s"
        except RuntimeError as e:
            self._why = self._why or _storeless(e)


def _storeless(e: RuntimeError) -> str:
    return (
        "rank 0, or the launcher that keeps the process group's store in its place, has ended: the store does not answer, "
        f"{first_line(e)}"
    )
