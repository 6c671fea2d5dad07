"""candidates: of what may be done with a site, smoothing by every α and rotations of every size, what costs least.

By what the outputs lose, as far as that is known (`feel`, `loss`); else by the error of the site's own linears.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sqcompile.passes.ir.graph import Linear
from sqcompile.passes.labels.match import Site
from sqcompile.passes.planning.choice import Choice, Costs
from sqcompile.passes.planning.error import Chooser
from sqcompile.passes.planning.smoothing import smoothing_scale
from sqcompile.passes.planning.spikes import spikes
from sqcompile.plan.recipe import AUTO, Recipe
from sqcompile.process.interrupts import checkpoint
from sqcompile.process.progress import each

# A site is left unsmoothed only where smoothing makes its error on the sample this much worse. Below that, smoothing is
# kept even without a gain: the sample holds few tokens, and the absmax it is built from saw them all. Static scales are
# tried on tokens that they have not seen (`static_scales`), and take what is best there.
TOLERANCE = 1.1
# A rotation costs additions for every value: it is taken where it makes the error this much smaller, or the loss.
GAIN, GAIN_OF_LOSS = 1.05, 1.2
# Of strong α that cost alike, the weakest is taken, down to .5: stronger ones win on the sample, and lose on unlike tokens.
ALIKE = 1.05
# A static recipe leaves an input dynamic that spikes where it makes the error so much smaller; and one of the few that
# cost the outputs more than a tenth of what all do, and three times the mean one, where it halves that.
GAIN_OF_DYNAMIC, GAIN_OF_COSTLY = 4.0, 2.0
COSTLY, TIMES_MEAN = 0.1, 3
# Of layers that a model repeats, rotations are tried in so many: the first and the last two, which are the unusual ones
# (arXiv 2402.17762), and some between. The others get the same.
ENDS, BETWEEN = 2, 2


@dataclass(frozen=True)
class Look:
    """What is known of a graph's sites when those of `to_look_at` have been looked at, each by itself.

    Attributes:
        rotations: the size of the blocks in which each site is rotated, or None; the same in all layers that a model repeats.
        costly: sites that may be left dynamic for what their static scales cost.
    """

    rotations: dict[str, int | None]
    costly: frozenset[str]


@dataclass(frozen=True, eq=False)
class Best:
    """What is best for a site.

    Attributes:
        choice: that.
        costs: the smallest error with each rotation.
        curve: what was tried; None where nothing could be.
        loss: what its static scales cost the outputs; None where there are none, that is not known, or nobody asks.
    """

    choice: Choice
    costs: dict[int | None, float]
    curve: Costs | None
    loss: float | None


def each_best(
    chooser: Chooser, sites: Sequence[Site], floats: Mapping[str, str], look: Look | None, first: bool
) -> dict[str, Best]:
    """Chooses for sites in their order, and keeps what it has chosen in the chooser: by site, but for those all in float.

    Args:
        chooser: it is left with each site's choice.
        sites: of a graph, with all before them that share a linear with one of them.
        floats: linears that stay in float, by name.
        look: what was decided of all sites; None for each by itself.
        first: whether it is the first look at each site, which wants to know what static scales cost.
    """
    found = {}
    for site in each(sites, "rotations" if first else "choose"):
        linears = [l for l, _ in site.balance if l.name not in floats]
        if not linears:
            continue
        chooser.leave(linears)
        choice, costs = best(chooser, site, floats, look)
        chooser.apply(site, choice)
        loss = None
        if first and all(map(chooser.static, linears)) and chooser.by_loss(linears) and chooser.felt.knows(linears):
            loss = chooser.loss(linears)
        found[site.name] = Best(choice, costs, chooser.curves.get(site.name), loss)
    return found


def to_look_at(chooser: Chooser, sites: Sequence[Site], floats: Mapping[str, str]) -> list[Site]:
    """Which sites are looked at by themselves: some of each kind that repeats, and all whose inputs may be left dynamic.

    Args: as for `look_at`.
    """
    kinds: dict[Any, list[Site]] = {}
    for site, kind in _kinds(chooser, sites, floats):
        kinds.setdefault(kind, []).append(site)
    seen = set()
    for alike in kinds.values():
        may = any(chooser.own[l.name].may_leave_dynamic for l, _ in alike[0].balance)
        seen |= {s.name for s in (alike if may else _some(alike))}
    return [s for s in sites if s.name in seen]


def _kinds(chooser: Chooser, sites: Sequence[Site], floats: Mapping[str, str]) -> Iterator[tuple[Site, Any]]:
    """Sites that are not all in float, each with what is equal for those of repeated layers: all but numbers in names."""
    for site in sites:
        linears = [l for l, _ in site.balance if l.name not in floats]
        if linears:
            shapes = tuple(l.shape for l in linears)
            yield site, (re.sub(r"(?<=\.)\d+(?=\.)", "N", site.name), shapes, chooser.own[linears[0].name])


def _some(alike: list[Site]) -> list[Site]:
    most = 2 * ENDS + BETWEEN
    if len(alike) <= most:
        return alike
    inner, step = alike[ENDS:-ENDS], (len(alike) - 2 * ENDS) / (BETWEEN + 1)
    return [*alike[:ENDS], *(inner[round(step * (i + 1))] for i in range(BETWEEN)), *alike[-ENDS:]]


def look_at(chooser: Chooser, sites: Sequence[Site], floats: Mapping[str, str], found: Mapping[str, Best]) -> Look:
    """What is to be decided of all sites together.

    The rotation of layers that a model repeats is the one that costs least in all of them together that were looked at. So
    they stay alike, and are compiled once where a compiler makes one of them for all. Sites are of repeated layers where
    nothing but numbers in their names differs.

    Args:
        chooser: of the graph.
        sites: of the graph.
        floats: linears that stay in float, by name.
        found: what is best for each by itself, of those `to_look_at`.
    """
    costs: dict[Any, Counter[int | None]] = {}
    kinds = {site.name: kind for site, kind in _kinds(chooser, sites, floats)}
    for name, b in found.items():
        costs.setdefault(kinds[name], Counter()).update(b.costs)
    static = {name: b.loss for name, b in found.items() if b.loss is not None}
    least = {kind: min(total, key=lambda block: total[block]) for kind, total in costs.items()}
    most = max(COSTLY, TIMES_MEAN / max(1, len(static))) * sum(static.values())
    return Look(
        {name: least[kind] for name, kind in kinds.items()}, frozenset(n for n, c in static.items() if c > most)
    )


def best(
    chooser: Chooser, site: Site, floats: Mapping[str, str], look: Look | None = None
) -> tuple[Choice, dict[int | None, float]]:
    """The smoothing and the rotation with the smallest error, and the smallest error with each rotation.

    ``floats``: linears that stay in float, by name. ``look``: what was decided of all sites; None for a site by itself. Of
    inputs whose largest values alone are known, it is the recipe's own α and rotation.
    """
    balance = [(l, m) for l, m in site.balance if l.name not in floats]
    linears = [l for l, _ in balance]
    device, own = chooser.weight(linears[0]).device, chooser.own[linears[0].name]
    x_absmax = torch.zeros(3, site.channels, dtype=torch.float32, device=device)  # all tokens, either half
    w_absmax = torch.zeros(site.channels, dtype=torch.float32, device=device)
    for l, m in balance:
        index, stats = m.to(device), chooser.calibration.inputs[l.name]
        for largest, absmax in zip(x_absmax, (stats.absmax, *stats.halves), strict=True):
            largest.scatter_reduce_(0, index, absmax, "amax")
        w_absmax.scatter_reduce_(0, index, chooser.column_absmax(l), "amax")
    parallel, dims = chooser.parallel, {chooser.parallel.dim(l.name) for l in linears}
    inputs = dims == {1}  # each process has channels of its own
    if inputs:
        x_absmax, w_absmax = parallel.joined(x_absmax.t()).t(), parallel.joined(w_absmax)
    elif 1 not in dims:
        w_absmax = parallel.largest(w_absmax)
    touched, producer = list(linears), chooser.linears.get(site.producer)
    absorbs = producer is not None and site.kind == "linear" and producer.name not in floats
    if producer and absorbs and chooser.own[producer.name].weight == "per_tensor":
        touched.append(producer)  # its rows are divided by s, which one scale for all rows feels
    scales: dict[float | None, Tensor | None] = {None: None}
    for candidate in () if chooser.why_unsmoothed(linears) else own.alphas:
        every = torch.stack([smoothing_scale(x, w_absmax, candidate) for x in x_absmax])
        every = parallel.own(every.t()).t() if inputs else every
        scales[candidate] = torch.where(site.free.to(device), every, 1.0)
    if any(chooser.calibration.inputs[l.name].absmax_alone for l in linears):  # nothing can be tried
        alpha, block = [*scales][-1], _blocks(own, linears)[0]  # of a recipe that leaves one of each (`absmax_alone`)
        return Choice(scales[alpha], alpha, block), {block: 0.0}
    by_loss = chooser.by_loss(linears) and chooser.felt.knows(touched)
    errors: dict[tuple[float | None, int | None, bool], tuple[float, Choice]] = {}
    plain: dict[tuple[float | None, int | None, bool], float] = {}
    blocks = _blocks(own, linears) if look is None else (look.rotations[site.name],)
    costly = look is not None and site.name in look.costly

    def try_all(alphas: Iterable[float | None], blocks: Iterable[int | None], ways: Iterable[bool]) -> Choice:
        for key in itertools.product(alphas, blocks, ways):
            if key not in errors:
                checkpoint()
                choice = Choice(scales[key[0]], *key)
                error = plain[key] = chooser.tried(site, choice, touched, by_loss)
                errors[key] = error * _handicap(own, choice, by_loss, costly), choice
        return min(errors.values(), key=lambda found: found[0])[1]

    alphas = [a for a in scales if a is not None]
    # what α costs changes slowly: every third of many, and then up or down from the best, as long as that gains
    some = [None, *(alphas[1::3] if alphas == [*AUTO] else alphas)]
    chosen = try_all(some, blocks, _ways(chooser, linears, costly))
    before = None
    while chosen is not before and chosen.alpha is not None:
        i = alphas.index(chosen.alpha)
        before, chosen = chosen, try_all(alphas[max(0, i - 1) : i + 2], [chosen.block], [chosen.dynamic])
    chooser.curves[site.name] = by_loss, plain
    costs: dict[int | None, float] = {}
    for (_, block, _), (error, _) in errors.items():
        costs[block] = min(error, costs.get(block, math.inf))
    if not by_loss or chosen.alpha is None:
        return chosen, costs
    most = ALIKE * errors[chosen.alpha, chosen.block, chosen.dynamic][0]
    beside = (errors.get((a, chosen.block, chosen.dynamic)) for a in alphas if 0.5 <= a < chosen.alpha)
    return next((choice for error, choice in filter(None, beside) if error <= most), chosen), costs


def _blocks(recipe: Recipe, linears: list[Linear]) -> tuple[int | None, ...]:
    """The rotations to try: those of the recipe that the channels of all linears allow, and none where it is open."""
    fit = tuple(b for b in recipe.blocks if all(l.in_features % b == 0 for l in linears))
    return fit if fit and recipe.rotate != "auto" else (None, *fit)


def _ways(chooser: Chooser, linears: list[Linear], costly: bool) -> tuple[bool, ...]:
    """Whether inputs may be dynamic: those of a static recipe that spike, or cost much, may be either."""
    may = all(chooser.own[l.name].may_leave_dynamic for l in linears)
    spiking = may and (costly or any(spikes(chooser.calibration.inputs[l.name]) for l in linears))
    spiking = chooser.parallel.most([spiking])[0] > 0
    return (False, True) if spiking else (False,)


def _handicap(recipe: Recipe, choice: Choice, by_loss: bool, costly: bool) -> float:
    gain = 1.0 if choice.block is None else GAIN_OF_LOSS if by_loss else GAIN
    if choice.dynamic:
        gain *= GAIN_OF_COSTLY if costly else GAIN_OF_DYNAMIC
    static = recipe.activation == "per_tensor_static"
    return gain * (1.0 if choice.scales is not None or static else TOLERANCE)
