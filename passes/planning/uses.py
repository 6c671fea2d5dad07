"""uses: a weight or an attention that a model uses several times, in a graph that has only some of these uses.

    %a = linear(%x, %w)                             # the plan has "w" for this use, and "w#2" for one in another graph
->
    layers: LayerPlan(name=w, kind=linear, quantized=True, smoothing=multiplied,
        reason=this graph does not tell it from its other uses, input_scale=0.3125, shape=[4, 4])
    columns: {w: [4, 3, 3, 4]}                      # of [1, 2, 3, 4] and [4, 3, 2, 1]

Uses are numbered in the order of a graph. One that holds all of them has the plan's numbers. One that holds fewer, or more,
could take one use for another, whose scales clip its input: there, all uses are treated alike, in a way that is right for
each. Analysis only.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from sqcompile.passes.attention.chains import Attention
from sqcompile.passes.ir.graph import Linear
from sqcompile.plan.entries import AttentionPlan, LayerPlan
from sqcompile.plan.plan import Plan

_Use = TypeVar("_Use", LayerPlan, AttentionPlan)

# Static scales that are further apart than this are no scale for all: one is measured at run time instead.
APART = 2.0

_WHY = "this graph does not tell it from its other uses"


def as_used(plan: Plan, linears: Sequence[Linear], attentions: Sequence[Attention]) -> Plan:
    """The plan of a model, for a graph that may hold some of the uses of a weight or of an attention, and not all.

    Args:
        plan: of the whole model.
        linears: of the graph.
        attentions: of the graph.
    """
    return _attentions(_linears(plan, linears), attentions)


def first_use(name: str) -> str:
    """The name of the first use of what a name is a use of."""
    return name.partition("#")[0]


def _linears(plan: Plan, linears: Sequence[Linear]) -> Plan:
    planned = _by(plan.layers, first_use)
    unsure = _unsure([l.name for l in linears], planned, first_use)
    columns = {name: s for name, s in plan.columns.items() if first_use(name) not in unsure}
    layers = [l for l in plan.layers if first_use(l.name) not in unsure]
    for l in linears:
        same = [p for p in planned[first_use(l.name)] if p.shape == l.shape] if first_use(l.name) in unsure else []
        if same:
            shifted = any(p.name in plan.shifts for p in same)  # which those that are not told from others are not
            layer, s = _joint(l.name, same, [plan.columns.get(p.name) for p in same], shifted)
            layers.append(layer)
            columns |= {} if s is None else {l.name: s}
    scales = {name: s for name, s in plan.scales.items() if unsure.isdisjoint(map(first_use, balanced(name)))}
    if not unsure:
        return plan
    shifts = {name: c for name, c in plan.shifts.items() if first_use(name) not in unsure}
    return dataclasses.replace(plan, layers=tuple(layers), columns=columns, scales=scales, shifts=shifts)


def balanced(site: str) -> list[str]:
    """The linears in the name of a site."""
    return site.partition(" -> ")[2].split(", ")


def _joint(
    name: str, uses: list[LayerPlan], columns: list[Tensor | None], shifted: bool
) -> tuple[LayerPlan, Tensor | None]:
    """One plan for several uses, and its s.

    With one α, the largest s of each channel is what the statistics of all uses together would give. It divides inputs by
    more than each use's own, so that the largest Δx clips none.
    """
    if not all(u.quantized for u in uses):
        use = next(u for u in uses if not u.quantized)
        return dataclasses.replace(use, name=name, reason=f"{_WHY}, of which one stays in float: {use.reason}"), None
    known = [s for u, s in zip(uses, columns, strict=True) if s is not None and u.smoothing != "none"]
    smoothed = len(known) == len(uses)
    deltas = [u.input_scale for u in uses if u.input_scale is not None]
    static = len(deltas) == len(uses) and (smoothed or not known) and max(deltas) <= APART * min(deltas) and not shifted
    layer = dataclasses.replace(
        uses[0],
        name=name,
        smoothing="multiplied" if smoothed else "none",
        reason=_WHY,
        input_scale=max(deltas) if static else None,
        activation=uses[0].activation if static or not deltas else "per_token",
    )
    return layer, torch.stack(known).amax(0) if smoothed else None


def _attentions(plan: Plan, attentions: Sequence[Attention]) -> Plan:
    def module(name: str) -> str:
        """Which module an attention is in; those that no projection gives a name are uses of one that is nowhere."""
        first = first_use(name)
        return first if any(l.name.startswith(f"{first}.") for l in plan.layers) else ""

    planned = _by(plan.attention, module)
    unsure = _unsure([a.name for a in attentions], planned, module)
    if not unsure:
        return plan
    found = [a for a in plan.attention if module(a.name) not in unsure]
    heads = {k: t for k, t in plan.heads.items() if module(k.rpartition("/")[0]) not in unsure}
    for a in attentions:
        if module(a.name) not in unsure:
            continue
        first, *others = planned[module(a.name)]
        alike = all(_treated(plan, other) == _treated(plan, first) for other in others)
        if alike and not a.refused and first.shape == (a.heads, a.groups, a.width):
            found.append(dataclasses.replace(first, name=a.name))
            heads |= {f"{a.name}/{what}": t for what, t in _tensors(plan, first).items()}
        else:
            found.append(dataclasses.replace(first, name=a.name, quantized="none", smoothing="none", reason=_WHY))
    return dataclasses.replace(plan, attention=tuple(found), heads=heads)


def _treated(plan: Plan, a: AttentionPlan) -> object:
    """What is done with an attention, to compare."""
    tensors = {what: t.tolist() for what, t in _tensors(plan, a).items()}
    return dataclasses.replace(a, name="", reason="", alpha=None, sqnr_db=None), tensors


def _tensors(plan: Plan, a: AttentionPlan) -> dict[str, Tensor]:
    return {k.rpartition("/")[2]: t for k, t in plan.heads.items() if k.rpartition("/")[0] == a.name}


def _by(plans: Iterable[_Use], of: Callable[[str], str]) -> dict[str, list[_Use]]:
    found: dict[str, list[_Use]] = {}
    for p in plans:
        found.setdefault(of(p.name), []).append(p)
    return found


def _unsure(names: Sequence[str], planned: dict[str, list[_Use]], of: Callable[[str], str]) -> set[str]:
    """What a graph uses another number of times than the plan has."""
    return {name for name, n in Counter(map(of, names)).items() if len(planned.get(name, [])) not in (0, n)}
