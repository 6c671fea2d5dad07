"""session: one model under one set of options. Its graphs share names, the plan and INT8 weights.

Dynamo hands a backend graphs, not the model: it is found on the call stack, as the outermost module that has the
graph's parameters. Names come from the parameters themselves, so that graphs of any frame agree with the plan: those
after a graph break, and those of a layer compiled alone.
"""

from __future__ import annotations

import sys
import types
import weakref
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.utils.weak import WeakIdKeyDictionary

from sqcompile.backend.cuda_graphs import Pool
from sqcompile.backend.decide import decide
from sqcompile.backend.options import Options
from sqcompile.errors import RecipeError, StageError
from sqcompile.passes.graph import find_linears, first_leaf, nodes_by_name
from sqcompile.passes.shared import Shared
from sqcompile.plan import Plan
from sqcompile.recipe import resolve_recipe
from sqcompile.stages import state
from sqcompile.trace import aliases

if TYPE_CHECKING:
    from sqcompile.backend.runner import Runner


@dataclass(frozen=True)
class Freed:
    """A parameter whose float values are gone: what it was, and how it is left."""

    source: Hashable
    left: tuple[int, int]


class Session:
    """What the graphs of one model share.

    Attributes:
        options: of torch.compile.
        plan: None until calibration is over.
        shared: the INT8 weights.
        runners: the graphs.
    """

    def __init__(self, root: nn.Module | None, options: Options) -> None:
        self._root = weakref.ref(root) if root is not None else lambda: None
        self.options, self.plan = options, options.plan
        self.shared = Shared(lambda t: getattr(t, "_sqcompile_source", None))
        self.runners: weakref.WeakSet[Runner] = weakref.WeakSet()
        self._names: dict[int, tuple[str, ...]] = {}
        self._serial: Any = WeakIdKeyDictionary()
        self._freed: Any = WeakIdKeyDictionary()
        self._blocks: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._seen: set[Runner] = set()
        self._calls = 0
        self._pools: dict[torch.device, Pool] = {}

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
        if id(tensor) not in self._names:
            self._names = {}
            for name, t in _tensors(root):
                self._names[id(t)] = (*self._names.get(id(t), ()), name)
        found = self._names.get(id(tensor), ())
        planned = {l.name for l in self.plan.layers} if self.plan and len(found) > 1 else set()
        return tuple(sorted(found, key=lambda name: name not in planned))

    def aliases(self) -> dict[str, tuple[str, ...]]:
        """All names of each parameter and buffer, see `trace`."""
        root = self._root()
        return {} if root is None else aliases(root)

    def source(self, tensor: Tensor) -> Hashable:
        """Which values a tensor has now: changes when it is written to or moved.

        Raises:
            StageError: if its float values were freed and it has been written to since.
        """
        freed = self._freed.get(tensor)
        if freed is not None:
            if state(tensor) != freed.left:
                name = next(iter(self.names(tensor)), "a parameter")
                raise StageError(
                    f"{name} was written to or moved after its float values were freed (free_float=True): load the model "
                    "again and compile that one"
                )
            return freed.source
        return (self._serial.setdefault(tensor, len(self._serial)), *state(tensor))

    def is_freed(self, tensor: Tensor) -> bool:
        return tensor in self._freed

    def free(self, parameters: Iterable[Tensor]) -> None:
        """Frees the values of parameters: each becomes a view of one block of NaN, of the same sizes and strides."""
        for p in parameters:
            if self.is_freed(p):
                continue
            source, key = self.source(p), (p.dtype, p.device)
            size = 1 + sum((n - 1) * s for n, s in zip(p.shape, p.stride(), strict=True))
            if key not in self._blocks or len(self._blocks[key]) < size:
                self._blocks[key] = torch.full((size,), float("nan"), dtype=p.dtype, device=p.device)
            p.data = self._blocks[key].as_strided(p.shape, p.stride())
            self._freed[p] = Freed(source, state(p))

    def step(self, runner: Runner) -> None:
        """Counts a call in float; after the last one, makes the plan. A call of a model runs each graph once at most."""
        if runner in self._seen:
            self._calls += 1
            self._seen = set()
            if self._calls >= self.options.calibration_steps:
                observers = [r.observer for r in self.runners if r.observer is not None]
                self.plan = decide(observers, resolve_recipe(self.options.recipe), self._calls)
        self._seen.add(runner)


def quantized_only(traced: fx.GraphModule, lowered: fx.GraphModule, plan: Plan) -> set[str]:
    """Names of the weights that a graph read for quantized linears, and reads no more."""
    nodes, layers = nodes_by_name(traced), {l.name for l in plan.layers if l.quantized}
    weights = {first_leaf(nodes[l.weight]) for l in find_linears(traced) if l.name in layers}
    left = {str(n.target) for n in lowered.graph.find_nodes(op="get_attr")}
    return {w for w in weights if w} - left


def states(tensors: list[Tensor]) -> tuple[list[int], list[int]]:
    """`state` of each tensor: versions and addresses."""
    try:
        versions = [t._version for t in tensors]
    except RuntimeError:  # one was made in inference mode; to ask each is slow
        versions = [state(t)[0] for t in tensors]
    return versions, [t.data_ptr() for t in tensors]


_sessions: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, Session]] = weakref.WeakKeyDictionary()


def session_of(parameters: Sequence[Tensor], options: Options) -> Session:
    """The session of the model that is being called.

    Raises:
        RecipeError: for CUDA graphs of a model that is not on one GPU.
    """
    devices = {str(p.device) for p in parameters}
    if options.mode == "reduce-overhead" and (len(devices) > 1 or any(p.device.type != "cuda" for p in parameters)):
        raise RecipeError(
            "mode='reduce-overhead' records CUDA graphs, each of one GPU, and the model's parameters are on "
            f"{', '.join(sorted(devices))}: move them to one GPU, or leave the mode out"
        )
    wanted = {l.name for l in options.plan.layers} if options.plan else set()
    best, most = None, -1
    for module in _modules():
        tensors = dict(_tensors(module))
        if {id(p) for p in parameters} <= {id(t) for t in tensors.values()}:
            hits = len(wanted & tensors.keys())
            if hits >= most:  # of equals the outermost, which comes last
                best, most = module, hits
    if best is None:
        return Session(None, options)
    return _sessions.setdefault(best, {}).setdefault(options.key, Session(best, options))


def _modules() -> Iterator[nn.Module]:
    """The modules on the call stack, the innermost first: locals of frames, and what their methods are bound to."""
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] != "sqcompile":
            for v in [*frame.f_locals.values()]:
                v = v.__self__ if isinstance(v, types.MethodType) else v
                v = v._orig_mod if isinstance(v, OptimizedModule) else v
                if isinstance(v, nn.Module) and not isinstance(v, fx.GraphModule):
                    yield v
        frame = frame.f_back


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)
