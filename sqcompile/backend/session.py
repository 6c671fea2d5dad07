"""session: one model under one set of options. Its graphs share names, the plan and INT8 weights.

Dynamo hands a backend graphs, not the model: it is found on the call stack, as the outermost module that has the
graph's parameters. Names come from the parameters themselves, so that graphs of any frame agree with the plan: those
after a graph break, and those of a layer compiled alone.
"""

from __future__ import annotations

import collections
import inspect
import sys
import threading
import types
import warnings
import weakref
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch._C._dynamo.eval_frame import _PyInterpreterFrame
from torch._dynamo.convert_frame import compile_lock
from torch._dynamo.eval_frame import OptimizedModule
from torch.utils.weak import WeakIdKeyDictionary

from sqcompile.backend.bound import PATIENCE, Floats, Observed
from sqcompile.backend.cuda_graphs import Pool
from sqcompile.backend.decide import completed, decide, measured
from sqcompile.backend.options import Options
from sqcompile.backend.weights import Blocks, check_not_freed
from sqcompile.capture.trace import aliases
from sqcompile.errors import PlanError, RecipeError
from sqcompile.passes.ir.graph import find_linears, first_leaf, nodes_by_name
from sqcompile.passes.planning.uses import first_use
from sqcompile.passes.rewrite.weight_store import Shared
from sqcompile.plan.plan import Plan
from sqcompile.plan.recipe import resolve_recipe
from sqcompile.refresh import touch

if TYPE_CHECKING:
    from sqcompile.backend.runner import Runner


