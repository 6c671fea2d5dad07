"""runner: a compiled graph, which checks at every call that the weights are still those it was compiled for."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.backend.bound import Bound, Observed
from sqcompile.backend.capture import Template, attach, refuse_writes, write_back
from sqcompile.backend.cuda_graphs import Recorder
from sqcompile.backend.floats import Floats
from sqcompile.backend.options import Options
from sqcompile.backend.self_calibration import step
from sqcompile.backend.session import Session, session_of, sweep
from sqcompile.backend.sharded import renamed
from sqcompile.backend.weights import is_freed, source
from sqcompile.capture.captured import asks_for_gradients
from sqcompile.capture.names import refuse_names
from sqcompile.compiled.inductor import compile_regions, compile_without_constants, inductor, with_layout
from sqcompile.compiled.results import with_own_results
from sqcompile.errors import CaptureError, StageError
from sqcompile.passes.attention.chains import find_attentions
from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.flat import flatten
from sqcompile.passes.ir.graph import above, find_linears, first_leaf, nodes_by_name
from sqcompile.passes.planning.finite import check_weights
from sqcompile.passes.planning.stay_float import wanted
from sqcompile.passes.rewrite.weight_store import held
from sqcompile.pipeline import rewrite
from sqcompile.plan.plan import Plan
from sqcompile.plan.recipe import resolve_recipe
from sqcompile.plan.shards import check_given
from sqcompile.process.lock import compiling
from sqcompile.process.parallel import ALONE, Parallel
from sqcompile.process.progress import stages
from sqcompile.process.ranks import together
from sqcompile.statistics.observer import Observer

GRAD = (
    "backend 'smoothquant' computes no gradients, and this call asks for them: call the model under torch.no_grad() or "
    "torch.inference_mode()"
)

_MOST_WASTED = 4


class Runner:
    """What Dynamo calls in place of its graph. Models of one class share it: Dynamo looks at code, not at modules.

    Attributes:
        bound: the compiled graphs, the newest first.
        retired: those with other arguments than now, which hold INT8 weights until their model's next graph has them.
        observed: the graphs in float of the sessions that have no plan yet.
    """

    def __init__(
        self,
        session: Session,
        options: Options,
        template: Template,
        examples: Sequence[Any],
        names: Sequence[str],
        parallel: Parallel = ALONE,
    ) -> None:
        """``session`` is of the model at hand; ``examples``, ``names`` and ``parallel.dims`` are of Dynamo's arguments."""
        self.parallel = parallel
        self.options, self.template, self.fallback = options, template, list(names)
        refuse_writes(template, examples, lambda i: next(iter(session.names(examples[i])), names[i]))
        written = set(template.updates)
        self.constants = [
            i
            for i, x in enumerate(examples)
            if i not in written and (isinstance(x, torch.nn.Parameter) or (isinstance(x, Tensor) and session.names(x)))
        ]
        self.bound: list[Bound] = []
        self.retired: list[Bound] = []
        self.observed: list[Observed] = []
        self.code: dict[str, Callable[..., Any]] = {}
        self.binds = 0
        self.wasted = 0  # the last graphs in a row that were compiled for one call
        self.floats = Floats(options.calibration_steps)  # of models that are not found
        if session.plan is not None:
            self._bind(session, [examples[i] for i in self.constants], guarded=True)

    def __call__(self, *args: Any) -> Any:
        """Runs the graph.

        Raises:
            CaptureError: if gradients are asked for.
        """
        if asks_for_gradients(args):
            raise CaptureError(GRAD)
        tensors = [args[i] for i in self.constants]
        found: Bound | Observed | None = next((b for b in self.bound if b.fits(tensors)), None)
        return (found or self._enter(args))(args)

    def _enter(self, args: Sequence[Any]) -> Bound | Observed:
        """What serves weights that no compiled graph was made for, or that another thread has made one for meanwhile."""
        with compiling():
            tensors = [args[i] for i in self.constants]
            found = next((b for b in self.bound if b.fits(tensors)), None) or self._found(args, tensors)
            self.bound = [b for b in self.bound if not b.session.over]
            sweep()
            return found

    def _found(self, args: Sequence[Any], tensors: list[Tensor]) -> Bound | Observed:
        observed = next((o for o in self.observed if o.fits(tensors)), None)
        session = observed.session if observed else session_of(tensors, self.options)
        if session.plan is None:
            if observed is None:
                observed = self._observe(session, tensors)
            step(session, observed, _observed_of(session))
            if session.plan is None:
                observed.floats.check(observed.names)
                return observed
        changed = self.bound[0].changed(tensors) if self.bound else []
        if any(isinstance(tensors[i], torch.nn.Parameter) and self.bound[0].counted(i, tensors[i]) for i in changed):
            session.warn_of_static_scales()
        if changed and self._release(changed, tensors, session):
            tensors = [args[i] for i in self.constants]
        return self._bind(session, tensors)

    def held_for(self, session: Session) -> list[Hashable]:
        """The graphs that are compiled for a session now."""
        return [b for b in self.bound if b.session is session]

    def forget(self, session: Session, compiled: bool) -> None:
        """Drops what was observed for a session, and, if told so, what was compiled."""
        self.observed = [o for o in self.observed if o.session is not session]
        if compiled:
            self.bound = [b for b in self.bound if b.session is not session]
            self.retired = [b for b in self.retired if b.session is not session]

    def _release(self, changed: list[int], tensors: list[Tensor], session: Session) -> bool:
        """Makes inputs of buffers that are written to between calls, such as counters, unless weights are made of them."""
        buffers = [i for i in changed if not isinstance(tensors[i], torch.nn.Parameter)]
        if not buffers:
            return False
        names = self._names(session, tensors)
        weights = _parameters(self._attach(session, tensors, names))
        inputs = {self.constants[i] for i in buffers if names[i] not in weights}
        self.constants = [i for i in self.constants if i not in inputs]
        if inputs:
            self.retired, self.bound, self.observed = self.retired + self.bound, [], []
        return bool(inputs)

    def _bind(self, session: Session, tensors: list[Tensor], guarded: bool = False) -> Bound:
        """Rewrites and compiles the graph for these weights; graphs of weights that are no more are dropped."""
        session.runners.add(self)
        session.warn_of_uncounted(tensors)
        passes = ("fold", "insert_qdq", "lower", "emit")
        parallel = self.parallel
        with (
            together(parallel.count > 1, group=parallel.group),
            torch.inference_mode(False),
            torch.no_grad(),
            stages(passes, self.options.progress) as enter,
        ):
            names = self._names(session, tensors)
            traced = self._attach(session, tensors, names)
            if self.options.plan is not None:
                check_given(self.options.plan, about(traced).parallel)
            plan = session.plan_of(traced)
            lowered = rewrite(traced, plan, self.options.stage, session.shared, enter)
            read = {str(n.target) for n in lowered.graph.find_nodes(op="get_attr")}
            for name, t in zip(names, tensors, strict=True):
                if name in read and is_freed(t):
                    raise StageError(
                        f"a graph reads {name} in float, and free_float=True has freed it: compile without it"
                    )
            freed = _quantized_only(traced, lowered, plan) if self.options.free_float else set()
            del traced
            keep = held(lowered)
            enter("emit")
            run, used = self._emit(lowered, guarded, session, tensors)
            session.blocks.free((name, t) for name, t in zip(names, tensors, strict=True) if name in freed)
        self._warn_of_waste()
        bound = Bound(session, tensors, run, used, keep)
        self.bound = [bound, *(b for b in self.bound if b.alive())]  # the old ones until now: INT8 weights are shared
        self.retired = [b for b in self.retired if b.session is not session]
        return bound

    def _warn_of_waste(self) -> None:
        """Says once that weights which change all the time are quantized all the time."""
        if self.bound:
            self.wasted = 0 if self.bound[0].calls > 1 or self.bound[0].alive() else self.wasted + 1
            if self.wasted == _MOST_WASTED:
                warnings.warn(
                    f"the model's weights were others at each of the last {_MOST_WASTED} calls, and were quantized anew each "
                    "time, which costs far more than INT8 saves: offloading (accelerate's cpu_offload, device_map) and "
                    "torch.func.functional_call do that. Load the model onto one device and call it with its own weights, "
                    "or leave the backend out",
                    stacklevel=2,
                )

    def _observe(self, session: Session, tensors: list[Tensor]) -> Observed:
        session.runners.add(self)
        traced = self._attach(session, tensors, self._names(session, tensors))
        recipe = resolve_recipe(self.options.recipe)
        quantizes = recipe.attention != "none"
        check_weights(traced, wanted(traced, find_linears(traced), recipe))
        observer = Observer(traced, find_attentions(traced) if quantizes else [], len(_observed_of(session)))
        floats = session.floats if session.has_model() else self.floats
        observed = Observed(session, tensors, observer, self.template.updates, floats)
        self.observed = [observed, *(o for o in self.observed if o.alive())]
        return observed

    def _attach(self, session: Session, tensors: list[Tensor], names: list[str]) -> fx.GraphModule:
        refuse_names(names)
        constants: dict[int, tuple[str, Tensor]] = {}
        for i, name, t in zip(self.constants, names, tensors, strict=True):
            own: Any = t.detach()
            own._sqcompile_source = source(t, name)
            constants[i] = name, own
        constants |= {len(self.fallback) + i: (f"held_{i}", t) for i, t in enumerate(self.template.held)}
        gm = attach(self.template, constants, session.aliases())
        placeholders = gm.graph.find_nodes(op="placeholder")
        own = {self.fallback[i]: name for i, name in zip(self.constants, names, strict=True)}
        about(gm).parallel = renamed(self.parallel, own)
        about(gm).names = {
            n.name: self.fallback[i] for n, i in zip(placeholders, about(gm).arguments, strict=True)
        }  # as Dynamo spells the arguments' own
        return gm

    def _names(self, session: Session, tensors: list[Tensor]) -> list[str]:
        names = [session.names(t) for t in tensors]
        return [found[0] if found else self.fallback[i] for i, found in zip(self.constants, names, strict=True)]

    def _emit(
        self, lowered: fx.GraphModule, guarded: bool, session: Session, tensors: list[Tensor]
    ) -> tuple[Callable[..., Any], list[int]]:
        arguments = about(lowered).arguments
        flat, used = flatten(write_back(lowered))
        positions = [arguments[i] for i in used]
        run = with_own_results(self._compile(flat, guarded), flat, set(self._names(session, tensors)))
        devices = {t.device for t in tensors if t.is_cuda}
        if self.options.mode == "reduce-overhead" and len(devices) == 1:  # a graph without weights has none
            written = [i for i, position in enumerate(positions) if position in self.template.updates]
            run = Recorder(run, written, session.pool(devices.pop()))
        return run, positions

    def _compile(self, flat: fx.GraphModule, guarded: bool) -> Callable[..., Any]:
        if self.options.compiler == "eager":
            return flat
        self.binds += 1
        if self.options.regional:
            return compile_regions(flat, guarded)
        if self.binds > 1:  # a layer that is compiled alone, or changed weights: there will be more
            return compile_without_constants(flat, self.code, guarded)
        return with_layout(inductor(flat, guarded), flat)


def _observed_of(session: Session) -> list[Observed]:
    """The graphs that are observed for a session."""
    runners = [r for r in session.runners if isinstance(r, Runner)]
    return [o for r in runners for o in r.observed if o.session is session and o.alive()]


def _quantized_only(traced: fx.GraphModule, lowered: fx.GraphModule, plan: Plan) -> set[str]:
    """Names of the weights that a graph read for quantized linears, and reads no more."""
    nodes, layers = nodes_by_name(traced), {l.name for l in plan.layers if l.quantized}
    weights = {first_leaf(nodes[l.weight]) for l in find_linears(traced) if l.name in layers}
    left = {str(n.target) for n in lowered.graph.find_nodes(op="get_attr")}
    return {w for w in weights if w} - left


def _parameters(gm: fx.GraphModule) -> set[str]:
    """Names of all tensors that the weights and biases of linears are made of."""
    nodes = nodes_by_name(gm)
    made_of = above(*(nodes[n] for l in find_linears(gm) for n in (l.weight, l.bias) if n))
    return {str(n.target) for n in made_of if n.op == "get_attr"}
