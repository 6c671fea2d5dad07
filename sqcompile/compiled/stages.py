"""Stages: the graphs a model went through, rebuilt when looked at.

A compiled model holds INT8 weights alone. Its earlier stages are rebuilt on demand from the user's own model, to
which only a weak reference is kept: dropping the float model frees it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping

from torch import Tensor, fx, nn

from sqcompile.errors import StageError
from sqcompile.kernels.targets import Target
from sqcompile.passes.ir.about import about, attached, describe_as
from sqcompile.passes.ir.graph import clone, get_tensor, set_tensor, state
from sqcompile.passes.ir.verify import STAGES
from sqcompile.pipeline import rewrite
from sqcompile.plan.plan import Plan
from sqcompile.process.lock import compiling
from sqcompile.process.samples import sample
from sqcompile.pytorch.distributed import local_part


class Stages(Mapping[str, fx.GraphModule]):
    """``stages["traced" | "folded" | "quantized" | "lowered"]``: GraphModules with the model's own signature.

    They compute what is in the graph, whatever the sizes of a call: only the compiled model looks whether its capture serves
    them.

    Raises:
        StageError: if the float model is gone, or its parameters changed since it was compiled.
    """

    def __init__(self, model: nn.Module, traced: fx.GraphModule, plan: Plan, target: Target | None = None) -> None:
        self._model = weakref.ref(model)
        own = _tensors(model)
        names = {str(n.target) for n in traced.graph.find_nodes(op="get_attr")}
        self.shared = frozenset(n for n in names if n in own)
        self.original = frozenset(names)  # every tensor that came with the capture
        self._constants = {n: get_tensor(traced, n) for n in names - self.shared}
        self.whole: dict[str, Tensor] = {}  # see `About.whole`
        self._graph, self._about = _ownerless(clone(traced)), attached(about(traced), whole=self.whole)
        self._states = {n: _state(own[n]) for n in self.shared}
        self._plan, self._target = plan, target
        self._cache: weakref.WeakValueDictionary[str, fx.GraphModule] = weakref.WeakValueDictionary()

    def __getitem__(self, name: str) -> fx.GraphModule:
        return self._stage(name, lazy=False)

    def graph(self, name: str) -> fx.GraphModule:
        """A stage to look at: INT8 weights of the quantized one are made when they are asked for.

        Raises:
            StageError: as ``stages[name]``.
        """
        return self._stage(name, lazy=name == "quantized")

    def _stage(self, name: str, lazy: bool) -> fx.GraphModule:
        if name not in STAGES:
            raise KeyError(f"no stage {name!r}: the stages are {', '.join(STAGES)}")
        stage = self._cache.get(name)
        if stage is not None and self._model() is None:
            return stage  # no one can change its tensors any more
        own = self._own()  # what is kept of a stage is over the model's own tensors, too
        if stage is None:
            with compiling():
                stage = rewrite(self._traced(own), self._plan, until=name, target=self._target, lazy=lazy)
            if not lazy:
                self._cache[name] = stage
        return stage

    def __iter__(self) -> Iterator[str]:
        return iter(STAGES)

    def __len__(self) -> int:
        return len(STAGES)

    def model(self) -> nn.Module:
        """The float model, whose parameters are what they were.

        Raises:
            StageError: if it is gone, or its parameters changed.
        """
        model = self._model()
        self._own()
        assert model is not None
        return model

    def _own(self) -> dict[str, Tensor]:
        """The model's tensors, which are what they were."""
        model = self._model()
        if model is None:
            raise StageError("the float model was freed, and a stage is rebuilt from it: keep a reference to the model")
        own = _tensors(model)
        if any(_state(own[n]) != s for n, s in self._states.items()):
            raise StageError("the model's parameters changed since it was compiled: compile it again to see its stages")
        return own

    def _traced(self, own: dict[str, Tensor]) -> fx.GraphModule:
        root = nn.Module()
        for n in self.shared:
            set_tensor(root, n, own[n].detach())
        for n, tensor in self._constants.items():
            set_tensor(root, n, tensor)
        gm = fx.GraphModule(root, self._graph)
        describe_as(gm, self._about)
        traced = clone(gm)
        traced.recompile()
        _ownerless(gm)
        return traced


class Graphs(Mapping[str, fx.GraphModule]):
    """The graphs of the stages to look at, of which no weight is computed that is not there.

    The lowered graph is the compiled model's own, which this does not keep; it is no stage of these once that is gone.

    Raises:
        StageError: as `Stages`.
    """

    def __init__(self, stages: Stages, lowered: fx.GraphModule) -> None:
        self._stages, self._lowered = stages, weakref.ref(lowered)

    def __getitem__(self, name: str) -> fx.GraphModule:
        if name != "lowered":
            return self._stages.graph(name)
        if (lowered := self._lowered()) is None:
            raise KeyError("the compiled model is gone, and its lowered graph with it")
        return lowered

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._stages if name != "lowered" or self._lowered() is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _state(tensor: Tensor) -> tuple[tuple[int, int], bytes | None]:
    """What tells of writes to a tensor: PyTorch's count and, as ``.data`` leaves that, some of its bytes."""
    return state(tensor), sample(tensor)


def _ownerless(gm: fx.GraphModule) -> fx.Graph:
    """The module's graph, which no longer keeps the module alive, and so the model's tensors."""
    gm.graph.owning_module = None
    return gm.graph


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    parameters = model.named_parameters(remove_duplicate=False)
    own = {**dict(model.named_buffers(remove_duplicate=False)), **dict(parameters)}
    return {name: local_part(t) for name, t in own.items()}
