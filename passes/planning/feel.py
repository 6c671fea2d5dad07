"""feel: what an error of a linear's input or weight costs the model: gradients, on the calibration sample.

What the outputs lose by small errors δ of one linear's outputs is, to second order, E[(gᵀδ)²] / 2, where g is the
gradient of log p(y) with y drawn from the model's own prediction p: the Fisher information, which is the second derivative
of the KL divergence from the float model (Martens, arXiv 1412.1193). Roundings of different values are independent of each other, so of
the square of the sum only the squares are left:

    loss = ½ Σ_rows Σ_j ΔX_j² (gᵀW)_j²  +  ½ Σ_n Σ_j ΔW_nj² E[g_n²] E[x_j²]          nats, by output row

The first is of gradients with respect to the linear's input, of a sample of rows; linears that read one input see one
error. Where the outputs are no logits, y is theirs plus noise of as much energy as they have, and ``loss`` half of their
error's relative energy.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial

import torch
from torch import Tensor, fx

from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import Linear, aten, find_linears, value
from sqcompile.passes.labels.match import Refusal, Site, input_sites
from sqcompile.passes.planning.gradients import Group, Seed, gradients
from sqcompile.passes.planning.overrides import recipe_of
from sqcompile.passes.planning.stay_float import stay_float
from sqcompile.plan.recipe import Recipe
from sqcompile.process.parallel import Parallel
from sqcompile.process.progress import each
from sqcompile.pytorch.core import hollow, pytree
from sqcompile.statistics.observe import Calibration
from sqcompile.statistics.sample import LEAST

ROWS, LEAST_ROWS = 256, 32  # kept of each input: over all calls, and of one
TOKENS = 1024  # as many calls are run as have so many


@dataclass(eq=False)
class Reads:
    """Rows of an input that several linears read.

    Attributes:
        rows: [R, K] in the input's dtype: those whose error costs most, and a uniform sample of the others.
        gradients: like rows.
        weights: float32 [R], how many rows of the calls each stands for, for every row of the outputs.
        half: int64 [R], the half of the calibration tokens that each is of, as `InputStats.half` has it.
    """

    rows: Tensor
    gradients: Tensor
    weights: Tensor
    half: Tensor

    def joined(self, other: Reads) -> Reads:
        parts = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return Reads(*(torch.cat(pair) for pair in parts))


@dataclass(eq=False)
class Felt:
    """What the outputs feel of a graph's linears.

    Attributes:
        reads: by linear; those of one site that read one node share one.
        outputs: by linear: Σ g_n² over the rows of the calls, for every row of the outputs, float32 [N].
        why: in words, why nothing is known; None where something is.
        idle: linears that the outputs do not depend on, or on what they read, or their part in one of the processes that
            hold the model together.
    """

    reads: dict[str, Reads] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    why: str | None = None
    idle: frozenset[str] = frozenset()

    def knows(self, linears: Sequence[Linear]) -> bool:
        """Whether the outputs depend on each of some linears, as far as is known."""
        return self.blind(linears) is None

    def blind(self, linears: Sequence[Linear]) -> str | None:
        """In words, why nothing is known of some linears; None where something is."""
        if self.why is not None:
            return f"the outputs have no gradients: {self.why}"
        idle = [l.name for l in linears if l.name not in self.reads or l.name in self.idle]
        return f"no output depends on {idle[0]} in the calls that were run again" if idle else None


def feel(
    gm: fx.GraphModule, sites: list[Site], refusals: list[Refusal], calibration: Calibration, recipe: Recipe
) -> Felt | None:
    """What the outputs feel of the linears that are to be quantized, as `choose` takes it; None where nobody asks.

    Whatever stands in the way is a reason, and no error: `choose` goes by the linears' own errors then, in all processes that
    hold the model together.
    """
    linears = find_linears(gm)
    asked = recipe.max_degradation is not None or (recipe.float_work and logits_of(gm))
    if not asked and not any(recipe_of(gm, l, recipe).by_loss for l in linears):
        return None
    floats = stay_float(gm, linears, calibration, recipe)
    groups: dict[tuple[str, str, str | None], list[Linear]] = {}
    for site in sites + input_sites(refusals, {l.name for l in linears} - set(floats)):
        for l in dict.fromkeys(l for l, _ in site.balance):
            if l.name not in floats:
                groups.setdefault((site.name, l.x, l.offsets), []).append(l)
    rows = max((stats.count for stats in calibration.inputs.values()), default=0) / max(1, calibration.batches)
    calls, logits = calibration.sample.calls[: math.ceil(TOKENS / max(1, rows))], logits_of(gm)
    if not calls:
        return Felt(why="no call can be run again")
    found = _Found(max(LEAST_ROWS, ROWS // len(calls)))
    parallel = about(gm).parallel
    with parallel.attempt() as errors:
        for call in each(calls, "gradients"):
            seeds = found.seeds(gm, call.rows, logits)
            found.batch = call.batch
            with contextlib.ExitStack() as stack:
                for kind in {rows.device.type for _, rows in call.rows.values()}:
                    stack.enter_context(torch.autocast(kind, enabled=False))
                gradients(gm, call.arguments, seeds, [tuple(g) for g in groups.values()], found.see)
    if errors:  # no derivative, no memory: the linears' own errors are known all the same
        return Felt(why=errors[0])
    return found.felt(calibration, parallel)


class _Found:
    """Sums over calls."""

    def __init__(self, share: int) -> None:
        """``share``: rows that are kept of an input in each call."""
        self.share, self.count, self.batch = share, 0, 0  # rows of the outputs so far, and the call's batch
        self.reads: dict[Group, Reads] = {}
        self.outputs: dict[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(0)

    def seeds(self, gm: fx.GraphModule, rows: dict[int, tuple[Tensor, Tensor]], logits: set[int]) -> dict[str, Seed]:
        """What the gradients of a call's outputs are, by node. ``rows`` are those that `Sample` keeps, ``logits`` positions."""
        nodes = pytree.tree_leaves(next(iter(gm.graph.find_nodes(op="output"))).args)
        chosen = {i: r for i, r in rows.items() if i in logits} or rows
        self.count += sum(len(which) for which, _ in chosen.values())
        return {
            nodes[i].name: partial(_place, which=which, gradient=(self._drawn if i in logits else self._probe)(y))
            for i, (which, y) in chosen.items()
        }

    def _drawn(self, logits: Tensor) -> Tensor:
        """The gradient of log p(y) for y drawn from p: [R, C]."""
        p = logits.softmax(-1)
        drawn = torch.multinomial(p.cpu(), 1, generator=self.generator).to(p.device)
        return -p.scatter_add(-1, drawn, -torch.ones_like(p[:, :1]))

    def _probe(self, y: Tensor) -> Tensor:
        """Signs drawn for every value, over the row's energy as `Sample.noise` takes it: [R, C]."""
        energy = y.square().sum(-1, keepdim=True)
        signs = torch.randint(0, 2, y.shape, generator=self.generator).to(y.device) * 2.0 - 1
        return signs * energy.clamp_min(LEAST * float(energy.mean())).clamp_min(1e-30).rsqrt()

    def see(self, group: Group, x: Tensor, of_x: Tensor, of_outputs: Sequence[Tensor]) -> None:
        x, of_x = x.flatten(0, -2), of_x.flatten(0, -2)
        if not bool(of_x.isfinite().all()):
            raise ValueError(f"the gradient of the input of {group[0].name} is not finite")
        size, slope = x.abs().amax(-1).double(), of_x.double().square().sum(-1)
        cost = size.square() * slope  # but for a constant, what rounding costs without smoothing
        kept, weights = _picked(cost, slope > 0, self.share, self.generator)
        reads = Reads(
            x[kept], of_x[kept], weights, _half(len(x), group[0].experts, self.batch)[kept.cpu()].to(x.device)
        )
        self.reads[group] = self.reads[group].joined(reads) if group in self.reads else reads
        for l, g in zip(group, of_outputs, strict=True):
            squares = g.flatten(0, -2).float().square().sum(0)
            self.outputs[l.name] = self.outputs[l.name] + squares if l.name in self.outputs else squares

    def felt(self, calibration: Calibration, parallel: Parallel) -> Felt:
        every = {}
        for group, r in self.reads.items():
            largest = calibration.inputs[group[0].name].halves
            other = (r.rows.abs() > largest[r.half]).any(-1)  # padding was counted here, and not there
            every[group] = replace(r, weights=r.weights / self.count, half=r.half ^ other)
        reads = {l.name: r for group, r in every.items() for l in group}
        # of a weight of zeros the outputs feel the output, and none of the input
        alive = parallel.every([bool(y.any()) and len(reads[name].rows) > 0 for name, y in self.outputs.items()])
        idle = frozenset(name for name, so in zip(self.outputs, alive, strict=True) if not so)
        return Felt(reads, {name: squares / self.count for name, squares in self.outputs.items()}, None, idle)


