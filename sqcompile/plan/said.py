"""said: a plan in one line, and as Jupyter shows it; counts and numbers of plans in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sqcompile.plan.entries import AttentionPlan, LayerPlan
from sqcompile.plan.notebook import line, table, titled

if TYPE_CHECKING:
    from sqcompile.plan.plan import Plan

_SHOWN = 5  # of the worst linears


def said(plan: Plan) -> str:
    """A plan in one line."""
    return f"Plan({', '.join(counted(plan))}; {plan.recipe!r})"


def counted(plan: Plan) -> list[str]:
    """How much a plan quantizes and smooths, in words."""
    found = [
        linears_in(plan.layers, plan.recipe.dtype),
        f"{len(plan.scales)} site{'' if len(plan.scales) == 1 else 's'} smoothed",
    ]
    found += [f"{len(plan.shifts)} linear{'' if len(plan.shifts) == 1 else 's'} shifted"] if plan.shifts else []
    found += [attentions_in(plan.attention)] if plan.attention else []
    found += [] if plan.shard is None else [f"the shard of {plan.shard}"]
    known = [l.sqnr_db for l in plan.layers if l.quantized and l.sqnr_db is not None]
    return [*found, f"lowest SQNR {decibels(min(known))}"] if known else found


def linears_in(layers: Sequence[LayerPlan], dtype: str) -> str:
    """How many linears run in the number format."""
    return f"{sum(l.quantized for l in layers)} of {len(layers)} linears in {dtype.upper()}"


def attentions_in(attention: Sequence[AttentionPlan]) -> str:
    """How many attentions run in INT8, the one number format they have."""
    return f"{sum(a.quantized != 'none' for a in attention)} of {len(attention)} attentions in INT8"


def decibels(db: float, unit: str = " dB") -> str:
    """A signal to noise ratio; of no noise at all, "exact"."""
    return "exact" if db == math.inf else f"{db:.1f}{unit}"


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
            "" if l.sqnr_db is None else decibels(l.sqnr_db, ""),
            "" if l.loss is None else f"{l.loss:.2e}",
        )
        for l in layers
    ]
    return table(["linear", "smoothing", "α", "rotation", "SQNR, dB", "loss"], rows, right=(2, 3, 4, 5))
