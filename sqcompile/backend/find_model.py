"""find_model: which nn.Module the graphs at hand are of.

Dynamo hands a backend graphs, not the model. ``options={"model": model}`` says which it is; without that it is found on
the call stack, as the outermost module that has the graph's parameters.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, fx, nn

from sqcompile.backend.options import Options
from sqcompile.errors import PlanError
from sqcompile.pytorch.distributed import local_part
from sqcompile.pytorch.dynamo import InterpreterFrame, OptimizedModule, original


def find_model(tensors: Sequence[Tensor], options: Options, sessions: Collection[nn.Module]) -> nn.Module | None:
    """The module that a session is of, which has all the tensors, and as many of the plan's names as any.

    The one that ``options`` name. Else one that has a session already, wherever it was called then; else what was given to
    torch.compile, or the outermost on the call stack that has it as a part, for layers that are compiled one by one.

    Args:
        tensors: parameters and buffers that a graph reads.
        options: of torch.compile.
        sessions: models that have a session under these options.

    Returns:
        None where there is none.

    Raises:
        PlanError: if the model that the options name is gone, or lacks one of the tensors.
    """
    if options.model is not None:
        return _given(tensors, options.model())
    wanted = {l.name for l in options.plan.layers} if options.plan else set()
    ids = {id(t) for t in tensors}

    counted: dict[int, int] = {}  # a module is in many frames, and need not be hashable

    def hits(module: nn.Module) -> int:
        """How many of the plan's names it has; -1 without all the tensors."""
        if id(module) not in counted:
            own = dict(all_tensors(module))
            counted[id(module)] = len(wanted & own.keys()) if ids <= {id(t) for t in own.values()} else -1
        return counted[id(module)]

    stack = [(hits(m), m, compiled) for m, compiled in _modules()]
    most = max((n for n, _, _ in stack), default=-1)
    outermost = [m for n, m, _ in reversed(stack) if n == most and n >= 0]
    known = [m for m in sessions if hits(m) >= max(most, 0)]
    given = [(m, compiled) for n, m, compiled in stack if compiled is not None and n == most and n >= 0]
    whole = [outer for outer in outermost for _, c in given if any(part is c for part in outer.modules())]
    first = [m for m in outermost if m in known] + known + whole + [m for m, _ in given] + outermost
    return first[0] if first else None


def _given(tensors: Sequence[Tensor], model: nn.Module | None) -> nn.Module:
    if model is None:
        raise PlanError("the model of options={'model': model} is gone: keep it as long as what torch.compile made")
    own = {id(t) for _, t in all_tensors(model)}
    if foreign := [t for t in tensors if id(t) not in own]:
        shape = " x ".join(map(str, foreign[0].shape)) or "a number"
        raise PlanError(
            f"{len(foreign)} of {len(tensors)} tensors that are read here, one of shape {shape}, are none of the model of "
            "options={'model': model}: pass the module that holds all that torch.compile is given"
        )
    return model


def model_tensors(tensors: Iterable[Tensor], options: Options) -> list[Tensor]:
    """Those that are parameters or buffers of the model that the options name, or else of modules on the call stack."""
    model = options.model() if options.model is not None else None
    modules = [model] if model is not None else [m for m, _ in _modules()]
    known = {id(t) for module in modules for _, t in all_tensors(module)}
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
                if isinstance(v, InterpreterFrame):  # the one that Dynamo compiles, which does not run yet
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
        x = original(x) if isinstance(x, OptimizedModule) else x
        if isinstance(x, nn.Module) and not isinstance(x, fx.GraphModule):
            yield x, compiled


def all_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name; one that has several names comes with each. Of a sharded one what this process holds."""
    for name, t in (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)):
        yield name, local_part(t)
