"""bound: a graph of Dynamo with one set of weights, compiled or observed. It knows which weights it was made for."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from sqcompile.backend.floats import Floats
from sqcompile.backend.session import Session
from sqcompile.backend.weights import states, storage_of
from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import state
from sqcompile.process.samples import Samples
from sqcompile.pytorch.core import storage_expired
from sqcompile.statistics.observer import Observer


class Weights:
    """The model's tensors that a graph was made for, none of which is kept alive.

    Attributes:
        session: of the model that they belong to.
    """

    def __init__(self, session: Session, tensors: list[Tensor]) -> None:
        self.session = session
        self.tensors = [weakref.ref(t) for t in tensors]
        self.states = states(tensors)
        self.storages = [storage_of(t) for t in tensors]
        self._ids = [s.cdata for s in self.storages if s is not None]

    def fits(self, tensors: list[Tensor]) -> bool:
        """At every call, so in few Python operations: some 0.25 µs a tensor."""
        return (
            all(map(operator.is_, map(weakref.ref.__call__, self.tensors), tensors))
            and states(tensors) == self.states
            and not self._moved()
        )

    def alive(self) -> bool:
        tensors = [t for ref in self.tensors if (t := ref()) is not None]
        return len(tensors) == len(self.tensors) and states(tensors) == self.states and not self._moved()

    def _moved(self) -> bool:
        """Whether the memory of a tensor has been freed, whoever has it now."""
        return any(map(storage_expired, self._ids))

    def changed(self, tensors: list[Tensor]) -> list[int]:
        """Which of the tensors have been written to, none if they are others."""
        if self._moved() or any(ref() is not t for ref, t in zip(self.tensors, tensors, strict=True)):
            return []
        before = zip(*self.states, strict=True)
        return [i for i, (old, t) in enumerate(zip(before, tensors, strict=True)) if old != state(t)]

    def counted(self, i: int, tensor: Tensor) -> bool:
        """Whether a tensor has other values than then, and not only another dtype, place or device, as after ``.to()``."""
        return self.states[0][i] != state(tensor)[0]


class Bound(Weights):
    """A graph rewritten and compiled for one set of weights.

    Attributes:
        calls: how many there were.
        run: takes the arguments at ``used``.
        keep: INT8 weights shared with other graphs.
    """

    def __init__(
        self, session: Session, tensors: list[Tensor], run: Callable[..., Any], used: list[int], keep: list[Any]
    ) -> None:
        super().__init__(session, tensors)
        self.run, self.used, self.keep = run, used, keep
        self.calls = 0
        self.samples = Samples(tensors, self.storages)

    def fits(self, tensors: list[Tensor]) -> bool:
        if not super().fits(tensors):
            return False
        if self.samples.hold(tensors):
            return True
        self.session.touch(tensors)
        return False

    def __call__(self, args: Sequence[Any]) -> Any:
        self.calls += 1
        with torch.no_grad():
            return self.run(*[args[i] for i in self.used])


class Observed(Weights):
    """A graph in float and what it has seen with one set of weights, while the session has no plan."""

    def __init__(
        self, session: Session, tensors: list[Tensor], observer: Observer, written: Sequence[int], floats: Floats
    ) -> None:
        """``written``: positions of the arguments that are written to."""
        super().__init__(session, tensors)
        self.observer, self.written, self.floats = observer, written, floats
        # of what a call of the model runs once at most
        self.names: set[Hashable] = {l.name for l in observer.linears} or {id(self)}

    def __call__(self, args: Sequence[Any]) -> Any:
        gm: Any = self.observer.module
        results = self.observer.batch([args[i] for i in about(gm).arguments])
        with torch.no_grad():
            for position, new in zip(self.written, results, strict=False):
                args[position].copy_(new)
        self.floats.add(self.names)
        return results[len(self.written) :]
