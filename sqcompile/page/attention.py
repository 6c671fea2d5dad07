"""attention: what a page says of each attention: which of its products run in INT8, its scales, its error, and why."""

from __future__ import annotations

import math
import re

from torch import Tensor

from sqcompile.plan.entries import AttentionPlan
from sqcompile.plan.names import PRODUCTS
from sqcompile.plan.plan import Plan
from sqcompile.plan.said import decibels

HEADINGS = ("Attention", "Runs in", "Heads × channels", "Smoothing", "Scales", "SQNR of the scores", "Why")

_EACH = {"per_token": "one for each token and head", "per_head": "one for each head", "per_tensor": "one for all heads"}


def attention_rows(plan: Plan) -> list[tuple[str, ...]]:
    """A row for each attention of a plan, as the `HEADINGS` say."""
    return [
        (
            a.name,
            PRODUCTS[a.quantized].replace("int8", "INT8"),
            _heads(a),
            _smoothing(a, plan),
            _scales(a, plan),
            "" if a.quantized == "none" else "not known" if a.sqnr_db is None else decibels(a.sqnr_db),
            re.sub(rf"(?<![\w.]){re.escape(a.name)}\.", "", a.reason).replace(".weight", ""),
        )
        for a in plan.attention
    ]


def _heads(a: AttentionPlan) -> str:
    heads, groups, width = a.shape
    keys = "" if heads == groups else f", keys {groups} × {width}"
    return f"{heads} × {width}{keys}" if math.prod(a.shape) else ""


def _smoothing(a: AttentionPlan, plan: Plan) -> str:
    """How queries and keys are changed before they are quantized."""
    if a.quantized == "none":
        return ""
    parts = [a.smoothing if a.alpha is None else f"{a.smoothing}, α {a.alpha:.2f}"]
    if (by := plan.heads.get(f"{a.name}/query_by")) is not None:
        parts.append(f"s {_range(by)}")
    return ", ".join(parts)


def _scales(a: AttentionPlan, plan: Plan) -> str:
    """Δ of queries and keys, and of values where PV runs in INT8."""
    if a.quantized == "none":
        return ""
    if a.q_scale and a.k_scale:
        parts = [f"static: Q {a.q_scale:.3g}, K {a.k_scale:.3g}"]
    else:
        parts = [f"Q and K {_EACH.get(plan.recipe.granularity, 'at run time')}"]
    if (values := plan.heads.get(f"{a.name}/value_scale")) is not None:
        parts.append(f"V {_range(values)}")
    elif a.quantized == "qk_pv":
        parts.append("V one for each channel")
    return ", ".join(parts)


def _range(s: Tensor) -> str:
    low, high = float(s.min()), float(s.max())
    return f"{low:.3g} to {high:.3g}" if low < high else f"{low:.3g}"
