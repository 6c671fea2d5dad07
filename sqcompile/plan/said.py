"""said: a plan in one line, and as Jupyter shows it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sqcompile.plan.entries import LayerPlan
from sqcompile.plan.notebook import line, table, titled

if TYPE_CHECKING:
    from sqcompile.plan.plan import Plan

_SHOWN = 5  # of the worst linears


def said(plan: Plan) -> str:
    """A plan in one line."""
    return f"Plan({', '.join(counted(plan))}; {plan.recipe!r})"


def counted(plan: Plan) -> list[str]:
    """How much a plan quantizes and smooths, in words."""
    done = [l for l in plan.layers if l.quantized]
    found = [
        f"{len(done)} of {len(plan.layers)} linears in {plan.recipe.dtype.upper()}",
        f"{len(plan.scales)} site{'' if len(plan.scales) == 1 else 's'} smoothed",
    ]
    if plan.attention:
        found.append(
            f"{sum(a.quantized != 'none' for a in plan.attention)} of {len(plan.attention)} attentions in INT8"
        )
    lowest = min((l.sqnr_db for l in done if l.sqnr_db is not None), default=math.inf)
    return [*found, f"lowest SQNR {lowest:.1f} dB"] if math.isfinite(lowest) else found


def shown(plan: Plan) -> str:
    """HTML: what was asked for, what was decided, and the linears that cost most."""
    worst = plan.worst(_SHOWN)
    parts = [plan.recipe._repr_html_()]
    if worst:
        parts += [line("The linears that cost most:"), _layers(worst)]
    return titled(f"Plan: {', '.join(counted(plan))}", *parts)


def _layers(layers: Sequence[LayerPlan]) -> str:
    rows = [
        (
            l.name,
            l.smoothing,
            "" if l.alpha is None else f"{l.alpha:.2f}",
            l.rotation,
            "" if l.sqnr_db is None else f"{l.sqnr_db:.1f}",
            "" if l.loss is None else f"{l.loss:.2e}",
        )
        for l in layers
    ]
    return table(["linear", "smoothing", "α", "rotation", "SQNR, dB", "loss"], rows, right=(2, 3, 4, 5))
