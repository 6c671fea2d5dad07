"""choose: sites, statistics and a recipe -> Plan. Which linears are quantized, and with which smoothing scales.

    s_j = max|X_j|^α / max|W_:j|^(1-α)                       (SmoothQuant, arXiv 2211.10438, equation 4)

max|W_:j| runs over all balance layers of the activation together. Every candidate (each α, and no smoothing) is tried
on the calibration sample, with the very arithmetic of the quantized graph, and with every rotation that the recipe allows.
The one that costs the outputs of the model least is taken, where the recipe asks for that and gradients tell it (`feel`);
else the one with the smallest error of the balance layers' outputs: smoothing can hurt, and a plan never smooths a site
where it does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor, fx

from sqcompile.passes.attention.chains import Attention
from sqcompile.passes.ir.graph import Linear, find_linears
from sqcompile.passes.labels.match import Refusal, Site, input_sites
from sqcompile.passes.planning import weight_outliers
from sqcompile.passes.planning.candidates import Best, Look, each_best, look_at, to_look_at
from sqcompile.passes.planning.choice import Choice, Costs, Known, Note
from sqcompile.passes.planning.choose_attention import choose_attention
from sqcompile.passes.planning.error import Chooser
from sqcompile.passes.planning.evidence import curves
from sqcompile.passes.planning.feel import Felt
from sqcompile.passes.planning.overrides import check_agreement, said
from sqcompile.passes.planning.sharing import Asked, Sharing
from sqcompile.passes.planning.sqnr import sqnr_db
from sqcompile.passes.planning.static_scales import warn_of_few
from sqcompile.passes.planning.stay_float import check_any, float_layer, stay_float
from sqcompile.plan.edit import shifts_of
from sqcompile.plan.entries import LayerPlan, Smoothing
from sqcompile.plan.evidence import Evidence
from sqcompile.plan.plan import Plan
from sqcompile.plan.recipe import Activation, Recipe
from sqcompile.plan.shards import shard_of
from sqcompile.statistics.observe import Calibration

SHIFTED = "the mean of its input is taken off by a norm's bias"
UNTRIED = "by largest values without tokens, so that no α was tried"


def choose(
    gm: fx.GraphModule,
    sites: list[Site],
    refusals: list[Refusal],
    calibration: Calibration,
    recipe: Recipe,
    call: Any,
    attentions: Sequence[Attention] = (),
    unsmoothed: str | None = None,
    felt: Felt | None = None,
    lost: Mapping[str, str] = MappingProxyType({}),
    on_trial: bool = False,
    sharing: Sharing | None = None,
    known: Known | None = None,
    shifts: Mapping[str, Tensor] = MappingProxyType({}),
) -> Plan:
    """Makes the plan for a traced graph.

    Args:
        gm, sites, refusals: a traced graph and what `match` found in it.
        calibration: its statistics.
        recipe: the user's choices.
        call: spec of the captured call, kept in the plan.
        attentions: those of the graph, if the recipe quantizes them.
        unsmoothed: why nothing is smoothed, whatever the recipe says.
        felt: what the outputs feel of the linears, for a recipe that chooses by it.
        lost: linears that stay in float, and why, besides those that `stay_float` finds.
        on_trial: the errors of linears are not measured, which are there to be read.
        sharing: the ranks that choose together, of which this is the first one; None for one process.
        known: a cache shared by calls with the same arguments; entries are added.
        shifts: what is taken off the inputs of linears, float32 [K] by name; ``calibration`` and ``felt`` are of what is left.

    Raises:
        NothingToQuantizeError: if no linear would run in INT8; the message gives the reasons.
    """
    known, linears = known or Known(), find_linears(gm)
    floats = {**stay_float(gm, linears, calibration, recipe), **lost}
    while True:
        check_any(gm, linears, floats)
        chooser = Chooser(gm, calibration, recipe, unsmoothed, felt, known, floats)
        every = sites + input_sites(refusals, {l.name for l in linears} - set(floats))
        check_agreement(every, chooser.own, floats)
        first, look = _first_look(chooser, every, floats, sharing)
        if sharing is None:
            best = each_best(chooser, every, floats, look, first=False)
            found = weight_outliers.all_lost(chooser, linears, floats)
        else:
            best, found = sharing.best(Asked(floats, unsmoothed, False, look))
        if not found:
            break
        floats |= found  # and again, as their sites are others without them
    scales: dict[str, Tensor] = {}
    notes: dict[str, Note] = {}
    for site in (s for s in every if s.name in best):
        quantized, choice = [l for l, _ in site.balance if l.name not in floats], best[site.name].choice
        if sharing is not None:  # chosen elsewhere
            chooser.apply(site, choice)
        if choice.scales is not None:
            scales[site.name] = choice.scales[0]
        notes |= dict.fromkeys((l.name for l in quantized), _note(chooser, site, choice, quantized, felt, shifts))
    attention, heads = choose_attention(gm, chooser, attentions, set(floats))
    open_ = [l for l in linears if l.name not in floats]
    static = [l for l in open_ if chooser.static(l)]
    if static and unsmoothed is None:
        stats = {l.name: calibration.inputs[l.name] for l in static}
        warn_of_few({name: s.count for name, s in stats.items() if not s.absmax_alone})
    losses = {} if on_trial else chooser.losses([l for l in open_ if chooser.felt.knows([l])])
    layers = tuple(_layer(chooser, l, floats, notes, losses.get(l.name), on_trial) for l in linears)
    columns = {name: s for name, s in chooser.columns.items() if name not in floats}
    evidence = Evidence(curves=curves(_curves(first), _curves(best)))
    shard = shard_of(chooser.parallel)
    taken = shifts_of(shifts, {l.name for l in open_})
    return Plan(recipe, call, scales, layers, attention, heads, columns, evidence, shard, taken)


def _first_look(
    chooser: Chooser, sites: Sequence[Site], floats: dict[str, str], sharing: Sharing | None
) -> tuple[dict[str, Best], Look | None]:
    """What is best for sites by themselves, and what comes of it for all; nothing where the recipe leaves neither open."""
    if not any(own.rotate == "auto" or own.may_leave_dynamic for own in chooser.own.values()):
        return {}, None
    if sharing is None:
        alone = Chooser(
            chooser.gm, chooser.calibration, chooser.recipe, chooser.forced, chooser.felt, chooser.known, floats
        )  # which is left with what it has chosen
        first = each_best(alone, to_look_at(alone, sites, floats), floats, None, first=True)
    else:
        first, _ = sharing.best(Asked(floats, chooser.forced, True, None))
    return first, look_at(chooser, sites, floats, first)


def _note(
    chooser: Chooser,
    site: Site,
    choice: Choice,
    quantized: list[Linear],
    felt: Felt | None,
    shifts: Mapping[str, Tensor],
) -> Note:
    """What is done with a site's inputs, in words, and α."""
    kind: Smoothing = "multiplied" if site.kind == "input" else "folded"
    if choice.scales is None:
        why = chooser.why_unsmoothed(quantized)
        kind, reason = "none", why or f"smoothing would raise the quantization error here ({site.reason})"
    else:
        reason = site.reason if kind == "folded" else f"x·(1/s) before quantization: {site.reason}"
        if chooser.calibration.inputs[quantized[0].name].absmax_alone:
            reason += f"; {UNTRIED}"
    if felt is not None and chooser.by_loss(quantized) and (blind := felt.blind(quantized)):
        reason += f"; chosen by its own error, as {blind}"
    if quantized[0].name in shifts:
        reason += f"; {SHIFTED}"
    return kind, reason, None if choice.scales is None else choice.alpha


