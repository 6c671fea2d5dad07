"""degradation: what a model loses with a plan by the user's own measure of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from sqcompile.capture.inputs import Forward
from sqcompile.compiled.emit import emit
from sqcompile.compiled.stages import Stages
from sqcompile.errors import CalibrationError
from sqcompile.kernels.targets import Target
from sqcompile.pipeline import rewrite
from sqcompile.plan.plan import Plan


def by_value(
    model: nn.Module, traced: fx.GraphModule, evaluate: Callable[[nn.Module], Any], target: Target | None = None
) -> Callable[[Plan], float]:
    """What ``evaluate`` grows by with a plan, in percent of its value for the float model; less than 0 where it falls.

    Args:
        model: the float model.
        traced: its graph.
        evaluate: the user's; it is given the model, and modules compiled without Inductor that are called like it.
        target: what they are lowered for.

    Raises:
        CalibrationError: if ``evaluate`` gives no finite number, or 0 for the float model.
    """
    before = _number(evaluate(model), "the float model")
    if before == 0:
        raise CalibrationError(
            "evaluate gives 0 for the float model, and max_degradation is percent of that: return another number, lower "
            "being better"
        )

    def degradation(plan: Plan) -> float:
        lowered = rewrite(traced, plan, "lowered", shown=False, target=target)
        compiled = emit(lowered, Forward.of(model), plan, Stages(model, traced, plan, target), "eager", False)
        after = _number(evaluate(compiled), "a quantized model", finite=False)
        return 100 * (after - before) / abs(before) if math.isfinite(after) else math.inf

    return degradation


def _number(value: Any, whose: str, finite: bool = True) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError, RuntimeError) as e:
        raise CalibrationError(f"evaluate gives {value!r} for {whose}: return one number, lower being better") from e
    if finite and not math.isfinite(found):
        raise CalibrationError(f"evaluate gives {found} for {whose}: return a finite number, lower being better")
    return found
