"""replan: what a plan comes to in a checkpoint, which has new values for parameters and nothing else.

Before:  scales {"g -> q, k": s, "input -> o": s}, o rotated, down with a static Δ of its rotated input
After:   scales {"g -> q, k": s}, o as it is, down with a scale for each token

An explicit x·(1/s) and a rotation are operations, for which a model of another tool has no place. Nor has it two values
for one parameter, or a bias that the float model has not. Such sites lose their smoothing or their shift; without the shift, s is recomputed for the whole input. Rotations are
dropped. A static scale that was calibrated on what the input would have been is none for what it is now: the linear gets a scale for
each token instead, which needs no calibration.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from sqcompile.checkpoints.parameters import Parameters, find_parameters
from sqcompile.passes.ir.graph import effective_weight, find_linears, nodes_by_name
from sqcompile.passes.labels.match import match
from sqcompile.passes.labels.shiftable import shiftable
from sqcompile.passes.planning.products import column_absmax
from sqcompile.passes.rewrite.shift import groups_of
from sqcompile.pipeline import rewrite
from sqcompile.plan.checks import LARGEST_SCALE
from sqcompile.plan.entries import AttentionPlan, LayerPlan
from sqcompile.plan.names import refusal_lines
from sqcompile.plan.plan import Plan

UNSHIFTED = "keeps the mean of its input"
ROTATED = "is not rotated, as no parameter can do that"
MULTIPLIED = "is not smoothed, as no parameter can absorb 1/s"


@dataclass(frozen=True)
class Changed:
    """What is other in a checkpoint than a plan says, and why: of a linear or an attention, by its name in the plan."""

    name: str
    what: str


def representable(traced: fx.GraphModule, plan: Plan, saved: set[str]) -> tuple[Plan, Parameters, list[Changed]]:
    """The nearest plan that a checkpoint of the float model can express.

    Args:
        traced: the graph of the model.
        plan: for it.
        saved: the names of what a checkpoint of the model holds.

    Returns:
        The plan, the folded graph with the new values of its parameters, and what was changed.

    Raises:
        PlanError: for a plan of another model.
    """
    rotated = [l.name for l in plan.layers if l.rotation is not None]
    changed = [Changed(name, ROTATED) for name in rotated]
    plan = _with_layers(plan, {name: {"rotation": None} for name in rotated})
    balance = {s.name: [l.name for l, _ in s.balance] for s in match(traced)[0]}
    explicit = {name: MULTIPLIED for name in plan.scales if name not in balance and name.startswith("input -> ")}
    multiplied = {l.name: MULTIPLIED for l in plan.layers if l.quantized and l.smoothing == "multiplied"}
    plan, more = _unsmoothed(plan, explicit, balance, multiplied)
    changed += more
    while True:
        found = find_parameters(traced, rewrite(traced, plan, "folded", shown=False), saved)
        if not found.failed:
            return plan, found, changed
        plan, more = _unshifted(traced, plan, found) or _drop(plan, found, balance)
        changed += more


def lines_of(changed: Iterable[Changed], plan: Plan) -> list[str]:
    """What was changed, in words: a line for each reason and repeated block."""
    names = [l.name for l in plan.layers] + [a.name for a in plan.attention]
    return refusal_lines([(c.name, c.what) for c in changed], names)


def as_float(l: LayerPlan, why: str) -> LayerPlan:
    """A linear that stays in float."""
    left = dict.fromkeys(("alpha", "sqnr_db", "input_scale", "rotation", "activation", "weight", "loss"))
    return dataclasses.replace(l, quantized=False, smoothing="none", reason=why, **left)  # type: ignore[arg-type]


def per_token(l: LayerPlan, **changes: object) -> LayerPlan:
    """A linear with a scale for each token in the place of a static one."""
    if l.input_scale is not None:
        changes |= {"input_scale": None, "activation": "per_token"}
    return dataclasses.replace(l, **changes)  # type: ignore[arg-type]


def _with_layers(plan: Plan, changes: Mapping[str, Mapping[str, object]]) -> Plan:
    """Other fields for linears whose input becomes another."""
    stale: dict[str, object] = {"sqnr_db": None, "loss": None}
    layers = tuple(per_token(l, **{**stale, **changes[l.name]}) if l.name in changes else l for l in plan.layers)
    return dataclasses.replace(plan, layers=layers)


def _unsmoothed(
    plan: Plan, sites: Mapping[str, str], balance: Mapping[str, list[str]], linears: Mapping[str, str]
) -> tuple[Plan, list[Changed]]:
    """Without the scales of some sites, each with the reason, and without smoothing of some linears beside theirs."""
    why = {name: reason for site, reason in sites.items() for name in balance.get(site, ())} | dict(linears)
    quantized = {l.name for l in plan.layers if l.quantized}
    plan = _with_layers(plan, {n: {"smoothing": "none", "alpha": None, "reason": why[n]} for n in why})
    scales = {name: s for name, s in plan.scales.items() if name not in sites}
    columns = {name: s for name, s in plan.columns.items() if name not in why}
    return dataclasses.replace(plan, scales=scales, columns=columns), [
        Changed(n, why[n]) for n in why if n in quantized
    ]


def _unshifted(traced: fx.GraphModule, plan: Plan, found: Parameters) -> tuple[Plan, list[Changed]] | None:
    """The plan without shifts that no parameter can express; None if there are none.

    Without a shift, a scale may be one that a parameter expresses again.
    """
    groups = groups_of(find_linears(traced), plan.shifts, shiftable(traced, match(traced)[0])) if plan.shifts else []
    failed = {i: reason for scales, reason in found.failed for kind, i in sorted(scales) if kind == "shift"}
    why = {l.name: f"{UNSHIFTED}: {reason}" for i, reason in failed.items() for l in groups[i][1]}
    if not why:
        return None
    layers, nodes = {l.name: l for l in plan.layers if l.quantized}, nodes_by_name(traced)
    plan = _with_layers(plan, {n: {"reason": why[n]} for n in layers.keys() & why.keys()})
    scales, columns = dict(plan.scales), dict(plan.columns)
    for site in match(traced)[0]:
        mine = [l for l, _ in site.balance if l.name in layers]
        alpha = next((layers[l.name].alpha for l in mine), None)
        if alpha and site.name in scales and all(l.name in why for l in mine):
            absmax = torch.stack([column_absmax(effective_weight(traced, l, nodes)) for l in mine]).amax(0).cpu()
            s = _of_whole(scales[site.name].cpu(), plan.shifts[mine[0].name].cpu(), absmax, alpha)
            scales[site.name] = s
            columns |= {l.name: s for l in mine if l.name in columns}
    shifts = {n: c for n, c in plan.shifts.items() if n not in why}
    changed = [Changed(n, why[n]) for n in why if n in layers]
    return dataclasses.replace(plan, shifts=shifts, scales=scales, columns=columns), changed


def _of_whole(s: Tensor, c: Tensor, w_absmax: Tensor, alpha: float) -> Tensor:
    """s of inputs X, from that of X - c: max|X_j| is at most |c_j| more than what s = max|X_j - c_j|^α / max|W_:j|^(1-α) says."""
    largest = (s * w_absmax.pow(1 - alpha)).pow(1 / alpha)
    more = ((largest + c.abs()) / largest).pow(alpha)
    return (s * torch.where(more.isfinite(), more, 1.0)).clamp(1 / LARGEST_SCALE, LARGEST_SCALE)


def _drop(plan: Plan, found: Parameters, balance: Mapping[str, list[str]]) -> tuple[Plan, list[Changed]]:
    """Without the scales that no new values of parameters express."""
    # in the order of the graph, as `fold` counts them: a plan that was read has another
    sites = [name for name in balance if name in plan.scales]
    attentions = [a.name for a in plan.attention if f"{a.name}/scale" in plan.heads]
    why: dict[tuple[str, int], str] = {}
    for scales, reason in found.failed:
        for one in scales:
            why.setdefault(one, f"is not smoothed, as {reason}")
    plan, changed = _unsmoothed(plan, {sites[i]: r for (kind, i), r in why.items() if kind == "smooth"}, balance, {})
    gone = {attentions[i]: reason for (kind, i), reason in why.items() if kind == "heads"}
    heads = {n: t for n, t in plan.heads.items() if n.rpartition("/")[0] not in gone}
    attention = tuple(_float_attention(a, gone[a.name]) if a.name in gone else a for a in plan.attention)
    changed += [Changed(name, reason) for name, reason in gone.items()]
    return dataclasses.replace(plan, heads=heads, attention=attention), changed


def _float_attention(a: AttentionPlan, why: str) -> AttentionPlan:
    left = dict.fromkeys(("alpha", "sqnr_db", "q_scale", "k_scale"))
    return dataclasses.replace(a, quantized="none", smoothing="none", reason=why, **left)  # type: ignore[arg-type]
