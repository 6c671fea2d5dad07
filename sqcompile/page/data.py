"""data: what the page's scripts draw, as JSON: columns of short numbers, and base64 of the tensors of the evidence."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sqcompile.page.charts import HEAT_DEPTH, HEAT_SHEAR
from sqcompile.page.facts import inputs_of, is_dynamic
from sqcompile.plan.evidence import CODES, OCTAVES, Curve, Evidence, InputEvidence
from sqcompile.plan.names import linear_labels, site_labels
from sqcompile.plan.plan import Plan


def data_of(plan: Plan) -> dict[str, Any]:
    """Everything that is drawn or listed, for `page.js`."""
    inputs = inputs_of(plan)
    evidence = plan.evidence or Evidence()
    site = {name: i for i, found in enumerate(inputs) for name in found.linears}
    reasons = list(dict.fromkeys(l.reason for l in plan.layers))
    place = {reason: i for i, reason in enumerate(reasons)}
    at = {l.name: i for i, l in enumerate(plan.layers)}
    labels = _labels(plan, inputs)
    return {
        "dtype": plan.recipe.dtype.upper(),
        "logits": evidence.logits,
        "layers": {
            "name": [l.name for l in plan.layers],
            "quantized": [int(l.quantized) for l in plan.layers],
            "smoothing": [l.smoothing for l in plan.layers],
            "alpha": [l.alpha for l in plan.layers],
            "rotation": [l.rotation for l in plan.layers],
            "sqnr": [short(l.sqnr_db) for l in plan.layers],
            "exact": [int(l.sqnr_db == math.inf) for l in plan.layers],
            "loss": [short(l.loss) for l in plan.layers],
            "shape": [list(l.shape) for l in plan.layers],
            "reason": [place[l.reason] for l in plan.layers],
            "site": [site.get(l.name, -1) for l in plan.layers],
        },
        "reasons": reasons,
        "overrides": [[pattern, dict(fields)] for pattern, fields in plan.recipe.by_pattern],
        "sites": [_site(found, labels[i], at, _curve(evidence, found), plan) for i, found in enumerate(inputs)],
        "heat": {"depth": HEAT_DEPTH, "shear": HEAT_SHEAR, "octaves": OCTAVES},
        "codes": CODES,
    }


def _labels(plan: Plan, inputs: Sequence[InputEvidence]) -> list[str]:
    """Of each input, what a person would call it."""
    sites = {s.key: str(s) for s in site_labels({i.site for i in inputs if i.site}, [l.name for l in plan.layers])}
    linears = linear_labels(l.name for l in plan.layers)
    return [sites[i.site] if i.site else f"{', '.join(linears[n] for n in i.linears)} (float)" for i in inputs]


def label_of(plan: Plan, found: InputEvidence) -> str:
    """What a person would call an input."""
    return _labels(plan, [found])[0]


def _curve(evidence: Evidence, found: InputEvidence) -> Curve | None:
    return evidence.curves.get(found.site) if found.site else None


def _site(i: InputEvidence, label: str, at: dict[str, int], curve: Curve | None, plan: Plan) -> dict[str, Any]:
    first = plan.layers[at[i.linears[0]]]
    return {
        "dynamic": int(is_dynamic(plan, first)),
        "label": label,
        "linears": [at[n] for n in i.linears],
        "channels": i.channels,
        "tokens": i.tokens,
        "dead": i.dead,
        "silent": i.silent,
        "spikes": i.spikes,
        "undivided": [at[n] for n in i.undivided],
        "ratio": [short(r) for r in i.ratio],
        "clipped": i.clipped,
        "zeros": i.zeros,
        "width": i.width,
        "absmax": _base64(i.absmax.view(torch.int16)),
        "deadAt": [[b, int(i.dead_in[b])] for b in i.dead_in.nonzero().flatten().tolist()],
        "largest": i.largest.tolist(),
        "values": [[short(x) for x in row] for row in i.values.tolist()],
        "cells": i.cells,
        "rows": i.heat.shape[1],
        "heat": _base64(i.heat),
        "tops": list(i.tops),
        "codes": _shares(i.codes),
        "curve": None
        if curve is None
        else {
            "loss": int(curve.by_loss),
            "tried": [[t.alpha, t.rotation, int(t.dynamic), t.cost] for t in curve.tried],
        },
    }


def _shares(codes: Tensor) -> list[list[float]]:
    """Percent of the values in each bin, of activations and of weights; empty where nothing was rounded."""
    totals = codes.sum(1).tolist()
    return [
        [round(100 * x / total, 3 if x < total / 100 else 2) for x in row] if total else []
        for row, total in zip(codes.tolist(), totals, strict=True)
    ]


def _base64(t: Tensor) -> str:
    return base64.b64encode(t.contiguous().numpy().tobytes()).decode()


def short(x: float | None) -> float | None:
    """Three digits; None for what JSON has no number for."""
    return None if x is None or not math.isfinite(x) else float(f"{x:.3g}")