def _picked(cost: Tensor, may: Tensor, share: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which rows are kept, int64 [R], and how many each stands for, float32 [R]: half the costliest, half drawn evenly.

    Args:
        cost: [T].
        may: bool [T], the rows that count.
        share: at most so many.
        generator: of random numbers.
    """
    rows = may.nonzero().flatten()
    order = rows[cost[rows].argsort(descending=True)]
    if len(order) <= share:
        return order, torch.ones(len(order), dtype=torch.float32, device=cost.device)
    first, others = order[: share // 2], order[share // 2 :]
    drawn = others[torch.randperm(len(others), generator=generator)[: share - share // 2].to(others.device)]
    weights = torch.ones(share, dtype=torch.float32, device=cost.device)
    weights[len(first) :] = len(others) / len(drawn)
    return torch.cat([first, drawn]), weights


def _half(rows: int, experts: int | None, batch: int) -> Tensor:
    """Which half of the tokens `InputStats.update` takes each row of a batch for, but for padding: int64 [T]."""
    row = torch.arange(rows)
    return (row % 2 if experts else (row >= rows // 2).long()) ^ (batch % 2)


def _place(y: Tensor, which: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of an output y, from that of some of its rows."""
    out = torch.zeros_like(y).reshape(-1, y.shape[-1]) if y.dim() > 1 else torch.zeros_like(y).reshape(1, -1)
    out[which] = gradient.to(y.dtype)
    return out.reshape(y.shape)


def logits_of(gm: fx.GraphModule) -> set[int]:
    """The positions of outputs that are logits: called so, or as wide as the vocabulary of the token embedding."""
    nodes = pytree.tree_leaves(next(iter(gm.graph.find_nodes(op="output"))).args)
    spec = about(gm).out_spec
    out, leaves = None, list[Tensor]()
    if spec is not None and spec.num_leaves == len(nodes):
        # a class may take no such tensors: its logits are found by their width
        with contextlib.suppress(Exception):
            out, leaves = hollow(spec)
    named = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", None)
    if found := {i for i, leaf in enumerate(leaves) if leaf is named}:
        return found
    tables = [value(n.args[0]) for n in gm.graph.find_nodes(op="call_function", target=aten.embedding.default)]
    rows, widths = ({size for t in tables if isinstance(size := t.shape[dim], int)} for dim in (0, 1))
    return {
        i
        for i, n in enumerate(nodes)
        if isinstance(n, fx.Node)
        and isinstance(y := value(n), Tensor)
        and y.dim() > 1
        and isinstance(width := y.shape[-1], int)  # a symbolic one is no vocabulary
        and width in rows - widths
    }