class Session:
    """What the graphs of one model share.

    Attributes:
        options: of torch.compile.
        plan: None until calibration is over.
        shared: the INT8 weights.
        blocks: what freed weights are views of.
        runners: the graphs.
        floats: counts the calls that calibrate.
        over: whether the model is no more.
    """

    def __init__(self, root: nn.Module | None, options: Options) -> None:
        self._root = weakref.ref(root) if root is not None else lambda: None
        self.options, self.plan = options, options.plan
        self.shared = Shared(lambda t: getattr(t, "_sqcompile_source", None), check_not_freed)
        self.blocks = Blocks()
        self.floats = Floats(options.calibration_steps)
        self.over = False
        self.runners: weakref.WeakSet[Runner] = weakref.WeakSet()
        self._names: Any = WeakIdKeyDictionary()
        self._seen: dict[int, set[Observed]] = {}  # by thread: the graphs that its call has run
        self._torn: set[str] = set()  # weights that several graphs of one call read
        self._warned = self._told = self._touched = False
        self._pools: dict[torch.device, Pool] = {}
        if root is not None:  # Dynamo keeps graphs with the code of a class, which outlives the model
            weakref.finalize(root, _forget, weakref.ref(self)).atexit = False

    def has_model(self) -> bool:
        return self._root() is not None

    def pool(self, device: torch.device) -> Pool:
        """Where CUDA graphs are recorded."""
        if device not in self._pools:
            self._pools[device] = Pool(device)
        return self._pools[device]

    def names(self, tensor: Tensor) -> tuple[str, ...]:
        """All names of a tensor of the model, the one that the plan has first; none for any other tensor."""
        root = self._root()
        if root is None:
            return ()
        if tensor not in self._names:
            self._names = WeakIdKeyDictionary()
            for name, t in _tensors(root):
                self._names[t] = (*self._names.get(t, ()), name)
        found = self._names.get(tensor, ())
        planned = {l.name for l in self.plan.layers} if self.plan and len(found) > 1 else set()
        return tuple(sorted(found, key=lambda name: name not in planned))

    def aliases(self) -> dict[str, tuple[str, ...]]:
        """All names of each parameter and buffer, see `trace`."""
        root = self._root()
        return {} if root is None else aliases(root)

    def warn_of_uncounted(self, tensors: Sequence[Tensor]) -> None:
        """Says once that writes to tensors of inference mode cannot be seen."""
        if not self._warned and any(t.is_inference() for t in tensors):
            self._warned = True
            warnings.warn(
                "the model was made under torch.inference_mode(), where PyTorch counts no writes: weights that are "
                "changed in place may not be quantized again. Make or load it outside of that mode, or call "
                "sqcompile.refresh(model) after a change",
                stacklevel=2,
            )

    def touch(self, tensors: Sequence[Tensor]) -> None:
        """Has all weights quantized again, some of which were written to without PyTorch knowing; says so once."""
        root = self._root()
        touch([t for _, t in _tensors(root)] if root is not None else tensors)
        if not self._touched:
            self._touched = True
            warnings.warn(
                "weights of the model were written to through .data (weight.data.copy_(...), adapters that are swapped or "
                "merged), which PyTorch does not count. They are quantized again now, and some calls before this one may have "
                "used the old ones: call sqcompile.refresh(model) right after such a write",
                stacklevel=2,
            )

    def plan_of(self, traced: fx.GraphModule) -> Plan:
        """The plan for a graph, some of which the model's own calibration may not have seen."""
        assert self.plan is not None
        if self.options.plan is not None:
            return self.plan
        plan, unseen = completed(self.plan, traced)
        if unseen and not self._told:
            self._told = True
            more = f" and {len(unseen) - 4} more" if len(unseen) > 4 else ""
            warnings.warn(
                f"{', '.join(unseen[:4])}{more} ran in no call while the model calibrated itself "
                f"(calibration_steps={self.options.calibration_steps}), and run in FLOAT: raise calibration_steps and call "
                "the model in each way that it will be used, or pass a plan from sqcompile.calibrate",
                stacklevel=2,
            )
        return plan

    def step(self, observed: Observed) -> None:
        """Makes the plan if enough calls of the model have been observed, at the beginning of the next.

        The graph at hand must have run often enough. Other sizes, tasks and constants of the code make other graphs, so its
        linears count, too, in whichever graph they ran, once a call at most: each of them once more than that, since a prompt
        is not like the tokens after it; or one of them so often that calls were enough.
        """
        seen = self._seen.setdefault(threading.get_ident(), set())
        if observed in seen:  # a call runs each graph once at most
            self._tear(seen)
            seen.clear()
        steps, own = self.options.calibration_steps, observed.observer.batches
        mine = [o for r in self.runners for o in r.observed if o.session is self and o.alive()]
        runs = [sum(o.observer.batches for o in mine if name in o.names) for name in observed.names]
        if own < steps and min(runs) <= steps and max(runs) < PATIENCE * steps:
            seen.add(observed)
            return
        for others in self._seen.values():
            self._tear(others)
        observers = [o.observer for o in mine]
        for o in observers:
            o.stop()
        recipe = resolve_recipe(self.options.recipe)
        with torch.inference_mode(False):
            plan = decide(observers, recipe, own if own >= steps else max(runs))
            self.plan = measured(plan, observers, self._torn)
        self.forget(bound=False)

    def _tear(self, graphs: set[Observed]) -> None:
        """Takes down what several graphs of one call read."""
        uses = Counter(name for o in graphs for name in {first_use(l.name) for l in o.observer.linears})
        self._torn |= {name for name, count in uses.items() if count > 1}

    def forget(self, bound: bool = True) -> None:
        """Has the graphs drop what they hold for this model: what they have seen, and what they compiled."""
        self._seen = {}
        for r in self.runners:
            r.observed = [o for o in r.observed if o.session is not self]
            if bound:
                r.bound = [b for b in r.bound if b.session is not self]
                r.retired = [b for b in r.retired if b.session is not self]


def quantized_only(traced: fx.GraphModule, lowered: fx.GraphModule, plan: Plan) -> set[str]:
    """Names of the weights that a graph read for quantized linears, and reads no more."""
    nodes, layers = nodes_by_name(traced), {l.name for l in plan.layers if l.quantized}
    weights = {first_leaf(nodes[l.weight]) for l in find_linears(traced) if l.name in layers}
    left = {str(n.target) for n in lowered.graph.find_nodes(op="get_attr")}
    return {w for w in weights if w} - left


_over: collections.deque[Session] = collections.deque()


def _forget(session: weakref.ref[Session]) -> None:
    """When a model is freed, in whichever thread that is: one that must not wait for another."""
    if (found := session()) is not None:
        found.over = True
        _over.append(found)
        if compile_lock.acquire(blocking=False):
            try:
                sweep()
            finally:
                compile_lock.release()


def sweep() -> None:
    """Has graphs drop what they hold for models that are no more."""
    while _over:
        _over.pop().forget()


_sessions: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, Session]] = weakref.WeakKeyDictionary()


def reset() -> None:
    """Forgets all plans that models have made by calibrating themselves, with ``torch._dynamo.reset()``."""
    _sessions.clear()


