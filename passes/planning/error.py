"""Chooser: what quantization costs on the calibration sample, under the smoothing and the rotations chosen so far.

What it costs the outputs, as far as that is known (`feel`, `loss`); or the error of a linear relative to what it gives.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.kernels.reference import absmax_scale, quantize, token_scale
from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import Linear, effective_weight, find_linears, nodes_by_name
from sqcompile.passes.labels.match import Site
from sqcompile.passes.planning.choice import Choice, Costs, Known
from sqcompile.passes.planning.feel import Felt, Reads
from sqcompile.passes.planning.limits import Way, choose_way, limit_of
from sqcompile.passes.planning.loss import Transform, moments_of, of_input, of_weight
from sqcompile.passes.planning.overrides import recipe_of
from sqcompile.passes.planning.products import column_energy, noise_and_signal
from sqcompile.passes.planning.spikes import spikes
from sqcompile.passes.planning.sqnr import relative
from sqcompile.passes.planning.static_scales import Quantized, as_quantized, clipped, has_halves, margin
from sqcompile.plan.recipe import Recipe
from sqcompile.statistics.observe import Calibration

# what `Chooser.apply` adds to
_CHOSEN = ("choices", "columns", "halves", "margins", "scales", "dynamic", "rotations", "rows", "producers")

_KEPT = 2**30  # bytes of weights, or of one that has more

NO_SMOOTHING = "the recipe does not smooth"


class Chooser:
    """Quantization error of linears on the calibration sample, under the scales chosen so far."""

    def __init__(
        self,
        gm: fx.GraphModule,
        calibration: Calibration,
        recipe: Recipe,
        unsmoothed: str | None = None,
        felt: Felt | None = None,
        known: Known | None = None,
        floats: Collection[str] = (),
    ) -> None:
        """``known``: by other choosers; it is added to. ``floats``: linears that stay in float, by name."""
        self.felt, self.known = felt or Felt(), known or Known()
        self.gm, self.calibration, self.recipe, self.forced = gm, calibration, recipe, unsmoothed
        self.parallel, self.floats = about(gm).parallel, floats
        self.unsmoothed = unsmoothed or (None if recipe.smooth else NO_SMOOTHING)  # attentions
        self.choices: dict[str, Choice] = {}  # for the site of a linear
        self.columns: dict[str, Tensor] = {}  # s of a linear's input channels, [K]
        self.halves: dict[str, Tensor] = {}  # s as chosen from either half of the tokens, [2, K]; for static scales
        self.margins: dict[str, float] = {}  # of a linear's static scale
        self.scales: dict[str, Way] = {}  # how its static scale is made, where the loss decides
        self.dynamic: dict[str, bool] = {}  # of a static recipe: linears whose input has a scale for each token
        self.rotations: dict[str, int] = {}  # the blocks in which a linear's input is rotated
        self.rows: dict[str, Tensor] = {}  # s of its output channels, [N]
        self.producers: dict[str, Tensor] = {}  # s that a producer's output is divided by, [C], by node
        self.linears = {l.node: l for l in find_linears(gm)}
        self.nodes = nodes_by_name(gm)
        self.qtype = recipe.qtype
        self.own = {l.name: recipe_of(gm, l, recipe) for l in self.linears.values()}  # recipes, by linear
        seen = [l.name for l in self.linears.values() if l.name in calibration.inputs]
        both = self.parallel.every([has_halves(calibration.inputs[name]) for name in seen])
        self.halved = {
            name for name, so in zip(seen, both, strict=True) if so
        }  # tokens in both halves, in each process
        self.curves: dict[str, Costs] = {}  # by site, what was tried; without any candidate's handicap
        self._energies: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}

    def weight(self, l: Linear) -> Tensor:
        """A linear's weight. On a GPU the last ones are kept: a site is tried many times, and they may be copied for that."""
        if l.name not in self._weights:
            w = effective_weight(self.gm, l, self.nodes)
            if w.device.type == "cpu":
                return w
            while self._weights and sum(x.nbytes for x in self._weights.values()) + w.nbytes > _KEPT:
                del self._weights[next(iter(self._weights))]
            self._weights[l.name] = w
        return self._weights[l.name]

    def why_unsmoothed(self, linears: Sequence[Linear]) -> str | None:
        """Why linears of one site are not smoothed, whatever α; None where they may be."""
        return self.forced or (None if self.own[linears[0].name].smooth else NO_SMOOTHING)

    def static(self, l: Linear) -> bool:
        """Whether its input has a static scale."""
        return self.own[l.name].activation == "per_tensor_static" and l.name not in self.dynamic

    def by_loss(self, linears: Sequence[Linear]) -> bool:
        """Whether linears of one site choose by what the outputs feel."""
        return all(self.own[l.name].by_loss for l in linears)

    def tried(self, site: Site, choice: Choice, touched: list[Linear], by_loss: bool) -> float:
        """What linears cost under a choice, which is not kept."""
        names = tuple(l.name for l in touched)
        alone = names == tuple(l.name for l, _ in site.balance if l.name in names) and not self.rows.keys() & {*names}
        key = site.name, names, by_loss, choice.alpha, choice.block, choice.dynamic
        if alone and key in self.known.costs:  # else it depends on what was chosen for other sites
            return self.known.costs[key]
        saved = [(name, dict(getattr(self, name))) for name in _CHOSEN]
        self.apply(site, choice)
        error = self.loss(touched) if by_loss else sum(self.error(l) for l in touched)
        for name, value in saved:
            setattr(self, name, value)
        if alone:
            self.known.costs[key] = error
        return error

    def apply(self, site: Site, choice: Choice) -> None:
        """Smooths a site, and rotates its inputs."""
        self.choices |= {l.name: choice for l, _ in site.balance}
        if choice.dynamic:
            self.dynamic |= {l.name: True for l, _ in site.balance}
        if choice.block is not None:
            self.rotations |= {l.name: choice.block for l, _ in site.balance}
        if choice.scales is None:
            self.leave([l for l, _ in site.balance])
            return
        s, halves = choice.scales[0], choice.scales[1:]
        for l, m in site.balance:
            self.columns[l.name] = s[m.to(s.device)]
            self.halves[l.name] = halves[:, m.to(s.device)]
        self.leave([l for l, _ in site.balance])
        if site.kind != "input":
            self.producers[site.producer] = s
        if site.kind == "linear":
            self.rows[self.linears[site.producer].name] = s

    def leave(self, linears: Sequence[Linear]) -> None:
        """Chooses static scales of linears with the columns that they have; those that read one tensor get one.

        Linears that stay in float have none, and no say in those of others: the outputs' gradients are not known of them.
        """
        together: dict[tuple[int, int | None], list[Linear]] = {}
        for l in (l for l in linears if self.static(l) and l.name not in self.floats):
            together.setdefault((id(self.calibration.inputs[l.name]), self.rotations.get(l.name)), []).append(l)
        for group in together.values():
            stats, name = self.calibration.inputs[group[0].name], group[0].name
            if self.by_loss(group) and self.felt.knows(group):
                block = self.rotations.get(name)
                way = choose_way(self.felt.reads[name], stats, self.halves.get(name), block, self.qtype)
                self.scales |= {l.name: way for l in group}
                continue
            columns = self.halves.get(name, torch.ones_like(stats.halves))
            weight = torch.stack([self._energy(l) for l in group]).sum(0)
            room = margin(stats, columns, weight, self.qtype, self.rotations.get(name))
            self.margins |= {l.name: room for l in group}

    def column_absmax(self, l: Linear) -> Tensor:
        """max|W_:j| of a linear, float32 [K]; of all experts."""
        return self.known.largest_of(l.name, lambda: self.weight(l))

    def _energy(self, l: Linear) -> Tensor:
        """|W_:j|² of a linear's columns, float32 [K], with the rows of all processes; of experts, the mean one's."""
        if l.name not in self._energies:
            found = column_energy(self.weight(l), l.experts)
            self._energies[l.name] = self.parallel.summed(found) if self.parallel.dim(l.name) == 0 else found
        return self._energies[l.name]

    def loss(self, linears: Sequence[Linear]) -> float:
        """What the outputs lose by linears that `Felt.knows`: half of E[(gᵀδ)²]; see `feel` for its unit."""
        total = sum(self.losses(linears).values())
        return total if math.isfinite(total) else math.inf

    def losses(self, linears: Sequence[Linear]) -> dict[str, float]:
        """Of each linear by name: what its weight costs, and its share of what the input costs that it reads with others."""
        found, moments = dict.fromkeys((l.name for l in linears), 0.0), dict[Reads, Tensor]()
        of_inputs = dict(found)
        readers = Counter(self.felt.reads[l.name] for l in linears)
        shared: dict[Reads, float] = {}
        for l in linears:
            reads, how = self.felt.reads[l.name], self.transform(l, self.columns.get(l.name))
            if reads not in moments:
                if l.name in self.scales and self.static(l):
                    shared[reads], moments[reads] = self.scales[l.name].cost, moments_of(reads, how)
                else:
                    scale = None if self._per_token(l) else self._limit(l, self._quantized(l, how.columns, None))
                    shared[reads], moments[reads] = of_input(reads, how, scale, self.qtype)
            of_inputs[l.name] += shared[reads] / readers[reads]
            weight, tokens = self.weight(l), self.calibration.inputs[l.name].tokens
            shares = (tokens / tokens.sum()).tolist() if l.experts else [1.0]
            for share, w in zip(shares, weight if l.experts else [weight], strict=True):
                per_tensor = self.own[l.name].weight == "per_tensor"
                cost = of_weight(w, self.felt.outputs[l.name], moments[reads], how, per_tensor, self.qtype)
                found[l.name] += share * cost
        return self._of_all(linears, of_inputs, found)

    def _of_all(
        self, linears: Sequence[Linear], inputs: dict[str, float], weights: dict[str, float]
    ) -> dict[str, float]:
        """What linears cost in all processes, from what this one has: a part of the weight, and maybe of the input's channels."""
        if self.parallel.count == 1:
            return {l.name: inputs[l.name] + weights[l.name] for l in linears}
        every = self.parallel.total([c[l.name] for c in (inputs, weights) for l in linears])
        for i, l in enumerate(linears):
            dim, n = self.parallel.dim(l.name), self.parallel.count
            inputs[l.name] = every[i] / (1 if dim == 1 else n)  # of whole inputs each process has the same
            weights[l.name] = every[len(linears) + i] / (n if dim is None else 1)
        return {l.name: inputs[l.name] + weights[l.name] for l in linears}

    def transform(self, l: Linear, columns: Tensor | None) -> Transform:
        """How a linear is changed before it is quantized; ``columns``: s of its input channels, float32 [K], or None."""
        dim, per_tensor = self.parallel.dim(l.name), self.own[l.name].weight == "per_tensor"
        how = Transform(columns, self.rotations.get(l.name), self.rows.get(l.name))
        return replace(how, across=self.parallel.largest) if dim == 1 or (dim == 0 and per_tensor) else how

    def error(self, l: Linear) -> float:
        """|Y_quantized - Y|² / |Y|² of one linear on the sample; zero where there is no signal.

        Of a linear whose inputs are sharded Y is the parts of all processes one beside the other, and not their sum: the
        errors of the parts have nothing to do with each other.

        Static scales, and s with them, are those that the half of the tokens would give in which a row is not.
        """
        choice = self.choices.get(l.name)
        if choice is None or l.name in self.rows:  # which depend on what was chosen for other sites
            return self._error(l)
        s = self.columns.get(l.name)  # other linears of the site may stay in float by now
        key = l.name, None if s is None else float(s.double().sum()), choice.block, choice.dynamic
        if key not in self.known.errors:
            self.known.errors[key] = self._error(l)
        return self.known.errors[key]

    def _error(self, l: Linear) -> float:
        stats = self.calibration.inputs[l.name]
        if not self.static(l) or l.name not in self.halved:
            return relative(*self.parallel.total(self._sums(l, slice(None), self.columns.get(l.name), None)))
        columns = self.halves.get(l.name, (None, None))
        parts = [self._sums(l, stats.half == 1 - h, columns[h], h) for h in (0, 1)]
        noise, signal = (sum(x) for x in zip(*parts, strict=True))
        beyond = sum(self._tail(l, columns[h], h) for h in (0, 1))
        if self.parallel.dim(l.name) == 0:  # each process has what all outputs feel
            beyond /= self.parallel.count
        return relative(*self.parallel.total((noise + beyond, signal)))

    def _tail(self, l: Linear, columns: Tensor | None, h: int) -> float:
        """What clipping is expected to add to the noise of as many new rows as are sampled of the other half."""
        stats, x = self.calibration.inputs[l.name], self._quantized(l, columns, h)
        return int((stats.half == 1 - h).sum()) * float(clipped(stats, x, self._limit(l, x) * self.qtype.q_max))

    def _sums(self, l: Linear, which: Tensor | slice, columns: Tensor | None, half: int | None) -> tuple[float, float]:
        """|Y_quantized - Y|² and |Y|² of some rows of the sample, with columns [K], and static scales from a half, or both."""
        stats, weight = self.calibration.inputs[l.name], self.weight(l)
        x, experts = stats.rows[which].float(), stats.experts[which]
        quantized = self._quantized(l, columns, half)
        rows = quantized.rows[which]
        x_scale = token_scale(rows, self.qtype.q_max) if self._per_token(l) else self._limit(l, quantized)
        x_int = quantize(rows, x_scale, dtype=self.qtype.dtype)
        every: list[tuple[Any, Tensor]] = [(slice(None), weight)]
        if l.experts:
            every = [(experts == e, weight[e]) for e in experts.unique().tolist()]
        how, per_tensor = self.transform(l, columns), self.own[l.name].weight == "per_tensor"
        noise = signal = 0.0
        for mine, matrix in every:
            scale = x_scale[mine] if x_scale.dim() else x_scale
            more = noise_and_signal(matrix, how, x[mine], x_int[mine], scale, stats.offset, per_tensor, self.qtype)
            noise, signal = noise + more[0], signal + more[1]
        return noise, signal

    def _per_token(self, l: Linear) -> bool:
        return self.own[l.name].activation == "per_token" or l.name in self.dynamic

    def _quantized(self, l: Linear, columns: Tensor | None, half: int | None) -> Quantized:
        stats = self.calibration.inputs[l.name]
        weight = self._energy(l) if self.static(l) else torch.ones_like(stats.absmax)  # that nothing asks for
        return as_quantized(stats, columns, self.rotations.get(l.name), half, weight)

    def _limit(self, l: Linear, x: Quantized) -> Tensor:
        """Δx of the largest value, with the margin of a static scale. A dynamic one per tensor is close to it."""
        if l.name in self.scales:
            return absmax_scale(torch.full_like(x.absmax[0], self._made(l)[0]), self.qtype.q_max)
        return absmax_scale(x.absmax.max() * (1 + self.margins.get(l.name, 0.0)), self.qtype.q_max)

    def _made(self, l: Linear) -> tuple[float, float]:
        """`limit_of` a linear in ``scales``."""
        reads, stats, columns = self.felt.reads[l.name], self.calibration.inputs[l.name], self.columns.get(l.name)
        return limit_of(self.scales[l.name], reads, stats, columns, self.rotations.get(l.name), self.qtype)

    def input_scale(self, l: Linear) -> Tensor:
        """Static Δx, from all tokens."""
        return self._limit(l, self._quantized(l, self.columns.get(l.name), None))

    def about_scale(self, l: Linear) -> str:
        """How a static scale was made, and why there is none; "" of a dynamic recipe."""
        if self.own[l.name].activation != "per_tensor_static":
            return ""
        if self.calibration.inputs[l.name].absmax_alone:
            return "; Δ of the largest value, without a margin"
        found = spikes(self.calibration.inputs[l.name])
        if l.name in self.dynamic:
            why = found or "one scale for all of them would cost the outputs most here"
            return f"; a scale for each token at run time, as {why}"
        way = ""
        if l.name in self.scales:
            way = f"; Δ from {self.scales[l.name]}"
            clips = self._made(l)[1]
            way += f", which clips at {clips:.2f} of the largest" if clips < 1 else ""
        return way + (f"; {found}" if found else "")
