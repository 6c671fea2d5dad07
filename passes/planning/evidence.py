"""evidence: what the page of a report shows of a plan: channels, tokens and codes, before and after. Analysis only.

    %n = layer_norm(%x, [4], %g, %b)                # the linears q and k are smoothed by s, and rotated
    %q = linear(%n, %wq)
    %k = linear(%n, %wk)
->
    InputEvidence(linears=(wq, wk)):   max|X_j| of %n,   max|(X diag(1/s) H)_j|,   max|W_:j|,   max|(W diag(s) H)_:j|, ...

It is made once a plan is final, from the statistics that planning had. Of a large weight that is rotated, or whose rows are
divided, some rows stand for all, as they do where it is judged (`loss`). The result is a few KB for each tensor that linears
read; what it is for 80 layers is under 2 MB (`_SIZES`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from sqcompile.kernels.cpu.rows import rotate
from sqcompile.kernels.qtypes import QType
from sqcompile.kernels.reference import absmax_scale, quantize, token_scale, weight_scale
from sqcompile.passes.ir.graph import Linear, effective_weight, find_linears, nodes_by_name, row_parts, value
from sqcompile.passes.labels.match import Refusal, Site, input_sites
from sqcompile.passes.planning.choice import Costs, Known
from sqcompile.passes.planning.feel import logits_of
from sqcompile.passes.planning.loss import LARGEST as SAMPLED
from sqcompile.passes.planning.loss import Transform
from sqcompile.passes.planning.smoothing import SILENT
from sqcompile.passes.planning.spikes import spikes
from sqcompile.plan.entries import LayerPlan
from sqcompile.plan.evidence import BINS, CODES, LARGEST, OCTAVES, Curve, Evidence, InputEvidence, Tried
from sqcompile.plan.plan import Plan
from sqcompile.process.interrupts import checkpoint
from sqcompile.statistics.input_stats import InputStats
from sqcompile.statistics.observe import Calibration
from sqcompile.version import VERSION

# (buckets of a curve, tokens and buckets of a heat map): the finest of which all inputs take no more than `_BYTES`
_SIZES = ((256, 32, 128), (256, 32, 64), (128, 16, 64), (64, 16, 32), (32, 8, 32))
_BYTES = 2**20
_HEAD = 8  # rows of a heat map that are those with the largest values; the others are drawn evenly
_HUGE = torch.finfo(torch.float32).max
_Group = tuple[str, tuple[Linear, ...]]  # a site's name, and linears that read one tensor


def with_evidence(
    gm: fx.GraphModule,
    sites: list[Site],
    refusals: list[Refusal],
    calibration: Calibration,
    plan: Plan,
    model: str = "",
    known: Known | None = None,
) -> Plan:
    """A plan with its evidence.

    Args:
        gm, sites, refusals: a traced graph and what `match` found in it.
        calibration: its statistics.
        plan: of the graph, as `choose` made it.
        model: the name of the model's class.
        known: of the graph, by planning.
    """
    known = known or Known()
    layers = {l.name: l for l in plan.layers}
    nodes, linears = nodes_by_name(gm), find_linears(gm)
    seen = [l for l in linears if l.name in layers and l.name in calibration.inputs]
    groups = _groups(sites, refusals, seen, {n for n, l in layers.items() if l.quantized})
    rows = {
        l.name: plan.scales[s.name] for s in sites for l in linears if l.node == s.producer and s.name in plan.scales
    }
    size = next((s for s in _SIZES if len(groups) * _bytes(s) <= _BYTES), _SIZES[-1])
    found = []
    for site, group in groups:
        checkpoint()
        of_input = _Of(calibration.inputs[group[0].name], [layers[l.name] for l in group], plan, size)
        of_weights = []
        for l in group:  # one weight at a time, as each may be made for this
            how = Transform(of_input.columns, of_input.block, rows.get(l.name))
            of_weights.append(of_input.weight(l, effective_weight(gm, l, nodes), how, known))
        found.append(of_input.evidence(site, group, of_weights, value(nodes[group[0].weight]).element_size()))
    stored = {str(n.target): value(n) for n in gm.graph.find_nodes(op="get_attr")}
    evidence = replace(
        plan.evidence or Evidence(),
        model=model,
        versions=f"sqcompile {VERSION}, torch {torch.__version__}",
        dtype=", ".join(sorted({str(value(nodes[l.weight]).dtype).removeprefix("torch.") for l in seen})),
        bytes=sum(int(t.numel()) * t.element_size() for t in stored.values() if isinstance(t, Tensor)),
        logits=bool(logits_of(gm)),
        inputs=tuple(found),
    )
    return replace(plan, evidence=evidence)


def curves(first: Mapping[str, Costs], then: Mapping[str, Costs]) -> dict[str, Curve]:
    """What was tried at each site: by itself at a first look, where rotations were compared, and then for good."""
    found = {}
    for site, (by_loss, costs) in then.items():
        every = {**(first[site][1] if site in first else {}), **costs}
        tried = [Tried(*key, _rounded(cost)) for key, cost in every.items() if cost <= _HUGE]
        found[site] = Curve(
            by_loss,
            tuple(sorted(tried, key=lambda t: (t.dynamic, t.rotation or 0, -1.0 if t.alpha is None else t.alpha))),
        )
    return found


def _bytes(size: tuple[int, int, int]) -> int:
    buckets, rows, cells = size
    return 9 * buckets + 2 * rows * cells + 20 * LARGEST + 8 * BINS


def _groups(sites: list[Site], refusals: list[Refusal], known: Sequence[Linear], quantized: set[str]) -> list[_Group]:
    """Linears that read one tensor, are smoothed together, and all quantized or not; in graph order."""
    where = {l.name: site.name for site in sites + input_sites(refusals, quantized) for l, _ in site.balance}
    groups: dict[tuple[str, str, str | None, bool], list[Linear]] = {}
    for l in known:
        site = where.get(l.name, "") if l.name in quantized else ""
        groups.setdefault((site, l.x, l.offsets, l.name in quantized), []).append(l)
    return [(key[0], tuple(group)) for key, group in groups.items()]


class _Of:
    """One tensor that linears read, as it was and as it is quantized."""

    def __init__(self, stats: InputStats, layers: Sequence[LayerPlan], plan: Plan, size: tuple[int, int, int]) -> None:
        self.stats, self.size, self.qtype, first = stats, size, plan.recipe.qtype, layers[0]
        self.quantized, self.static = first.quantized, first.input_scale
        columns = plan.columns.get(first.name)
        self.columns = None if columns is None else columns.to(stats.absmax.device)
        self.block, self.activation = first.rotation, first.activation or plan.recipe.activation
        self.per_tensor = {l.name: (l.weight or plan.recipe.weight) == "per_tensor" for l in layers}
        self.rows = stats.rows.float()
        rows = self.rows if self.columns is None else self.rows / self.columns
        self.after = rows if self.block is None else rotate(rows, self.block)

    def weight(self, l: Linear, w: Tensor, how: Transform, known: Known) -> _Weight:
        before = known.largest_of(l.name, lambda: w)
        return _Weight(w, how, self.per_tensor[l.name], self.qtype, self.quantized, l.experts, before)

    def evidence(self, site: str, group: Sequence[Linear], weights: Sequence[_Weight], itemsize: int) -> InputEvidence:
        stats = self.stats
        before, after = stats.absmax, self._absmax()
        codes = torch.zeros(2, BINS, dtype=torch.int64)
        clipped = zeros = None
        if len(self.rows) and self.quantized:
            codes[0], clipped, zeros = self._codes()
        codes[1] = torch.stack([w.codes for w in weights]).sum(0)
        of_weights = (torch.stack([w.absmax[i] for w in weights]).amax(0) for i in (0, 1))
        absmax = torch.stack([before.cpu(), after.cpu(), *of_weights]).nan_to_num(0.0, _HUGE).clamp_max(_HUGE / 4)
        k, silence = absmax.shape[1], _silence(absmax[0])
        order = absmax[0].argsort(descending=True, stable=True)[:LARGEST]
        width, cells = math.ceil(k / self.size[0]), math.ceil(k / self.size[2])
        dead = absmax[0] == 0
        heat, tops = self._heat(cells)
        return InputEvidence(
            tuple(l.name for l in group),
            site,
            k,
            stats.count,
            itemsize,
            int(dead.sum()),
            int(((absmax[0] < silence) & ~dead).sum()),
            "" if stats.absmax_alone else spikes(stats) or "",
            (_ratio(absmax[0]), _ratio(absmax[1])),
            clipped,
            zeros,
            width,
            _buckets(absmax, width).to(torch.bfloat16),
            _buckets(dead[None].float(), width, total=True)[0].clamp_max(255).to(torch.uint8),
            order.to(torch.int32),
            absmax[:, order].contiguous(),
            cells,
            heat,
            tops,
            codes.clamp_max(2**31 - 1).to(torch.int32),
        )

    def _absmax(self) -> Tensor:
        """float32 [K], of what is quantized: of all tokens, or after a rotation of the sampled ones."""
        if self.block is not None and len(self.after):
            return self.after.abs().amax(0)
        return self.stats.absmax if self.columns is None else self.stats.absmax / self.columns

    def _codes(self) -> tuple[Tensor, float, float]:
        """int64 [BINS], and the shares of values that are clipped, and that are rounded to zero though they are none."""
        x, q_max = self.after, self.qtype.q_max
        if self.static is not None:
            scale = torch.tensor(self.static, dtype=torch.float32, device=x.device)
        elif self.activation == "per_token":
            scale = token_scale(x, q_max)
        else:
            scale = absmax_scale(x.abs().amax(), q_max)
        some = x != 0
        count = max(1, int(some.sum()))
        clipped = int((x.abs() > scale * (q_max + 0.5)).sum())
        q = quantize(x, scale, dtype=self.qtype.dtype).float()
        zeros = int(((q == 0) & some).sum())
        return _histogram(q, self.qtype), _rounded(clipped / max(1, x.numel())), _rounded(zeros / count)

    def _heat(self, cells: int) -> tuple[Tensor, tuple[float, float]]:
        """`InputEvidence.heat` and its largest values."""
        most = self.size[1]
        if not len(self.rows):
            return torch.zeros(2, 0, 0, dtype=torch.uint8), (0.0, 0.0)
        sizes = self.rows.abs().amax(1).cpu()
        largest = sizes.argsort(descending=True, stable=True)[:_HEAD]
        others = [i for i in range(len(sizes)) if i not in set(largest.tolist())][: most - len(largest)]
        which = torch.tensor([*largest.tolist(), *others])
        which = which[sizes[which].argsort(descending=True, stable=True)]
        maps, tops = [], []
        for x in (self.rows, self.after):
            size = _buckets(x[which.to(x.device)].abs().cpu(), cells)
            top = float(size.max())
            depth = (size / top).log2() * (254 / OCTAVES) if top > 0 else torch.full_like(size, -math.inf)
            maps.append((255 + depth.round().clamp_min(-255)).to(torch.uint8))
            tops.append(min(_rounded(top), _HUGE))
        return torch.stack(maps), (tops[0], tops[1])


class _Weight:
    """What is known of one weight, [N, K] or [E, N, K]: ``absmax`` float32 [K] before and after, ``codes`` int64 [BINS].

    ``before``: max|W_:j|, float32 [K].
    """

    def __init__(
        self,
        w: Tensor,
        how: Transform,
        per_tensor: bool,
        qtype: QType,
        quantized: bool,
        experts: int | None,
        before: Tensor,
    ) -> None:
        self.codes = torch.zeros(BINS, dtype=torch.int64)
        changed = how.rows is not None or how.block is not None
        afters = [before if how.columns is None else before * how.columns]
        for matrix in (w if experts else [w]) if quantized else ():
            some = how.weight(matrix, slice(0, None, max(1, w.numel() // SAMPLED)))
            if per_tensor:
                after = torch.stack([how.weight(matrix, p).abs().amax(0) for p in row_parts(matrix)]).amax(0)
                scale = absmax_scale(after.amax(), qtype.q_max)
            else:
                after, scale = some.abs().amax(0), weight_scale(some, True, qtype.q_max)
            if changed:
                afters.append(after)
            self.codes += _histogram(quantize(some, scale, dtype=qtype.dtype).float(), qtype)
        self.absmax = before.cpu(), torch.stack(afters[1:] or afters).amax(0).cpu()


def _histogram(q: Tensor, qtype: QType) -> Tensor:
    """int64 [BINS] of values within ±q_max."""
    steps = q if qtype.q_max == 127 else q * (127 / qtype.q_max)
    bins = ((steps.round() + 127) / CODES).floor().long().clamp(0, BINS - 1)
    return bins.flatten().bincount(minlength=BINS).cpu()


def _buckets(x: Tensor, width: int, total: bool = False) -> Tensor:
    """The largest value of each bucket of channels, or their sum: x float32 [R, K] not negative -> [R, B]."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % width)).unflatten(1, (-1, width))
    return padded.sum(2) if total else padded.amax(2)


def _silence(absmax: Tensor) -> float:
    """Below this, a channel is (nearly) silent."""
    awake = absmax[absmax > 0]
    return SILENT * float(awake.median()) if len(awake) else 0.0


def _ratio(absmax: Tensor) -> float:
    """The largest channel over the median one that is not dead; 0 where all are."""
    awake = absmax[absmax > 0]
    return _rounded(min(float(awake.max()) / float(awake.median()), _HUGE)) if len(awake) else 0.0


def _rounded(x: float) -> float:
    """Four digits: enough to be shown."""
    return float(f"{x:.3e}")
