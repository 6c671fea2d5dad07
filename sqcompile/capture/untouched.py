"""untouched: the user's model stays as it is. What its forward would write to is refused, what it keeps is taken back.

A captured graph's tensors share storage with the model, and calibration runs the graph: an in-place operation in it would
be carried out on the user's own parameters, once a batch. So no such operation is let into a graph (`refuse_writes`, by
`verify` once more), and none is carried out while the model is captured (`left_alone`).
"""

from __future__ import annotations

import collections
import contextlib
import sys
import types
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from sqcompile.errors import CaptureError
from sqcompile.passes.ir.explain import source, users_frame
from sqcompile.passes.ir.graph import is_mutable, value
from sqcompile.passes.ir.operators import DROPOUTS
from sqcompile.process.interrupts import checkpoint
from sqcompile.pytorch.core import FakeTensor, TorchDispatchMode, buffer_hooks, pytree, schema, storage_id

_FIXED = (
    "INT8 weights are made once, of values that stay. What to try: write to it before you compile (run the model itself once, "
    "if it does so in its first call alone), or remove the write from forward"
)
_STATE = "a compiled model keeps no state: remove the update from forward, or pass the state in and return it"


def refuse_writes(exported: torch.export.ExportedProgram) -> None:
    """Refuses a program, as torch.export leaves it, that writes to the model's tensors or to its inputs.

    Raises:
        CaptureError: naming the tensor and the line.
    """
    signature = exported.graph_signature
    held = signature.inputs_to_buffers | signature.inputs_to_lifted_tensor_constants
    home: dict[Any, str] = {}  # the input that a storage belongs to
    for n in exported.graph.nodes:
        if n.op == "placeholder":
            home |= {s: n.name for s in _storages(n) if s not in home}
        elif n.target in DROPOUTS:  # in eval mode the result is the argument itself, which no schema says
            home |= {s: home[t] for s in _storages(n) for t in _storages(n.args[0]) if t in home}
        elif is_mutable(n.target):
            written = [home[s] for a in _written(n) for s in _storages(a) if s in home]
            for name in written:
                if parameter := signature.inputs_to_parameters.get(name):
                    raise written_to(parameter, True, source(n))
                raise written_to(held.get(name, name), False, source(n))


def written_to(name: str, parameter: bool, where: str) -> CaptureError:
    """What to raise for a forward that writes to a parameter, or to a buffer or an input."""
    what = f"its parameter {name!r}" if parameter else repr(name)
    return CaptureError(f"the model writes to {what} when it runs, at {where}, and {_FIXED if parameter else _STATE}")


def assigned_to(where: str) -> CaptureError:
    """What to raise for a forward that gives a tensor other values by ``.data =`` or ``set_``."""
    return CaptureError(f"the model assigns to a tensor's .data when it runs, at {where}, and {_FIXED}")


def _written(node: fx.Node) -> list[fx.Node]:
    """The arguments that a mutable operator writes to; of a list of tensors, all."""
    parameters = schema(node.target).arguments
    given = dict(zip((a.name for a in parameters), node.args, strict=False)) | node.kwargs
    found = [given.get(a.name) for a in parameters if a.alias_info is not None and a.alias_info.is_write]
    return [x for x in pytree.tree_leaves(found) if isinstance(x, fx.Node)]


def _storages(node: Any) -> list[Any]:
    """Keys of the storages behind what a node holds."""
    held = pytree.tree_leaves(value(node)) if isinstance(node, fx.Node) else []
    return [storage_id(t) for t in held if isinstance(t, Tensor) and t.layout == torch.strided]


@contextlib.contextmanager
def left_alone(model: nn.Module) -> Iterator[None]:
    """Takes back what a model keeps when it runs, here on fake tensors: a table that forward makes once, a cache.

    Nothing is written to tensors meanwhile that were there before.

    Raises:
        CaptureError: if forward writes to such a tensor.
    """
    before = [_contents(box) for box in _boxes(model)]
    known = set(buffer_hooks)
    try:
        with _RealTensors(), _Data():
            yield
    finally:
        for new in buffer_hooks.keys() - known:  # a capture that failed: torch 2.11 then refuses the model new buffers
            if getattr(buffer_hooks[new], "__module__", "").startswith("torch."):
                del buffer_hooks[new]
        try:
            _take_back(before)
        except KeyboardInterrupt:  # Ctrl-C comes once: what it cut off is done again
            _take_back(before)
            raise


@contextlib.contextmanager
def kept_from_writes(model: nn.Module, given: Any) -> Iterator[None]:
    """`left_alone` for a run on real tensors, of which it keeps none; ``given``: the run's arguments.

    Raises:
        CaptureError: if forward writes to a tensor of the model's, or to an argument.
    """
    boxes = _boxes(model)
    before = [_contents(box) for box in boxes]
    held = [x for box in boxes for x in (box.values() if isinstance(box, dict) else box)]
    tensors = [t for t in pytree.tree_leaves((held, given)) if _is_real(t)]
    try:
        with _Protected({storage_id(t) for t in tensors}), _Data():
            yield
    finally:
        _take_back(before)


