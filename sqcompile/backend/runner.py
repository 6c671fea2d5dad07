"""runner: a compiled graph that knows which weights it was compiled with, and looks at every call whether they are."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.backend.capture import Template, attach, write_back
from sqcompile.backend.cuda_graphs import Recorder
from sqcompile.backend.session import Session, quantized_only, states
from sqcompile.calibrate import Observer
from sqcompile.compile import rewrite
from sqcompile.errors import CaptureError, StageError
from sqcompile.inductor import compile_regions, compile_without_constants, flatten, inductor, with_layout
from sqcompile.inputs import Call, token_mask
from sqcompile.passes.attention_chains import find_attentions
from sqcompile.passes.shared import held
from sqcompile.recipe import resolve_recipe

GRAD = (
    "backend 'smoothquant' computes no gradients, and this call asks for them: call the model under torch.no_grad() or "
    "torch.inference_mode()"
)


class Bound:
    """A graph with one set of weights.

    Attributes:
        run: takes the arguments at ``used``.
        keep: INT8 weights shared with other graphs.
    """

    def __init__(self, tensors: list[Tensor], run: Callable[..., Any], used: list[int], keep: list[Any]) -> None:
        """``tensors``: the model's tensors it was made from; none is kept alive."""
        self.tensors = [weakref.ref(t) for t in tensors]
        self.states = states(tensors)
        self.run, self.used, self.keep = run, used, keep

    def fits(self, tensors: list[Tensor]) -> bool:
        """At every call, so in few Python operations: some 0.2 µs a tensor."""
        return (
            all(map(operator.is_, map(weakref.ref.__call__, self.tensors), tensors)) and states(tensors) == self.states
        )

    def alive(self) -> bool:
        tensors = [t for ref in self.tensors if (t := ref()) is not None]
        return len(tensors) == len(self.tensors) and states(tensors) == self.states


class Runner:
    """What Dynamo calls in place of its graph.

    Attributes:
        observer: the graph in float with its statistics, while the session has no plan.
    """

    def __init__(self, session: Session, template: Template, examples: Sequence[Any], names: Sequence[str]) -> None:
        """``examples`` and ``names`` are of Dynamo's arguments."""
        self.session, self.template = session, template
        self.observer: Observer | None = None
        written = set(template.updates)
        self.constants = [
            i for i, x in enumerate(examples) if i not in written and isinstance(x, Tensor) and self._is_constant(x)
        ]
        self.fallback = list(names)
        self.needs_grad = any(examples[i].requires_grad for i in self.constants)
        self.bound: list[Bound] = []
        self.code: dict[str, Callable[..., Any]] = {}
        self.binds = 0
        if session.plan is not None:
            self._bind([examples[i] for i in self.constants], guarded=True)
        session.runners.add(self)

    def __call__(self, *args: Any) -> Any:
        """Runs the graph.

        Raises:
            CaptureError: if gradients are asked for.
        """
        if torch.is_grad_enabled() and asks_for_gradients(args):
            raise CaptureError(GRAD)
        tensors = [args[i] for i in self.constants]
        if self.session.plan is None:
            self.session.step(self)
            if self.session.plan is None:
                return self._observe(args, tensors)
        bound = next((b for b in self.bound if b.fits(tensors)), None) or self._bind(tensors)
        with torch.no_grad():
            return bound.run(*[args[i] for i in bound.used])

    def _is_constant(self, x: Tensor) -> bool:
        return isinstance(x, torch.nn.Parameter) or bool(self.session.names(x))

    def _bind(self, tensors: list[Tensor], guarded: bool = False) -> Bound:
        """Rewrites and compiles the graph for these weights; graphs of weights that are no more are dropped."""
        session = self.session
        assert session.plan is not None
        self.bound = [b for b in self.bound if b.alive()]
        self.observer = None
        traced = self._attach(tensors)
        lowered = rewrite(traced, session.plan, session.options.stage, session.shared)
        read = {str(n.target) for n in lowered.graph.find_nodes(op="get_attr")}
        for name, t in zip(self._names(tensors), tensors, strict=True):
            if name in read and session.is_freed(t):
                raise StageError(f"a graph reads {name} in float, and free_float=True has freed it: compile without it")
        freed = quantized_only(traced, lowered, session.plan) if session.options.free_float else set()
        del traced
        keep = held(lowered)
        run, used = self._emit(lowered, guarded, tensors)
        session.free(t for name, t in zip(self._names(tensors), tensors, strict=True) if name in freed)
        self.bound.insert(0, Bound(tensors, run, used, keep))
        return self.bound[0]

    def _attach(self, tensors: list[Tensor]) -> fx.GraphModule:
        session = self.session
        constants: dict[int, tuple[str, Tensor]] = {}
        for i, name, t in zip(self.constants, self._names(tensors), tensors, strict=True):
            own: Any = t.detach()
            own._sqcompile_source = session.source(t)
            constants[i] = name, own
        constants |= {len(self.fallback) + i: (f"held_{i}", t) for i, t in enumerate(self.template.held)}
        return attach(self.template, constants, session.aliases())

    def _names(self, tensors: list[Tensor]) -> list[str]:
        names = [self.session.names(t) for t in tensors]
        return [found[0] if found else self.fallback[i] for i, found in zip(self.constants, names, strict=True)]

    def _emit(
        self, lowered: fx.GraphModule, guarded: bool, tensors: list[Tensor]
    ) -> tuple[Callable[..., Any], list[int]]:
        arguments = lowered.meta["arguments"]
        flat, used = flatten(write_back(lowered))
        positions = [arguments[i] for i in used]
        run = self._compile(flat, guarded)
        devices = {t.device for t in tensors if t.is_cuda}
        if self.session.options.mode == "reduce-overhead" and len(devices) == 1:  # a CUDA graph is of one device
            written = [i for i, position in enumerate(positions) if position in self.template.updates]
            run = Recorder(run, written, self.session.pool(devices.pop()))
        return run, positions

    def _compile(self, flat: fx.GraphModule, guarded: bool) -> Callable[..., Any]:
        if self.session.options.compiler == "eager":
            return flat
        self.binds += 1
        if self.session.options.regional:
            return compile_regions(flat, guarded)
        if self.binds > 1:  # a layer that is compiled alone, or changed weights: there will be more
            return compile_without_constants(flat, self.code, guarded)
        return with_layout(inductor(flat, guarded), flat)

    def _observe(self, args: Sequence[Any], tensors: list[Tensor]) -> Any:
        """The call in float; statistics of weights that have changed are dropped."""
        if self.observer is None:
            traced = self._attach(tensors)
            quantizes = resolve_recipe(self.session.options.recipe).attention != "none"
            self.observer = Observer(traced, find_attentions(traced) if quantizes else [])
            self.updates = self.observer.module.meta["updates"]  # type: ignore[index]
        gm: Any = self.observer.module
        leaves = [args[i] for i in gm.meta["arguments"]]
        masks = [args[i] for i, name in enumerate(self.fallback) if "attention_mask" in name]
        mask = token_mask(Call((), {"attention_mask": masks[0]})) if len(masks) == 1 else None
        results = self.observer.batch(leaves, mask)
        with torch.no_grad():
            for position, new in zip(self.template.updates, results, strict=False):
                args[position].copy_(new)
        return results[len(self.template.updates) :]


def asks_for_gradients(args: Sequence[Any]) -> bool:
    return any(isinstance(a, Tensor) and a.requires_grad for a in args)
