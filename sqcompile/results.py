"""plan_of, report_of, compare: what was decided for a model, whichever way it was compiled; for two recipes, side by side."""

from __future__ import annotations

import reprlib
import sys
from typing import Any

from torch import nn

from sqcompile.compiled.compare import Comparison, compared
from sqcompile.compiled.emit import CompiledModel
from sqcompile.compiled.report import Report
from sqcompile.errors import StageError
from sqcompile.plan.plan import Plan
from sqcompile.process.lock import compiling
from sqcompile.pytorch.core import compiled_call


def plan_of(net: Any) -> Plan:
    """The plan that a compiled model runs by. It can be saved, and passed to `compile` or to the backend.

    Args:
        net: what `sqcompile.compile` gave; or what ``torch.compile(model, backend="smoothquant")`` gave, the model itself,
            or one of its layers that was compiled alone.

    Returns:
        The plan; of a model that was compiled under several options, the plan that was made last.

    Raises:
        StageError: if there is none: the model was not compiled or not called yet, or still calibrates itself.
    """
    if isinstance(net, CompiledModel):
        return net.plan
    sessions = _sessions(net)
    plans = [s.plan for s in sessions if s.plan is not None]
    if not plans and sessions:
        steps = sessions[-1].options.calibration_steps
        raise StageError(f"the model still calibrates itself: call it until {steps} calls have been observed")
    if not plans:
        raise StageError(
            "there is no plan yet: pass what torch.compile(model, backend='smoothquant') gave, once it has been called, or "
            "what sqcompile.compile gave"
        )
    return plans[-1]


def report_of(net: Any) -> Report:
    """What was done with each linear and why, and the sites.

    Args, Raises: as `plan_of`. What single kernels are expected to gain is told of what `sqcompile.compile` gave alone.
    """
    return net.report if isinstance(net, CompiledModel) else Report.of(plan_of(net))


def compare(a: Any, b: Any) -> Comparison:
    """What two recipes do with one model: the linears that differ, and a summary. ``print`` it for a table.

    Args:
        a, b: reports, plans, or compiled models as for `report_of`, in any combination.

    Raises:
        PlanError: if they are of different models.
        StageError: for a model that has no plan.
    """
    plans = [None if isinstance(x, Report) else x if isinstance(x, Plan) else plan_of(x) for x in (a, b)]
    first, second = (x if p is None else Report.of(p) for x, p in zip((a, b), plans, strict=True))
    recipes = [None if p is None else p.recipe for p in plans]
    return compared(first, second, (recipes[0], recipes[1]))


def is_quantized(net: nn.Module) -> bool:
    """Whether a module, or a part of it, runs what was compiled to INT8, or will once it has calibrated itself."""
    dynamo, backend = sys.modules.get("sqcompile.pytorch.dynamo"), sys.modules.get("sqcompile.backend")

    def is_ours(module: nn.Module) -> bool:
        if isinstance(module, CompiledModel):
            return True
        if dynamo is None or backend is None:  # nothing was compiled by name
            return False
        if isinstance(module, dynamo.OptimizedModule) and dynamo.backend_of(module) is backend.smoothquant:
            return True
        return dynamo.backend_of_function(compiled_call(module)) is backend.smoothquant

    return any(is_ours(m) for m in net.modules())


def calibrates_itself(net: Any) -> bool:
    """Whether a module is one that the backend compiles, and whose calls it observes until there is a plan."""
    dynamo = sys.modules.get("sqcompile.pytorch.dynamo")
    optimized = dynamo is not None and isinstance(net, dynamo.OptimizedModule)
    if not optimized and compiled_call(net) is None:  # a float model, of which there may be a compiled one
        return False
    sessions = _sessions(net)
    return bool(sessions) and all(s.plan is None for s in sessions)


def _sessions(net: Any) -> list[Any]:
    """The backend's sessions of a model, or of the model that it is a layer of."""
    dynamo, backend = sys.modules.get("sqcompile.pytorch.dynamo"), sys.modules.get("sqcompile.backend.session")
    model = dynamo.original(net) if dynamo is not None and isinstance(net, dynamo.OptimizedModule) else net
    if not isinstance(model, nn.Module):
        raise StageError(f"{reprlib.repr(net)} is no module: pass the model, or what it was compiled to")
    if backend is None:
        return []
    with compiling():  # other threads may compile models of theirs
        found: list[Any] = backend.sessions_of(model)
    return found