class _Protected(TorchDispatchMode):
    """Refuses writes to some storages."""

    supports_higher_order_operators = True

    def __init__(self, storages: set[Hashable]) -> None:
        super().__init__()
        self.storages = storages

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        checkpoint()
        if any(storage_id(t) in self.storages for t in _written_by(func, args, kwargs or {})):
            raise CaptureError(f"the model writes to a tensor that it keeps or is given, and {_STATE}")
        return func(*args, **(kwargs or {}))


def _written_by(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The real tensors whose values a call of an operator writes."""
    if not is_mutable(func) or torch.Tag.inplace_view in func.tags:
        return []
    parameters = schema(func).arguments
    given = dict(zip((a.name for a in parameters), args, strict=False)) | kwargs
    written = [given.get(a.name) for a in parameters if a.alias_info is not None and a.alias_info.is_write]
    return [t for t in pytree.tree_leaves(written) if _is_real(t)]


class _RealTensors(TorchDispatchMode):
    """Refuses writes to real tensors: torch.export carries those out that read no input."""

    supports_higher_order_operators = True  # PyTorch asks

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[Hashable, Any] = {}  # storages of what was made meanwhile, such as a number as a tensor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        checkpoint()
        kwargs = kwargs or {}
        real = {storage_id(t) for t in pytree.tree_leaves((args, kwargs)) if _is_real(t)}
        for t in _written_by(func, args, kwargs):
            if storage_id(t) not in self.made:
                raise CaptureError(
                    f"the model writes to a tensor of shape {tuple(t.shape)} that it keeps between calls, at "
                    f"{users_frame() or func}, and {_STATE}"
                )
        out = func(*args, **kwargs)
        for t in pytree.tree_leaves(out):
            if _is_real(t) and storage_id(t) not in real:
                self.made[storage_id(t)] = t.untyped_storage()
        return out


def _is_real(t: Any) -> bool:
    return isinstance(t, Tensor) and not isinstance(t, FakeTensor) and t.layout == torch.strided and not t.is_meta


class _Data(TorchFunctionMode):
    """``p.data`` as torch.export can capture it: ``p.detach()``. It is not assigned to."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0].detach()
        if func == Tensor.data.__set__:  # type: ignore[attr-defined]
            raise assigned_to(users_frame())
        return func(*args, **(kwargs or {}))


def keeps_parameters(model: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that refuses to replace parameters of the model by others.

    Raises:
        CaptureError: naming one.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        before = dict(model.named_parameters(remove_duplicate=False))
        out = forward(*args, **kwargs)
        for name, p in model.named_parameters(remove_duplicate=False):
            if before.get(name, p) is not p:
                raise CaptureError(f"the model replaces its parameter {name!r} when it runs, and {_FIXED}")
        return out

    return run


_Box = Any  # a container, or the attributes of an object
# whose own objects are not the model's: locks, loggers, compiled code
_FOREIGN = (set(sys.stdlib_module_names) | {"torch", "sqcompile"}) - {"collections", "types"}


def _boxes(model: nn.Module) -> list[_Box]:
    """What holds the model's attributes, and containers and plain objects among them, at any depth."""
    todo: list[Any] = [model]
    found: dict[int, _Box] = {}
    while todo:
        x = todo.pop()
        box = x if isinstance(x, (dict, list, set, collections.deque)) else _attributes(x)
        if isinstance(x, tuple):
            todo += x
        elif box is not None and id(box) not in found:
            found[id(box)] = box
            todo += box.values() if isinstance(box, dict) else box
            if box is x:  # attributes of a subclass
                todo += [a] if (a := getattr(x, "__dict__", None)) else []
    return list(found.values())


def _attributes(x: Any) -> dict[str, Any] | None:
    if isinstance(x, (type, types.ModuleType, types.FunctionType, types.MethodType, Tensor)):
        return None
    if not isinstance(x, nn.Module) and type(x).__module__.partition(".")[0] in _FOREIGN:
        return None
    found = getattr(x, "__dict__", None)
    return found if type(found) is dict else None


def _contents(box: _Box) -> tuple[_Box, Any]:
    return box, (list(_base(box).items(box)) if isinstance(box, dict) else list(box))


def _base(box: dict[Any, Any]) -> Any:
    """The class whose methods change a dict, whatever a subclass makes of them."""
    return collections.OrderedDict if isinstance(box, collections.OrderedDict) else dict


def _take_back(before: list[tuple[_Box, Any]]) -> None:
    """Gives boxes the contents they had. One with the same contents is not touched."""
    for box, was in before:
        now = _contents(box)[1]
        if not isinstance(box, dict):
            if len(now) == len(was) and all(a is b for a, b in zip(now, was, strict=True)):
                continue
            base: Any = next(c for c in (list, set, collections.deque) if isinstance(box, c))
            base.clear(box)
            (base.update if base is set else base.extend)(box, was)
            continue
        if len(now) == len(was) and all(k is j and v is w for (k, v), (j, w) in zip(now, was, strict=True)):
            continue
        base, kept = _base(box), {k for k, _ in was}
        for k, _ in now:
            if k not in kept:
                base.__delitem__(box, k)
        for k, v in was:
            base.__setitem__(box, k, v)
        if [k for k, _ in base.items(box)] != [k for k, _ in was]:  # one was deleted and added again
            base.clear(box)
            for k, v in was:
                base.__setitem__(box, k, v)
