"""session: one model under one set of options. Its graphs share names, the plan and INT8 weights.

Names come from the parameters themselves, so that graphs of any frame agree with the plan: those
after a graph break, and those of a layer compiled alone.
"""

from __future__ import annotations

import collections
import warnings
import weakref
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from sqcompile.backend.cuda_graphs import Pool
from sqcompile.backend.decide import completed
from sqcompile.backend.find_model import all_tensors, find_model
from sqcompile.backend.floats import Floats
from sqcompile.backend.options import Options
from sqcompile.backend.weights import Blocks, check_not_freed, touch
from sqcompile.errors import PlanError, RecipeError
from sqcompile.passes.rewrite.weight_store import Shared
from sqcompile.plan.entries import Shard
from sqcompile.plan.plan import Plan
from sqcompile.plan.recipe import resolve_recipe
from sqcompile.plan.shards import check_shard
from sqcompile.pytorch.core import WeakIdKeyDictionary
from sqcompile.pytorch.distributed import is_distributed
from sqcompile.pytorch.dynamo import compile_lock


class Graphs(Protocol):
    """What holds graphs for several sessions."""

    def held_for(self, session: Session) -> list[Hashable]:
        """The graphs that are compiled for a session now."""

    def forget(self, session: Session, compiled: bool) -> None:
        """Drops what was observed for a session, and, if told so, what was compiled."""


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
        self.runners: weakref.WeakSet[Graphs] = weakref.WeakSet()
        self._names: Any = WeakIdKeyDictionary()
        self.seen: dict[int, set[Hashable]] = {}  # by thread: the graphs that its call has run
        self.torn: set[str] = set()  # weights that several graphs of one call read
        self._warned = self._told = self._touched = self._stale = False
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
            for name, t in all_tensors(root):
                self._names[t] = (*self._names.get(t, ()), name)
        found = self._names.get(tensor, ())
        planned = {l.name for l in self.plan.layers} if self.plan and len(found) > 1 else set()
        return tuple(sorted(found, key=lambda name: name not in planned))

    def aliases(self) -> dict[str, tuple[str, ...]]:
        """All names of each parameter and buffer, as of the last tensor that was looked up."""
        return {name: names for names in list(self._names.values()) for name in names}

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

    def warn_of_static_scales(self) -> None:
        """Says once, of parameters that were written to, that static scales are of what the old ones gave."""
        plan = self.plan
        scales = (
            [*(l.input_scale for l in plan.layers), *(a.q_scale for a in plan.attention)] if plan is not None else []
        )
        if any(s is not None for s in scales) and not self._stale:
            self._stale = True
            warnings.warn(
                "the model's parameters were written to after its static scales were made. They are quantized again, but the "
                "scales are of the activations that the old ones gave, and larger values are clipped: if these are other "
                "weights, call torch._dynamo.reset() to have the model calibrate itself again, or pass a new plan",
                stacklevel=2,
            )

    def shard(self) -> Shard | None:
        """What this process has of the model; None for all of it, or where the model is not found."""
        root = self._root()
        found: Any = next(filter(is_distributed, root.parameters()), None) if root is not None else None
        mesh = None if found is None else found.device_mesh
        if mesh is None or mesh.ndim != 1 or mesh.size() == 1:  # of more dims it is refused with the graph
            return None
        return Shard(mesh.get_local_rank(), mesh.size())

    def touch(self, tensors: Sequence[Tensor]) -> None:
        """Has all weights quantized again, some of which were written to without PyTorch knowing; says so once."""
        root = self._root()
        touch([t for _, t in all_tensors(root)] if root is not None else tensors)
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
            if self.has_model():
                check_shard(self.plan, self.shard())
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

    def forget(self, compiled: bool = True) -> None:
        """Has the graphs drop what they hold for this model: what they have seen, and what they compiled."""
        self.seen = {}
        for r in self.runners:
            r.forget(self, compiled)


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


def sessions_of(model: nn.Module) -> list[Session]:
    """The sessions of a model, or of those that it is a part of; the newest last."""
    found = _sessions.get(model)
    whole = [found] if found else [s for m, s in list(_sessions.items()) if any(part is model for part in m.modules())]
    return [session for sessions in whole for session in sessions.values()]


def graphs_of(model: nn.Module) -> frozenset[Hashable] | None:
    """The graphs that are compiled for a model now, the same objects as long as they are; None while it calibrates itself.

    Whoever keeps them keeps the INT8 weights that they use.
    """
    sessions = sessions_of(model)
    if any(s.plan is None for s in sessions):
        return None
    return frozenset(graph for s in sessions for r in list(s.runners) for graph in r.held_for(s))


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
    best = find_model(tensors, options, [m for m, sessions in _sessions.items() if options.key in sessions])
    if best is None and options.plan is not None:
        raise PlanError(
            "the model that a compiled function calls is not found, and so the plan's names are not those of its "
            "parameters: pass the model itself to torch.compile, or say which it is: options={'model': model}"
        )
    if best is None:
        return Session(None, options)
    return _sessions.setdefault(best, {}).setdefault(options.key, Session(best, options))
