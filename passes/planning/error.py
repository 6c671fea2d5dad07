"""Chooser: what quantization costs on the calibration sample, under the smoothing and the rotations chosen so far.

A site takes the candidate that costs the outputs least, as far as that is known (`feel`, `loss`); else the one with the
smallest error of its own linears, relative to what they give.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.kernels.reference import absmax_scale, dequantize, quantize, token_scale, weight_scale
from sqcompile.passes.ir.graph import Linear, effective_weight, find_linears, nodes_by_name, row_parts
from sqcompile.passes.labels.match import Site
from sqcompile.passes.planning.feel import Felt, Reads
from sqcompile.passes.planning.loss import Transform, of_input, of_weight
from sqcompile.passes.planning.overrides import recipe_of
from sqcompile.passes.planning.smoothing import smoothing_scale
from sqcompile.passes.planning.sqnr import relative
from sqcompile.passes.planning.static_scales import Quantized, as_quantized, clipped, has_halves, margin
from sqcompile.plan.entries import Smoothing
from sqcompile.plan.recipe import Recipe
from sqcompile.process.interrupts import checkpoint
from sqcompile.statistics.observe import Calibration


@dataclass(frozen=True, eq=False)
class Choice:
    """What is done with a site.

    Attributes:
        scales: float32 [3, C], s, and what either half of the tokens would have chosen; None without smoothing.
        alpha: the migration strength that they come from.
        block: the size of the blocks in which the inputs are rotated; None without rotation.
    """

    scales: Tensor | None = None
    alpha: float | None = None
    block: int | None = None


Note = tuple[Smoothing, str, float | None]  # what was done with a linear's input, why, and the site's alpha

# A site is left unsmoothed only where smoothing makes its error on the sample this much worse. Below that, smoothing is
# kept even without a gain: the sample holds few tokens, and the absmax it is built from saw them all. Static scales are
# tried on tokens that they have not seen (`static_scales`), and take what is best there.
TOLERANCE = 1.1
# A rotation costs additions for every value: it is taken where it makes the error this much smaller, or the loss.
GAIN, GAIN_OF_LOSS = 1.05, 1.2

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
    ) -> None:
        self.felt = felt or Felt()
        self.gm, self.calibration, self.recipe, self.forced = gm, calibration, recipe, unsmoothed
        self.unsmoothed = unsmoothed or (None if recipe.smooth else NO_SMOOTHING)  # attentions
        self.columns: dict[str, Tensor] = {}  # s of a linear's input channels, [K]
        self.halves: dict[str, Tensor] = {}  # s as chosen from either half of the tokens, [2, K]; for static scales
        self.margins: dict[str, float] = {}  # of a linear's static scale
        self.rotations: dict[str, int] = {}  # the blocks in which a linear's input is rotated
        self.rows: dict[str, Tensor] = {}  # s of its output channels, [N]
        self.producers: dict[str, Tensor] = {}  # s that a producer's output is divided by, [C], by node
        self.linears = {l.node: l for l in find_linears(gm)}
        self.nodes = nodes_by_name(gm)
        self.qtype = recipe.qtype
        self.own = {l.name: recipe_of(gm, l, recipe) for l in self.linears.values()}  # recipes, by linear
        self._energies: dict[str, Tensor] = {}

    def weight(self, l: Linear) -> Tensor:
        return effective_weight(self.gm, l, self.nodes)

    def best(self, site: Site, floats: dict[str, str]) -> Choice:
        """The smoothing and the rotation with the smallest error."""
        balance = [(l, m) for l, m in site.balance if l.name not in floats]
        linears = [l for l, _ in balance]
        device = self.weight(linears[0]).device
        x_absmax = torch.zeros(3, site.channels, dtype=torch.float32, device=device)  # all tokens, either half
        w_absmax = torch.zeros(site.channels, dtype=torch.float32, device=device)
        for l, m in balance:
            index, stats = m.to(device), self.calibration.inputs[l.name]
            for largest, absmax in zip(x_absmax, (stats.absmax, *stats.halves), strict=True):
                largest.scatter_reduce_(0, index, absmax, "amax")
            w_absmax.scatter_reduce_(0, index, _column_absmax(self.weight(l)), "amax")
        touched = [*linears]
        producer = self.linears.get(site.producer)
        if (
            site.kind == "linear"
            and producer is not None
            and self.own[producer.name].weight == "per_tensor"
            and producer.name not in floats
        ):
            touched.append(producer)  # its rows are divided by s, which one scale for all rows feels
        scales = {}
        for alpha in () if self.why_unsmoothed(linears) else self.own[linears[0].name].alphas:
            every = torch.stack([smoothing_scale(x, w_absmax, alpha) for x in x_absmax])
            scales[alpha] = torch.where(site.free.to(device), every, 1.0)
        by_loss = self.by_loss(linears) and self.felt.knows(touched)
        errors = {
            choice: self._error_of(site, choice, touched, by_loss)
            for block in self._blocks(linears)
            for choice in (Choice(None, None, block), *(Choice(s, alpha, block) for alpha, s in scales.items()))
        }
        static = any(self.static(l) for l in linears)
        return min(errors, key=lambda c: errors[c] * self._handicap(c, by_loss, static))

    def why_unsmoothed(self, linears: Sequence[Linear]) -> str | None:
        """Why linears of one site are not smoothed, whatever α; None where they may be."""
        return self.forced or (None if self.own[linears[0].name].smooth else NO_SMOOTHING)

    def static(self, l: Linear) -> bool:
        return self.own[l.name].activation == "per_tensor_static"

    def by_loss(self, linears: Sequence[Linear]) -> bool:
        """Whether linears of one site choose by what the outputs feel."""
        return all(self.own[l.name].by_loss for l in linears)

    def _blocks(self, linears: list[Linear]) -> tuple[int | None, ...]:
        """The rotations to try: those of the recipe that the channels of all linears allow, and none where it is open."""
        recipe = self.own[linears[0].name]
        fit = tuple(b for b in recipe.blocks if all(l.in_features % b == 0 for l in linears))
        return fit if fit and recipe.rotate != "auto" else (None, *fit)

    def _handicap(self, choice: Choice, by_loss: bool, static: bool) -> float:
        smooths, gain = choice.scales is not None, GAIN_OF_LOSS if by_loss else GAIN
        return (1.0 if smooths or static else TOLERANCE) * (1.0 if choice.block is None else gain)

    def _error_of(self, site: Site, choice: Choice, touched: list[Linear], by_loss: bool) -> float:
        """What linears cost under a choice, which is not kept."""
        checkpoint()
        saved = [dict(d) for d in self._chosen()]
        self.apply(site, choice)
        error = self.loss(touched) if by_loss else sum(self.error(l) for l in touched)
        self.columns, self.halves, self.margins, self.rows, self.producers, self.rotations = saved
        return error

    def _chosen(self) -> tuple[dict[str, Any], ...]:
        return self.columns, self.halves, self.margins, self.rows, self.producers, self.rotations

    def apply(self, site: Site, choice: Choice) -> None:
        """Smooths a site, and rotates its inputs."""
        if choice.block is not None:
            self.rotations |= {l.name: choice.block for l, _ in site.balance}
        if choice.scales is None:
            self.leave([l for l, _ in site.balance if l.name in self.calibration.inputs])
            return
        s, halves = choice.scales[0], choice.scales[1:]
        for l, m in site.balance:
            self.columns[l.name] = s[m.to(s.device)]
            self.halves[l.name] = halves[:, m.to(s.device)]
        self.leave([l for l, _ in site.balance if l.name in self.calibration.inputs])
        if site.kind != "input":
            self.producers[site.producer] = s
        if site.kind == "linear":
            self.rows[self.linears[site.producer].name] = s

    def leave(self, linears: Sequence[Linear]) -> None:
        """Chooses the margins of linears with the columns that they have; those that read one tensor get one."""
        together: dict[tuple[int, int | None], list[Linear]] = {}
        for l in filter(self.static, linears):
            together.setdefault((id(self.calibration.inputs[l.name]), self.rotations.get(l.name)), []).append(l)
        for group in together.values():
            stats, name = self.calibration.inputs[group[0].name], group[0].name
            columns = self.halves.get(name, torch.ones_like(stats.halves))
            weight = torch.stack([self._energy(l) for l in group]).sum(0)
            room = margin(stats, columns, weight, self.qtype, self.rotations.get(name))
            self.margins |= {l.name: room for l in group}

    def _energy(self, l: Linear) -> Tensor:
        """|W_:j|² of a linear's columns, float32 [K]; of experts, the mean one's."""
        if l.name not in self._energies:
            w = self.weight(l).flatten(0, -2)
            energy = torch.stack([w[p].float().square().sum(0) for p in row_parts(w)]).sum(0) / (l.experts or 1)
            self._energies[l.name] = energy
        return self._energies[l.name]

    def loss(self, linears: Sequence[Linear]) -> float:
        """What the outputs lose by linears that `Felt.knows`: half of E[(gᵀδ)²]; see `feel` for its unit."""
        total = sum(self.losses(linears).values())
        return total if math.isfinite(total) else math.inf

    def losses(self, linears: Sequence[Linear]) -> dict[str, float]:
        """Of each linear by name: what its weight costs, and its share of what the input costs that it reads with others."""
        found, moments = dict.fromkeys((l.name for l in linears), 0.0), dict[Reads, Tensor]()
        readers = Counter(self.felt.reads[l.name] for l in linears)
        shared: dict[Reads, float] = {}
        for l in linears:
            reads, how = self.felt.reads[l.name], self._transform(l, self.columns.get(l.name))
            if reads not in moments:
                scale = None
                if self.own[l.name].activation != "per_token":
                    scale = self._limit(l, self._quantized(l, how.columns, None))
                shared[reads], moments[reads] = of_input(reads, how, scale, self.qtype)
            found[l.name] += shared[reads] / readers[reads]
            weight, tokens = self.weight(l), self.calibration.inputs[l.name].tokens
            shares = (tokens / tokens.sum()).tolist() if l.experts else [1.0]
            for share, w in zip(shares, weight if l.experts else [weight], strict=True):
                per_tensor = self.own[l.name].weight == "per_tensor"
                cost = of_weight(w, self.felt.outputs[l.name], moments[reads], how, per_tensor, self.qtype)
                found[l.name] += share * cost
        return found

    def _transform(self, l: Linear, columns: Tensor | None) -> Transform:
        return Transform(columns, self.rotations.get(l.name), self.rows.get(l.name))

    def error(self, l: Linear) -> float:
        """|Y_quantized - Y|² / |Y|² of one linear on the sample; zero where there is no signal.

        Static scales, and s with them, are those that the half of the tokens would give in which a row is not.
        """
        stats = self.calibration.inputs[l.name]
        if not self.static(l) or not has_halves(stats):
            return relative(*self._sums(l, slice(None), self.columns.get(l.name), None))
        columns = self.halves.get(l.name, (None, None))
        parts = [self._sums(l, stats.half == 1 - h, columns[h], h) for h in (0, 1)]
        noise, signal = (sum(x) for x in zip(*parts, strict=True))
        return relative(noise + sum(self._tail(l, columns[h], h) for h in (0, 1)), signal)

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
        per_token = self.own[l.name].activation == "per_token"
        x_scale = token_scale(rows, self.qtype.q_max) if per_token else self._limit(l, quantized)
        x_int = quantize(rows, x_scale, dtype=self.qtype.dtype).float()
        every: list[tuple[Any, Tensor]] = [(slice(None), weight)]
        if l.experts:
            every = [(experts == e, weight[e]) for e in experts.unique().tolist()]
        noise = signal = 0.0
        for mine, matrix in every:
            scale = x_scale[mine] if x_scale.dim() else x_scale
            more = self._products(l, matrix, columns, x[mine], x_int[mine], scale)
            noise, signal = noise + more[0], signal + more[1]
        return noise, signal

    def _quantized(self, l: Linear, columns: Tensor | None, half: int | None) -> Quantized:
        stats = self.calibration.inputs[l.name]
        weight = self._energy(l) if self.static(l) else torch.ones_like(stats.absmax)  # that nothing asks for
        return as_quantized(stats, columns, self.rotations.get(l.name), half, weight)

    def _products(
        self, l: Linear, weight: Tensor, columns: Tensor | None, x: Tensor, x_int: Tensor, x_scale: Tensor
    ) -> tuple[float, float]:
        """|Y_quantized - Y|² and |Y|² for one weight [N, K] and rows x [R, K]."""
        rows, how = self.rows.get(l.name), self._transform(l, columns)
        parts = row_parts(weight)
        per_tensor, q_max = self.own[l.name].weight == "per_tensor", self.qtype.q_max
        common = (
            torch.cat([weight_scale(how.weight(weight, p), False, q_max) for p in parts]).amax() if per_tensor else None
        )
        noise = signal = 0.0
        for part in parts:  # a few rows of the weight at a time: no float copy of it
            w = how.weight(weight, part)
            w_scale = weight_scale(w, True, q_max) if common is None else common.view(1, 1)
            y = x @ weight[part].float().t()
            y_hat = dequantize(
                x_int @ quantize(w, w_scale, dtype=self.qtype.dtype).float().t(), x_scale, w_scale.flatten()
            )
            if rows is not None:
                y_hat = y_hat * rows[part]
            y = y.double()  # squares overflow float32 where the values do not
            signal += float(y.square().sum())
            noise += float((y_hat - y).square().sum())
        return noise, signal

    def _limit(self, l: Linear, x: Quantized) -> Tensor:
        """Δx of the largest value, with the margin of a static scale. A dynamic one per tensor is close to it."""
        return absmax_scale(x.absmax.max() * (1 + self.margins.get(l.name, 0.0)), self.qtype.q_max)

    def input_scale(self, l: Linear) -> Tensor:
        """Static Δx, from all tokens."""
        return self._limit(l, self._quantized(l, self.columns.get(l.name), None))


def _column_absmax(w: Tensor) -> Tensor:
    """max|W_:j| of w [N, K] or [E, N, K]: float32 [K]; a few rows at a time, no copy of w."""
    rows = w.flatten(0, -2)
    return torch.stack([rows[p].abs().amax(0).float() for p in row_parts(rows)]).amax(0)