def _curves(best: Mapping[str, Best]) -> dict[str, Costs]:
    return {name: b.curve for name, b in best.items() if b.curve is not None}


def _layer(
    chooser: Chooser, l: Linear, floats: dict[str, str], notes: dict[str, Note], loss: float | None, on_trial: bool
) -> LayerPlan:
    if l.name in floats:
        return float_layer(l, floats[l.name])
    kind: Literal["linear", "experts"] = "experts" if l.experts else "linear"
    how, reason, alpha = notes[l.name]
    stats, own, common = chooser.calibration.inputs[l.name], chooser.own[l.name], chooser.recipe
    idle = (stats.tokens == 0).nonzero().flatten().tolist() if l.experts and not stats.absmax_alone else []
    if idle:
        which = f"{', '.join(map(str, idle))} of {l.experts} experts"
        reason += f"; no calibration token reached {which}, whose scales come from the other experts' tokens"
    sqnr = None if stats.absmax_alone or on_trial else sqnr_db(chooser.error(l), f"the outputs of {l.name}")
    activation: Activation = "per_token" if l.name in chooser.dynamic else own.activation
    if not bool(stats.absmax.any()):  # exact, which says nothing
        reason, sqnr = f"{reason}; its input was {stats.unvarying()}", None
    return LayerPlan(
        l.name,
        kind,
        True,
        how,
        reason + chooser.about_scale(l) + said(chooser.gm, l, common),
        alpha,
        sqnr,
        float(chooser.input_scale(l)) if chooser.static(l) else None,
        l.shape,
        chooser.rotations.get(l.name),
        activation if activation != common.activation else None,
        own.weight if own.weight != common.weight else None,
        loss if loss is None or loss >= 0 else math.inf,  # of a NaN
    )
