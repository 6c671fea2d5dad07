"""replay: a step of `State` as one CUDA graph.

    step 1 of a call     runs as the model's own call: compiled graphs look whether weights have changed
    step 2 and 3         run, too, if nothing is recorded yet: kernels are compiled and chosen by then
    step 4               is recorded, and replayed
    step 5, ...          are replayed

The compiled graphs' own recordings are left out meanwhile: one graph cannot be recorded into another. What a recording
uses is kept with it: the state's tensors, INT8 weights. It is made again where weights lie elsewhere or have changed.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sqcompile.backend.cuda_graphs import NotRecorded, Pool, not_recorded
from sqcompile.backend.session import graphs_of
from sqcompile.backend.weights import states
from sqcompile.errors import first_line
from sqcompile.generation.models import ways_to_call
from sqcompile.generation.settings import Kind

log = logging.getLogger("sqcompile")

_WARM = 3  # steps of a kind before one is recorded


@dataclass(frozen=True)
class Recorded:
    """A recorded step.

    Attributes:
        weights: the model's tensors that it reads: versions and addresses.
        graphs: the compiled graphs that it is of, which keep their INT8 weights.
        ways: what calling the model ran.
        replay: runs it.
    """

    weights: tuple[list[int], list[int]]
    graphs: frozenset[Hashable]
    ways: tuple[Any, ...]
    replay: Callable[[], None]

    def holds(self, net: nn.Module, model: nn.Module) -> bool:
        """Whether the model is what it was."""
        now = graphs_of(model)
        same = now is not None and self.graphs <= now and self.ways == ways_to_call(net)
        return same and self.weights == _weights(model)


class Replays:
    """The recorded steps of one `State`, which is on a GPU.

    Attributes:
        generator: what steps draw from: a call's own one lends it its state, so that another one needs no other recording.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = Pool(device)
        self.generator = torch.Generator(device)
        self._recorded: dict[Kind, Recorded] = {}
        self._warm: dict[Kind, int] = {}
        self._refused: set[Kind] = set()

    @contextlib.contextmanager
    def call(self, model: nn.Module, generator: torch.Generator | None) -> Iterator[None]:
        """One call of `generate`, which draws from ``generator``: what is recorded of other weights is dropped."""
        for kind, found in list(self._recorded.items()):
            if found.weights != _weights(model):  # before INT8 weights are made again: there may be no room for both
                self._drop(kind)
        lender = generator if generator is not None else default_generator(self.device)
        self.generator.set_state(lender.get_state())
        try:
            yield
        finally:
            lender.set_state(self.generator.get_state())

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """On the stream that steps are recorded on; the caller's own goes on when it is done."""
        before = torch.cuda.current_stream(self.device)
        self.pool.stream.wait_stream(before)
        try:
            with torch.cuda.stream(self.pool.stream):
                yield
        finally:
            before.wait_stream(self.pool.stream)

    def step(self, i: int, step: Callable[[], None], net: nn.Module, model: nn.Module, kind: Kind) -> None:
        """Runs the step that is the ``i``-th of a call, or replays it."""
        found = self._recorded.get(kind)
        if i == 1 and found is not None and not found.holds(net, model):
            self._drop(kind)
            found = None
        if i and found is not None:
            found.replay()
            return
        with not_recorded():
            if (
                i
                and self._warm.get(kind, 0) >= _WARM
                and kind not in self._refused
                and self._record(step, net, model, kind)
            ):
                return
            step()
            self._warm[kind] = self._warm.get(kind, 0) + 1

    def _drop(self, kind: Kind) -> None:
        del self._recorded[kind]
        self._warm[kind] = 0

    def _record(self, step: Callable[[], None], net: nn.Module, model: nn.Module, kind: Kind) -> bool:
        """Records the step and runs it; False if nothing has run."""
        graphs = graphs_of(model)
        if graphs is None:  # it calibrates itself, and looks at what it computes
            return False
        draws = [self.generator] if kind.sample else []
        state = self.generator.get_state()
        try:
            _, replay = self.pool.record(step, draws)
        except NotRecorded as e:
            warnings.warn(
                f"a step of sqcompile.generate cannot be recorded as a CUDA graph ({first_line(e.__cause__ or e)}): tokens are "
                "right, and take as long as with model.generate",
                stacklevel=2,
            )
            self._refused.add(kind)
            for other in list(self._recorded):  # they draw from the generator that is given up here
                self._drop(other)
            self.generator = torch.Generator(self.device)  # the old one may still take itself for recorded
            self.generator.set_state(state)
            return False
        log.debug("a step of generate is recorded as a CUDA graph")
        self._recorded[kind] = Recorded(_weights(model), graphs, ways_to_call(net), replay)
        return True


def default_generator(device: torch.device) -> torch.Generator:
    """What operations on a device draw from if nobody says."""
    if device.type != "cuda":
        return torch.default_generator
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


def _weights(model: nn.Module) -> tuple[list[int], list[int]]:
    return states([*model.parameters(), *model.buffers()])
