"""runs: a model is called, in eval mode, without gradients, on its own device, by the clock; and left as it was."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sqcompile.capture.inputs import Call, Forward
from sqcompile.compiled.emit import CompiledModel
from sqcompile.errors import EvaluationError, SQCompileError, first_line
from sqcompile.evaluation.streamed import Streamed
from sqcompile.process.interrupts import checkpoint
from sqcompile.pytorch.core import pytree


def original(model: nn.Module) -> nn.Module:
    """The module that torch.compile was given, the float model that is streamed, or the model itself."""
    if isinstance(model, Streamed):
        return model.source or model
    from sqcompile.pytorch.dynamo import OptimizedModule  # here, as Dynamo imports triton
    from sqcompile.pytorch.dynamo import original as of

    return of(model) if isinstance(model, OptimizedModule) else model


def forward_of(model: nn.Module) -> Forward:
    """How a model is called."""
    return model.call if isinstance(model, (CompiledModel, Streamed)) else Forward.of(original(model))


@contextlib.contextmanager
def evaluating(models: Sequence[nn.Module]) -> Iterator[None]:
    """Has models in eval mode meanwhile. Modes are set where they differ alone: Dynamo would compile again."""
    before = [(m, m.training) for model in models for m in original(model).modules() if m.training]
    try:
        for m, _ in before:
            m.training = False
        yield
    finally:
        for m, mode in before:
            m.training = mode


class Run:
    """A model, called on one batch after another.

    Attributes:
        device: where it runs, which is where its first tensor is, unless it is streamed; batches are moved there.
    """

    def __init__(self, model: nn.Module, what: str) -> None:
        """``what`` is what messages call it."""
        self.model, self.what = model, what
        of = original(model)
        tensors = (t for ts in (of.parameters(), of.buffers()) for t in ts)
        here = next((t.device for t in tensors), torch.device("cpu"))
        self.device = model.device if isinstance(model, Streamed) else here
        self._parameters = forward_of(model).signature.parameters
        self._speeds: list[float] = []
        self._sizes: set[tuple[torch.Size, ...]] = set()  # of the tensors of calls so far

    def __call__(self, call: Call, tokens: int, batch: int) -> Any:
        """The model's output.

        Raises:
            EvaluationError: if the model refuses the call. Errors of sqcompile stay what they are, and so does
                torch.OutOfMemoryError.
        """
        checkpoint()
        args, kwargs = self._arguments(call)
        leaves = pytree.tree_leaves((args, kwargs))
        start = self._now()
        try:
            out = self.model(*args, **kwargs)
        except (SQCompileError, torch.OutOfMemoryError):
            raise
        except Exception as e:
            raise EvaluationError(f"{self.what} refuses batch {batch}: {type(e).__name__}: {first_line(e)}") from e
        seconds, sizes = self._now() - start, tuple(x.shape for x in leaves if isinstance(x, Tensor))
        if tokens and sizes in self._sizes:  # a model may be compiled for sizes that it has not met
            self._speeds.append(tokens / max(seconds, 1e-9))
        self._sizes.add(sizes)
        return out

    def outputs(self, calls: Iterable[tuple[Call, int]]) -> Iterator[Any]:
        """The outputs of calls, each with the number of its tokens, one after the other; errors as of one."""
        if not isinstance(self.model, Streamed):
            for i, (call, tokens) in enumerate(calls):
                yield self(call, tokens, i)
            return
        bound = []
        for i, (call, _) in enumerate(calls):
            args, kwargs = self._arguments(call)
            try:
                bound.append(self.model.call.bind(args, kwargs))
            except TypeError as e:
                raise EvaluationError(f"{self.what} refuses batch {i}: {e}") from e
        if bound:
            yield from self.model.run(bound, self.what)

    def _arguments(self, call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the model is called with."""
        call = call.to(self.device)
        args, kwargs = call.args, dict(call.kwargs)
        # as the model is captured: a KV cache is not for windows that are read whole
        default = {n: p.default for n, p in self._parameters.items()}
        fixed = {"use_cache": False} if "use_cache" in self._parameters and "use_cache" not in kwargs else {}
        first = [next(of.pop(n) for of in (kwargs, fixed, default) if n in of) for n in call.positional]
        return (*first, *args), {**kwargs, **fixed}

    def speed(self) -> float | None:
        """Median tokens a second over the batches but the first of each size; None if there are no others."""
        return statistics.median(self._speeds) if self._speeds else None

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
