"""edit: a plan looked at and changed by hand: its worst linears, and some of them left in float.

    plan.keep_float(plan.worst(3))

Scales of a site that nothing quantized is left of are dropped. The others stay as they are: a linear in float that shares a
site with quantized ones still absorbs s, which its function does not feel.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from sqcompile.errors import PlanError
from sqcompile.plan.entries import LayerPlan
from sqcompile.plan.evidence import InputEvidence
from sqcompile.plan.names import linear_labels

if TYPE_CHECKING:
    from sqcompile.plan.plan import Plan

By = Literal["loss", "sqnr"]

KEPT = "kept in float by Plan.keep_float"
_INPUT = "input -> "  # how the name of a site begins whose input is multiplied


def worst(plan: Plan, n: int = 5, by: By | None = None) -> tuple[LayerPlan, ...]:
    """The quantized linears that cost most, see `Plan.worst`."""
    if type(n) is not int or n < 0:
        raise PlanError(f"worst({n!r}): pass how many linears, 0 or more")
    if by not in (None, "loss", "sqnr"):
        raise PlanError(f"worst(by={by!r}): choose 'loss' or 'sqnr', or None for the loss where the plan has it")
    done = [l for l in plan.layers if l.quantized]
    by = by or ("loss" if any(l.loss is not None for l in done) else "sqnr")
    known = [l for l in done if (l.loss if by == "loss" else l.sqnr_db) is not None]
    return tuple(sorted(known, key=lambda l: -(l.loss or 0.0) if by == "loss" else l.sqnr_db or 0.0)[:n])


def keep_float(plan: Plan, names: Any) -> Plan:
    """The plan with some linears in float, see `Plan.keep_float`."""
    chosen: set[str] = set()
    for given in _given(names):
        exact = {l.name for l in plan.layers if l.name == given}
        found = exact or {l.name for l in plan.layers if named_by(given, l.name)}
        if not found:
            raise PlanError(f"{given!r} names no linear of this plan: {_nearest(plan, given)}")
        chosen |= found
    new = in_float(plan, {l.name: _in_float(l) for l in plan.layers if l.quantized and l.name in chosen})
    if not any(l.quantized for l in new.layers):
        raise PlanError("keep_float would leave every linear in float: name fewer of them, or use the float model")
    return new


def in_float(plan: Plan, floats: dict[str, LayerPlan]) -> Plan:
    """The plan with other entries for some linears, which stay in float.

    Static Δ of attentions' values count on the scales folded into what makes them: with these, folded sites stay.

    Args:
        floats: what the plan says of the linears now, by name.
    """
    layers = tuple(floats.get(l.name, l) for l in plan.layers)
    quantized = {l.name for l in layers if l.quantized}
    folded = any(name.endswith("/value_scale") for name in plan.heads)
    kept = {
        site: _named(site, quantized)
        for site in plan.scales
        if (folded and not site.startswith(_INPUT)) or any(_balances(site, name) for name in quantized)
    }
    scales = {new: plan.scales[site] for site, new in kept.items()}
    columns = {n: s for n, s in plan.columns.items() if n not in floats}
    shifts = shifts_of(plan.shifts, quantized)
    evidence = plan.evidence
    if evidence is not None:
        undivided = {site.partition(" -> ")[0] for site in plan.scales if site not in kept}
        inputs = tuple(
            # a page says of an input what is so of the first linear that reads it
            dataclasses.replace(
                i,
                site=_named(i.site, quantized),
                linears=tuple(sorted(i.linears, key=lambda name: name not in quantized)),
                undivided=tuple(name for name in i.linears if name in undivided or name in i.undivided),
            )
            if quantized.intersection(i.linears)
            else _not_quantized(i)
            for i in evidence.inputs
        )
        curves = {_named(site, quantized): c for site, c in evidence.curves.items()}
        evidence = dataclasses.replace(evidence, inputs=inputs, curves=curves)
    return dataclasses.replace(plan, layers=layers, scales=scales, columns=columns, evidence=evidence, shifts=shifts)


def shifts_of(shifts: Mapping[str, Tensor], quantized: Collection[str]) -> dict[str, Tensor]:
    """Without the shifts of norms that no quantized linear reads; float ones beside quantized ones keep them."""
    taken = [c for n, c in shifts.items() if n in quantized]
    return {n: c for n, c in shifts.items() if any(c is t or torch.equal(c.cpu(), t.cpu()) for t in taken)}


def _not_quantized(i: InputEvidence) -> InputEvidence:
    """What is known of a tensor that linears in float read: it is the same afterwards, and has no codes."""
    return dataclasses.replace(
        i, site="", clipped=None, zeros=None, ratio=(i.ratio[0], i.ratio[0]), absmax=i.absmax[[0, 0, 2, 2]],
        values=i.values[[0, 0, 2, 2]], heat=i.heat[[0, 0]], tops=(i.tops[0], i.tops[0]), codes=i.codes * 0, undivided=(),
    )  # fmt: skip


def _named(site: str, quantized: Collection[str]) -> str:
    """The name of a site where only some linears are quantized: that of a multiplied input names these alone."""
    readers = [name for name in site.removeprefix(_INPUT).split(", ") if name in quantized]
    return _INPUT + ", ".join(readers) if site.startswith(_INPUT) and readers else site


def _balances(site: str, name: str) -> bool:
    """Whether a linear is one of those in the name of a site, "producer -> linear, linear"."""
    return f", {name}, " in f", {site.partition(' -> ')[2]}, "


def named_by(pattern: str, name: str) -> bool:
    """Whether a pattern of ``Recipe.skip`` names a linear, by its weight or its module."""
    module = name.partition("#")[0].rpartition(".")[0] or name
    return fnmatch.fnmatch(module, pattern) or named(pattern, name)


def named(pattern: str, name: str) -> bool:
    """Whether a pattern of ``Recipe.skip`` names something: as a glob, or as dotted parts of its name."""
    return fnmatch.fnmatch(name, pattern) or f".{pattern}." in f".{name}."


def _given(names: Any) -> list[str]:
    """Names and patterns, from what a user passes: one or several of them, or entries of a plan."""
    given = [names] if isinstance(names, (str, LayerPlan)) else list(names) if isinstance(names, Iterable) else [names]
    found = [x.name if isinstance(x, LayerPlan) else x for x in given]
    if not found or not all(isinstance(x, str) and x for x in found):
        raise PlanError(
            f"keep_float({names!r}): pass names or patterns of linears, such as '*.down_proj', or what plan.worst() gives"
        )
    return found


def _in_float(l: LayerPlan) -> LayerPlan:
    return LayerPlan(l.name, l.kind, False, "none", KEPT, shape=l.shape, loss=l.loss)


def _nearest(plan: Plan, given: str) -> str:
    """What a user may have meant."""
    names = [l.name for l in plan.layers]
    known = dict.fromkeys(
        x for n in names for x in (n.removesuffix(".weight"), n.removesuffix(".weight").rpartition(".")[2])
    )
    wanted = given.removesuffix(".weight").strip("*.") or given
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
    if near:
        return f"the nearest names are {', '.join(near)}"
    labels = [*linear_labels(names).values()]
    return f"its linears are {', '.join(labels[:4])}{', ...' if len(labels) > 4 else ''}"
