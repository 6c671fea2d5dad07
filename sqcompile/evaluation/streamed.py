"""streamed: a model in a directory, which need not fit in memory. Its weights are read, and packed, as they are used.

out/ (INT8)     the lowered graph; a packed weight is made when its piece of the graph runs, and dropped with the piece
model/ (float)  the graph that is traced from the model of `open_checkpoint`, over its files
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from sqcompile.capture.captured import contiguous, flatten_like
from sqcompile.capture.inputs import Call, Forward
from sqcompile.capture.traced_call import traced_call
from sqcompile.checkpoints.float_model import Checkpoint
from sqcompile.errors import EvaluationError, SQCompileError, first_line
from sqcompile.loading import is_saved, unpacked
from sqcompile.models import device_named, device_of
from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import value
from sqcompile.passes.ir.lazy import Weights
from sqcompile.passes.ir.pieces import Stepped, run_in_pieces
from sqcompile.passes.ir.placed import placed
from sqcompile.plan.plan import Plan
from sqcompile.process.interrupts import checkpoint
from sqcompile.process.lock import analysing, compiling
from sqcompile.process.progress import part
from sqcompile.pytorch.core import pytree


class Streamed(nn.Module):
    """The model of a directory. All calls of it run through one piece of its graph after the other.

    Attributes:
        call: how it is called.
        plan: of a model in INT8; None of a float one.
        source: the float model, whose parameters lie in the files; None of a model in INT8.
        device: where it runs.
    """

    def __init__(self, folder: str | os.PathLike[str], device: str | torch.device | None = None) -> None:
        """``device``: where to run it; None for where it was saved, or for the CPU.

        Raises:
            SQCompileError: as `sqcompile.load` and `open_checkpoint`.
        """
        super().__init__()
        self.plan: Plan | None = None
        self._source: list[nn.Module] = []  # no submodule: this is no owner of its parameters
        self._graph: list[fx.GraphModule] = []
        name = os.fsdecode(folder)
        if os.path.isdir(name) and is_saved(name):
            gm, self.call, self.plan = unpacked(name, device)
            self._graph.append(gm)
            self.device = next(value(n).device for n in gm.graph.find_nodes(op="get_attr"))
        else:
            self.device = device_named(device) or torch.device("cpu")
            self._source.append(Checkpoint.open(name).load())  # whose weights are copied to the device as they are used
            self.call = Forward.of(self._source[0])
        self.eval()

    @property
    def source(self) -> nn.Module | None:
        return self._source[0] if self._source else None

    def run(self, calls: Sequence[Call], what: str) -> Iterator[Any]:
        """The outputs of calls, one after the other: all of them are run through all pieces but the last first.

        Args:
            calls: on the model's device, as `Forward.bind` gives them.
            what: what messages call the model.

        Raises:
            EvaluationError: if the model refuses a call. Errors of sqcompile stay what they are, and so does
                torch.OutOfMemoryError.
        """
        gm = self._traced(calls[0])
        first = _Step(gm, what)
        steps = [first.of(i) for i in range(len(calls))]
        arguments = [contiguous(flatten_like(call, about(gm).calls)) for call in calls]
        with part("layers", 100) as percent:
            outs = run_in_pieces(steps, arguments, lambda i, count: percent(100 * i // count))
        return (pytree.tree_unflatten([*out], about(gm).out_spec) for out in outs)

    def _traced(self, call: Call) -> fx.GraphModule:
        """The graph; of a float model, the one that is traced at the first call."""
        if not self._graph:
            with analysing(self._source[0]), compiling():
                model = self._source[0]
                traced = traced_call(model, call.to(device_of(model)), "auto", self.call)[0]
                self._graph.append(traced if self.device == device_of(model) else placed(traced, self.device))
        return self._graph[0]


class _Step(Stepped):
    """One call."""

    def __init__(self, gm: fx.GraphModule, what: str) -> None:
        super().__init__(gm)
        self.extra_traceback = False
        self.weights, self.what, self.index = Weights(gm), what, 0

    def of(self, index: int) -> _Step:
        """The same of a batch: weights are common to all."""
        step = copy.copy(self)
        step.index = index
        return step

    def fetch_attr(self, target: str) -> Any:
        return self.weights.get(target)

    def run_node(self, n: fx.Node) -> Any:
        checkpoint()
        return super().run_node(n)

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        try:
            yield
        except (SQCompileError, torch.OutOfMemoryError, OSError):
            raise
        except Exception as e:
            raise EvaluationError(f"{self.what} refuses batch {self.index}: {type(e).__name__}: {first_line(e)}") from e
