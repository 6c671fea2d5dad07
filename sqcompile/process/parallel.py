"""parallel: the processes that hold a model together, each a shard of its weights, and what they tell each other while they plan.

All of them run the same data in step, as the model's own collectives want it. What decides is made of numbers that they have
all seen, so that they decide alike. Each method is a collective: all processes call it, in one order. Before tensors are
exchanged, the processes say through the group's store that they are there (`Watch`): a backend waits for ever for a process
that has failed, or that is at another collective.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from sqcompile.errors import CalibrationError, first_line
from sqcompile.pytorch.distributed import group_name

FAILED = "failed"  # what a process is at that has left an `attempt`


class Elsewhere(CalibrationError):
    """Another process has failed in what all of them attempt."""


class Watch(Protocol):
    """Looks after the processes of a group while they exchange tensors."""

    def tell(self, what: str, text: str = "") -> list[str]:
        """What each process says at this step, by rank.

        Args:
            what: this process is at; others are at the same.
            text: that it says.

        Raises:
            SQCompileError: where another process has failed, is dead, or is at something else.
            Elsewhere: where it is `FAILED`.
        """


_watches: dict[str, Watch] = {}  # by group


@contextlib.contextmanager
def watched(group: Any, watch: Watch) -> Iterator[None]:
    """The processes of a group are looked after, in all threads: PyTorch computes gradients in some of its own."""
    name = group_name(group)
    before = _watches.get(name)
    try:
        _watches[name] = watch
        yield
    finally:
        _watches.pop(name)
        if before is not None:
            _watches[name] = before


@dataclass(frozen=True, eq=False)
class Parallel:
    """The processes of a tensor-parallel group; by default one process, which holds everything.

    Attributes:
        rank, count: of this process in the group, and of all.
        group: of torch.distributed; None for one process.
        dims: of sharded parameters by name: in which dim. A linear's weight [N, K] is sharded by columns of W.t(), in dim 0
            (its outputs), or by rows of W.t(), in dim 1 (its inputs).
    """

    rank: int = 0
    count: int = 1
    group: Any = None
    dims: Mapping[str, int] = field(default_factory=dict)

    def dim(self, linear: str) -> int | None:
        """In which dim a linear's weight is sharded, by the linear's name; None if each process has all of it."""
        return self.dims.get(linear.partition("#")[0])

    def meet(self, what: str) -> None:
        """Waits until all processes are at this collective; at once where nobody looks after them.

        Raises:
            SQCompileError, Elsewhere: as `Watch.tell`.
        """
        if self.count > 1 and (watch := _watches.get(group_name(self.group))):
            watch.tell(what)

    @contextlib.contextmanager
    def attempt(self) -> Iterator[list[str]]:
        """What may fail in one process, and has then failed in all, which go on without it.

        Yields:
            A list, into which an error of any process comes, in words.

        Raises:
            SQCompileError: as `Watch.tell`.
        """
        watch = _watches.get(group_name(self.group)) if self.count > 1 else None
        errors: list[str] = []
        try:
            yield errors
            if watch is not None:
                watch.tell("end")
        except Elsewhere as e:
            errors.append(str(e))
        except Exception as e:
            errors.append(f"{type(e).__name__}: {first_line(e)}")
            if watch is not None:  # it raises where the processes have come to an end, which nothing goes on without
                watch.tell(FAILED, errors[0])

    def every(self, holds: Sequence[bool]) -> list[bool]:
        """Which of some conditions hold in all processes."""
        return [n == 0 for n in self.most([not h for h in holds])]

    def total(self, numbers: Sequence[float]) -> list[float]:
        """The sums over all processes."""
        if self.count == 1:
            return [*numbers]
        return self._reduced(torch.tensor(numbers, dtype=torch.float64), dist.ReduceOp.SUM).tolist()

    def most(self, numbers: Sequence[float]) -> list[float]:
        """The largest of all processes."""
        if self.count == 1:
            return [*numbers]
        return self._reduced(torch.tensor(numbers, dtype=torch.float64), dist.ReduceOp.MAX).tolist()

    def largest(self, x: Tensor) -> Tensor:
        """The largest value of all processes, element by element."""
        return x if self.count == 1 else self._reduced(x, dist.ReduceOp.MAX)

    def summed(self, x: Tensor) -> Tensor:
        """The sum over all processes, element by element."""
        return x if self.count == 1 else self._reduced(x, dist.ReduceOp.SUM)

    def joined(self, x: Tensor) -> Tensor:
        """What all processes have, one after the other along dim 0; of one size on each."""
        if self.count == 1:
            return x
        mine = x.detach().to(self._device()).contiguous()
        self.meet(f"all_gather {mine.dtype} {[*mine.shape]}")
        parts = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(parts, mine, group=self.group)
        return torch.cat(parts).to(x.device)

    def own(self, x: Tensor) -> Tensor:
        """This process's part of what `joined` gives."""
        return x.chunk(self.count)[self.rank] if self.count > 1 else x

    def _reduced(self, x: Tensor, op: Any) -> Tensor:
        found = x.detach().to(self._device(), copy=True).contiguous()
        self.meet(f"all_reduce {found.dtype} {[*found.shape]}")
        dist.all_reduce(found, op, group=self.group)
        return found.to(x.device)

    def _device(self) -> torch.device:
        """Where the group's backend takes tensors."""
        return device_of(self.group)


ALONE = Parallel()


def device_of(group: Any) -> torch.device:
    """Where a group's backend takes tensors: on a GPU the current one, as for PyTorch's own collectives of objects."""
    kinds = [part.partition(":")[0] for part in dist.get_backend_config(group).split(",")]
    return torch.device("cpu" if "cpu" in kinds else kinds[0])
