"""decide: the plan of a model that has calibrated itself, from the statistics of all its graphs.

What a linear or an attention has seen is what it has seen in every graph that has it: prefill and decode, or the calls
before and after a recompilation. Of an attention with a KV cache only the new keys and values of each call count.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import fx

from sqcompile.capture.call_spec import to_spec
from sqcompile.capture.inputs import Call
from sqcompile.errors import NothingToQuantizeError
from sqcompile.passes.attention.chains import find_attentions
from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import find_linears
from sqcompile.passes.labels.match import match
from sqcompile.passes.planning.budget import by_divergence, within_budget
from sqcompile.passes.planning.choice import Known
from sqcompile.passes.planning.choose import choose
from sqcompile.passes.planning.dearest import leave_dearest
from sqcompile.passes.planning.end_to_end import smoothed_or_not
from sqcompile.passes.planning.evidence import with_evidence
from sqcompile.passes.planning.feel import feel
from sqcompile.passes.planning.overrides import names_linear
from sqcompile.passes.planning.shifts import choose_shifts, shifted
from sqcompile.passes.planning.stay_float import float_layer, stay_float, wanted
from sqcompile.passes.planning.uses import APART, as_used, balanced, first_use
from sqcompile.passes.rewrite.weight_store import Shared
from sqcompile.pipeline import on_trial
from sqcompile.plan.entries import LayerPlan
from sqcompile.plan.plan import Plan
from sqcompile.plan.recipe import LM_HEAD, Recipe
from sqcompile.plan.shards import shard_of
from sqcompile.statistics.input_stats import InputStats
from sqcompile.statistics.observe import Calibration
from sqcompile.statistics.observer import Observer


def decide(observers: Sequence[Observer], recipe: Recipe, calls: int) -> Plan:
    """The plan for all graphs that were observed.

    Args:
        observers: one for each graph, with what it has seen.
        recipe: the user's choices.
        calls: of the model that were observed.

    Raises:
        NothingToQuantizeError: if no linear would run in INT8.
    """
    inputs: dict[str, InputStats] = {}
    heads: dict[tuple[str, str], InputStats] = {}  # by attention and operand, as nodes are named by their graph
    several: set[str] = set()  # of several sizes under one name: parts of one parameter, in graphs of their own
    for o in observers:
        for name, found in o.found().items():
            if name in inputs and not inputs[name].alike(found):
                several.add(name)
            else:
                inputs[name] = inputs[name].merged(found) if name in inputs else found
        for a in o.attentions:
            for side, node in a.operands.items():
                if node in o.heads:
                    before, found = heads.get((a.name, side)), o.heads[node]
                    if before is not None and not before.alike(found):
                        several.add(a.name)
                    else:
                        heads[a.name, side] = found if before is None else before.merged(found)
    inputs = {name: found for name, found in inputs.items() if name not in several}
    heads = {key: found for key, found in heads.items() if key[0] not in several}
    ordered = sorted(observers, key=lambda o: -len(o.linears))
    graphs: list[Any] = [o.module for o in ordered]
    plan: Plan | None = None
    floats: list[LayerPlan] = []  # of graphs where nothing is quantized: a head behind a graph break
    error: Exception | None = None
    for o, gm in zip(ordered, graphs, strict=True):
        known = {l.name for l in plan.layers} if plan else set()
        if all(l.name in known for l in o.linears):
            continue
        sites, refusals = match(gm)
        nodes = {
            node: heads[a.name, side]
            for a in o.attentions
            for side, node in a.operands.items()
            if (a.name, side) in heads
        }
        calibration = Calibration(inputs, calls, nodes, o.sample)
        own, call = _for_graph(recipe, graphs, gm), to_spec(Call((), {}))
        try:
            with torch.no_grad():
                felt, known_of = feel(gm, sites, refusals, calibration, own), Known()
                shifts = choose_shifts(gm, sites, calibration, own, known_of)
                calibration, felt = shifted(shifts, calibration, felt)
                plan_of = partial(
                    choose, gm, sites, refusals, calibration, own, call, o.attentions, felt=felt, known=known_of,
                    shifts=shifts,
                )  # fmt: skip
                more = smoothed_or_not(plan_of, calibration.sample, partial(_quantized, gm), about(gm).parallel)
                if recipe.max_degradation is not None:
                    loses = by_divergence(gm, calibration.sample, partial(_quantized, gm))
                    more = within_budget(gm, more, calibration, loses)
                more = leave_dearest(gm, more, calibration)
                more = with_evidence(gm, sites, refusals, calibration, more)
        except NothingToQuantizeError as e:
            error = e
            reasons = stay_float(gm, o.linears, calibration, own)
            floats += [float_layer(l, reasons.get(l.name, "left in float by max_degradation")) for l in o.linears]
            continue
        plan = more if plan is None else _joined(plan, more)
    if plan is None:
        raise error or NothingToQuantizeError("nothing to quantize: the observed graphs have no linear")
    known = {l.name for l in plan.layers}
    layers = plan.layers + tuple({l.name: l for l in floats if l.name not in known}.values())
    shards = (shard_of(about(gm).parallel) for gm in graphs)  # some graphs of a sharded model may read no shard
    return replace(plan, recipe=recipe, layers=layers, shard=next(filter(None, shards), None))


def _quantized(gm: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    return on_trial(gm, plan, Shared(identity=id, check=lambda _: None))


def measured(plan: Plan, observers: Sequence[Observer], torn: Collection[str]) -> Plan:
    """The plan without static scales for weights whose uses in one call are in several graphs, and see inputs far apart.

    Args:
        plan: of `decide`.
        observers: as there.
        torn: first uses of the weights that several graphs of one call read.
    """
    apart = {name for name in torn if _apart(name, observers)}
    static = (l.input_scale is not None and first_use(l.name) in apart for l in plan.layers)
    layers = (
        replace(l, input_scale=None, activation="per_token") if s else l
        for l, s in zip(plan.layers, static, strict=True)
    )
    return replace(plan, layers=tuple(layers))


def _apart(name: str, observers: Sequence[Observer]) -> bool:
    seen = [s.absmax.max() for o in observers for use, s in o.found().items() if first_use(use) == name]
    return bool(seen) and bool(max(seen) > APART * min(seen))


def completed(plan: Plan, gm: fx.GraphModule) -> tuple[Plan, list[str]]:
    """The plan of a model that has calibrated itself, for a graph that it had not run then.

    Returns:
        The plan with linears that it did not know, in float; and the names of those that it would have quantized.
    """
    linears, attentions = find_linears(gm), find_attentions(gm) if plan.recipe.attention != "none" else []
    plan = as_used(plan, linears, attentions)
    shapes = {l.name: l.shape for l in plan.layers}
    new = {l.name: l for l in linears if shapes.get(l.name) != l.shape}
    layers = [l for l in plan.layers if l.name not in new]
    layers += [float_layer(l, "no call reached it while the model calibrated itself") for l in new.values()]
    known = {a.name for a in plan.attention}
    unseen = [l.name for l in wanted(gm, linears, plan.recipe) if l.name in new]
    unseen += [a.name for a in attentions if not a.refused and a.name not in known]
    return replace(plan, layers=tuple(layers)), unseen


def _for_graph(recipe: Recipe, graphs: list[fx.GraphModule], gm: fx.GraphModule) -> Recipe:
    """The recipe with the patterns that name linears of this graph; one that no graph has is left for `choose` to refuse."""

    def named(pattern: str, where: fx.GraphModule) -> bool:
        return any(names_linear(where, l, pattern) for l in find_linears(where))

    def stays(p: str) -> bool:
        return p == LM_HEAD or named(p, gm) or not any(named(p, g) for g in graphs)

    skip, overrides = filter(stays, recipe.skip), (o for o in recipe.by_pattern if stays(o[0]))
    return replace(recipe, skip=tuple(skip), overrides=tuple(overrides))


def _joined(plan: Plan, more: Plan) -> Plan:
    """Both plans' layers and attentions; where both have one, the first's."""
    known, attended = {l.name for l in plan.layers}, {a.name for a in plan.attention}
    layers = tuple(l for l in more.layers if l.name not in known)
    attention = tuple(a for a in more.attention if a.name not in attended)
    new, heads = {l.name for l in layers}, {a.name for a in attention}
    return replace(
        plan,
        scales=plan.scales | {k: s for k, s in more.scales.items() if all(n in new for n in balanced(k))},
        layers=plan.layers + layers,
        attention=plan.attention + attention,
        heads=plan.heads | {k: t for k, t in more.heads.items() if k.rpartition("/")[0] in heads},
        columns=plan.columns | {k: s for k, s in more.columns.items() if k in new},
        shifts=plan.shifts | {k: c for k, c in more.shifts.items() if k in new},
        evidence=plan.evidence.joined(more.evidence) if plan.evidence and more.evidence else None,
    )