def session_of(tensors: Sequence[Tensor], options: Options) -> Session:
    """The session of the model that is being called.

    Args:
        tensors: the model's parameters and buffers that a graph reads; for none, a session of the graph alone.
        options: of torch.compile.

    Raises:
        RecipeError: for CUDA graphs of a model that is not on one GPU.
        PlanError: if there is a plan, and the model is not found.
    """
    if not tensors:
        alone = Session(None, options)
        alone.plan = options.plan or Plan(resolve_recipe(options.recipe), None, {}, ())
        return alone
    devices = {str(t.device) for t in tensors}
    if options.mode == "reduce-overhead" and (len(devices) > 1 or any(t.device.type != "cuda" for t in tensors)):
        raise RecipeError(
            "mode='reduce-overhead' records CUDA graphs, each of one GPU, and the model's parameters are on "
            f"{', '.join(sorted(devices))}: move them to one GPU, or leave the mode out"
        )
    best = _model(tensors, options)
    if best is None and options.plan is not None:
        raise PlanError(
            "the model that a compiled function calls is not found, and so the plan's names are not those of its "
            "parameters: pass the model itself to torch.compile, or make it a local variable or an attribute where it is called"
        )
    if best is None:
        return Session(None, options)
    return _sessions.setdefault(best, {}).setdefault(options.key, Session(best, options))


def _model(tensors: Sequence[Tensor], options: Options) -> nn.Module | None:
    """The module that a session is of, which has all the tensors, and as many of the plan's names as any.

    One that has a session already, wherever it was called then; else what was given to torch.compile, or the outermost on
    the call stack that has it as a part, for layers that are compiled one by one.
    """
    wanted = {l.name for l in options.plan.layers} if options.plan else set()
    ids = {id(t) for t in tensors}

    def hits(module: nn.Module) -> int:
        """How many of the plan's names it has; -1 without all the tensors."""
        own = dict(_tensors(module))
        return len(wanted & own.keys()) if ids <= {id(t) for t in own.values()} else -1

    stack = [(hits(m), m, compiled) for m, compiled in _modules()]
    most = max((n for n, _, _ in stack), default=-1)
    outermost = [m for n, m, _ in reversed(stack) if n == most and n >= 0]
    known = [m for m, sessions in _sessions.items() if options.key in sessions and hits(m) >= max(most, 0)]
    given = [(m, compiled) for n, m, compiled in stack if compiled is not None and n == most and n >= 0]
    whole = [outer for outer in outermost for _, c in given if any(part is c for part in outer.modules())]
    first = [m for m in outermost if m in known] + known + whole + [m for m, _ in given] + outermost
    return first[0] if first else None


def model_tensors(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Those that are parameters or buffers of modules on the call stack."""
    known = {id(t) for module, _ in _modules() for _, t in _tensors(module)}
    return [t for t in tensors if id(t) in known]


def _modules() -> Iterator[tuple[nn.Module, OptimizedModule | None]]:
    """The modules on the call stack, the innermost first: what frames and the objects of their methods refer to.

    Each with what torch.compile has made of it, if that is what is found.
    """
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] != "sqcompile":
            used = (frame.f_globals.get(name) for name in frame.f_code.co_names)
            for v in [*_locals(frame), *used]:
                if isinstance(v, _PyInterpreterFrame):  # the one that Dynamo compiles, which does not run yet
                    for x in v.f_locals.values():
                        yield from _modules_of(x)
                yield from _modules_of(v)
        frame = frame.f_back


def _locals(frame: types.FrameType) -> list[Any]:
    """The values of a frame's variables."""
    found = frame.f_locals
    values = [*found.values()]
    # before Python 3.13, a function's frame keeps this copy, and with it a model that the function deletes later
    copied = sys.version_info < (3, 13) and frame.f_code.co_flags & inspect.CO_OPTIMIZED
    if copied and sys.getrefcount(found) <= 3:  # the frame's, ours and the call's: nobody else has asked for it
        found.clear()
    return values


def _modules_of(v: Any) -> Iterator[tuple[nn.Module, OptimizedModule | None]]:
    v = v.__self__ if isinstance(v, types.MethodType) else v
    attributes = [] if isinstance(v, (nn.Module, types.ModuleType, type)) else [*getattr(v, "__dict__", {}).values()]
    for x in (v, *attributes):
        compiled = x if isinstance(x, OptimizedModule) else None
        x = x._orig_mod if isinstance(x, OptimizedModule) else x
        if isinstance(x, nn.Module) and not isinstance(x, fx.GraphModule):
            yield x, compiled


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)
