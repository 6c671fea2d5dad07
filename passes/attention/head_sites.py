"""match_heads: where the scales of an attention's head channels can go. Analysis only.

    (Q diag(s)) (K diag(1/s))ᵀ = Q Kᵀ           for each head, one s per channel

    %lq = linear(%x, %wq)                                       # 2 heads of 4 channels
    %uq = unflatten(%lq, -1, [2, 4])
    %q = transpose(%uq, 1, 2)
    %half = cat([%q3, %q1], -1)                                 # a rotary embedding: channels c and c + 2 are added
    %qc = mul(%q, %cos)
    %qs = mul(%half, %sin)
    %qr = add(%qc, %qs)
    %lk = linear(%x, %wk)                                       # one key head, which both query heads read
    %y = scaled_dot_product_attention(%qr, %k, %v, enable_gqa=True)
->
    wq[c] * s[class of c]: [0, 1, 0, 1, 0, 1, 0, 1]
    wk[c] / s[class of c]: [0, 1, 0, 1]

The labels of `labels` run from every producer to the product, with two more rules. Where an operation adds channels of
one producer, as a rotary embedding adds x · cos and rotate_half(x) · sin, their labels are united: they share one scale.
And QKᵀ itself unites the label of a query channel with that of the key channel it meets, over all query heads that read
one key head. What is united is one class. A class is free if nothing but products of queries and keys reads its labels,
and each is a query's or a key's, not both.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from sqcompile.passes.attention.chains import Attention
from sqcompile.passes.ir.graph import Linear, arguments, aten, constants, find_linears, nodes_by_name
from sqcompile.passes.ir.operators import HOMOGENEOUS, LAYOUT
from sqcompile.passes.ir.sizes import at_two_sizes
from sqcompile.passes.labels.interpreter import LabelInterpreter, execute
from sqcompile.passes.labels.match import Site, producer_name
from sqcompile.passes.labels.rules import RESIDUAL, RULES, Flow, Refused, behind, describe, refuse_rounding, uniform

if TYPE_CHECKING:
    from networkx.utils import UnionFind

_Label = tuple[str, str, int]  # "q" or "k", the producer's node, the label


@dataclass(frozen=True)
class HeadSite:
    """Attentions whose head channels share scales, and what absorbs them.

    Attributes:
        name: of the first attention.
        classes: number of scales.
        queries, keys: what multiplies s into the queries, and divides the keys by it: sites without balance layers, and
            the class of each of the producer's channels, int64 [C], -1 for those that keep s = 1.
        maps: per attention, the class of each query channel, int64 [H, D], and of each key channel, int64 [G, D].
    """

    name: str
    classes: int
    queries: tuple[tuple[Site, Tensor], ...]
    keys: tuple[tuple[Site, Tensor], ...]
    maps: dict[str, tuple[Tensor, Tensor]]


@dataclass
class _Reached:
    """What the labels of one run found: flows, united labels by producer, and the labels at each product's operands."""

    flows: dict[str, Flow]
    ties: dict[str, set[tuple[int, int]]] = field(default_factory=dict)
    operands: dict[tuple[str, str], dict[str, Tensor]] = field(default_factory=dict)


_End = tuple[str, Tensor]  # a producer's node, and its labels at the queries or keys, int64 [H, D]


def match_heads(gm: fx.GraphModule, attentions: list[Attention]) -> tuple[list[HeadSite], dict[str, str]]:
    """Finds where scales of head channels can be absorbed.

    Args:
        gm: a traced graph; it is not changed.
        attentions: those of it that are to be smoothed.

    Returns:
        Sites, and for each attention in none of them the reason, in words.
    """
    if not attentions:
        return [], {}
    linears = find_linears(gm)

    def run(size: dict[Any, int]) -> _Reached:
        interpreter = execute(_HeadLabels(gm, linears, attentions), size)
        return replace(interpreter.reached, flows=interpreter.flows)

    runs = at_two_sizes(gm, run)
    nodes = nodes_by_name(gm)
    order = {n: i for i, n in enumerate(nodes)}
    stops = {n: reason for flow in runs[0].flows.values() for n, reason in flow.stops.items()}
    ends: dict[str, tuple[_End, _End]] = {}
    why: dict[str, str] = {}
    for a in attentions:
        q, k = (_nearest(*runs, (a.name, side), order) for side in "qk")
        if q is None or k is None:
            side, what = ("q", "queries") if q is None else ("k", "keys")
            why[a.name] = f"its {what}: {_blocked(nodes, a, side, runs[0], stops)}"
        else:
            ends[a.name] = q, k
    union, dead = _unite_classes(*runs, attentions, ends)
    maps = {}
    for name, ((producer, of_q), _) in ends.items():
        roots = [[union["q", producer, int(c)] for c in head] for head in of_q]
        reasons = [dead[r] for head in roots for r in head if r in dead]
        if len(reasons) == of_q.numel():
            why[name] = f"a channel {reasons[0]}"
        else:
            maps[name] = roots
    return _sites(gm, runs[0].flows, {a.name: a for a in attentions}, ends, maps, union, dead), why


class _HeadLabels(LabelInterpreter):
    """Labels that additions of a producer's own channels unite, and that end at QKᵀ without being refused."""

    def __init__(self, gm: fx.GraphModule, linears: list[Linear], attentions: list[Attention]) -> None:
        super().__init__(gm, linears)
        self.products = {a.product: a for a in attentions}
        self.reached = _Reached({})

    def _rule(self, n: fx.Node, out: Any, flow: Flow, operands: list[tuple[fx.Node, Any]]) -> Any:
        if n.name in self.products:
            return self._product(n, out, flow, dict(operands))
        if n.target in (aten.add.Tensor, aten.sub.Tensor) and len(operands) == 2:
            return self._unite(flow, *(labels.broadcast_to(out.shape) for _, labels in operands))
        if n.target == aten.view_as_complex.default:
            pair = operands[0][1]
            return self._unite(flow, pair[..., 0], pair[..., 1])
        if n.target == aten.view_as_real.default:
            return operands[0][1].unsqueeze(-1).expand(out.shape)
        return super()._rule(n, out, flow, operands)

    def _unite(self, flow: Flow, a: Tensor, b: Tensor) -> Tensor:
        differ = a != b
        pairs = torch.stack([a[differ], b[differ]], -1).unique(dim=0)
        if bool((pairs < 0).any()):
            raise Refused(RESIDUAL)
        self.reached.ties.setdefault(flow.producer, set()).update(map(tuple, pairs.tolist()))
        return a

    def _product(self, n: fx.Node, out: Any, flow: Flow, operands: dict[fx.Node, Any]) -> Any:
        a, whole = self.products[n.name], n.target == aten.scaled_dot_product_attention.default
        q, k = n.args[:2]
        if q is k:
            raise Refused("is query and key at once")
        for side, node in (("q", q), ("k", k)):
            if node in operands:
                labels = operands[node]  # type: ignore[index]
                refuse_rounding(self.ways[node][flow.producer], flow.dtype)  # type: ignore[index]
                heads = by_head(labels.mT if side == "k" and not whole else labels, a.heads)
                self.reached.operands.setdefault((a.name, side), {})[flow.producer] = heads
        mask = arguments(n)["attn_mask"] if whole else None
        if mask in operands:
            flow.refuse(operands[mask], "is a mask of scores")
        values = n.args[2] if whole else None
        if values not in operands or values in (q, k):
            if values is not None and values in operands:
                raise Refused("is a value as well as a query or a key")
            return None
        return RULES[n.target](self, n, out, flow, {values: operands[values]})  # type: ignore[index]


def by_head(labels: Tensor, heads: int) -> Tensor:
    """Labels of an operand [B, H, S, D] or [B H, S, D], or with fewer key heads, as [H, D]."""
    if labels.dim() == 3:
        labels = labels.reshape(-1, heads, *labels.shape[1:])
    if not uniform(labels, 0) or not uniform(labels, 2):
        raise Refused("differs between tokens")
    by_head = labels[0, :, 0]
    return by_head.repeat_interleave(heads // len(by_head), 0)


def _nearest(a: _Reached, b: _Reached, end: tuple[str, str], order: dict[str, int]) -> _End | None:
    """The producer next to a product's operand that can be scaled at all, and its labels there."""
    producers, again = a.operands.get(end, {}), b.operands.get(end, {})
    same = {p: l for p, l in producers.items() if p in again and torch.equal(again[p], l)}
    free = [p for p, l in same.items() if any(c >= 0 and c not in a.flows[p].refused for c in l.unique().tolist())]
    nearest = max(free, key=order.__getitem__, default=None)
    return None if nearest is None else (nearest, same[nearest])


def _blocked(nodes: dict[str, fx.Node], a: Attention, side: str, reached: _Reached, stops: dict[str, str]) -> str:
    """Why nothing can scale an operand: what else its labels reach, or what happened to them behind it."""
    for producer, labels in reached.operands.get((a.name, side), {}).items():
        reasons = [reached.flows[producer].refused.get(int(c)) for c in labels.unique()]
        if any(reasons):
            return next(r for r in reasons if r)
    node = behind(nodes[a.q if side == "q" else a.k], LAYOUT | HOMOGENEOUS)
    if a.product in stops:
        return stops[a.product]
    if node.op == "placeholder":
        return "an input of the model"
    return stops.get(node.name) or describe(node)


def _unite_classes(
    first: _Reached, second: _Reached, attentions: list[Attention], ends: dict[str, tuple[_End, _End]]
) -> tuple[UnionFind, dict[_Label, str]]:
    """Which labels share a scale; and, by the root of each class that must keep s = 1, the reason."""
    from networkx.utils import UnionFind  # here, as networkx takes its time

    union: UnionFind = UnionFind()
    fixed: dict[_Label, str] = {}
    chosen = {side: {e[i][0] for e in ends.values()} for i, side in enumerate("qk")}
    for side, producers in chosen.items():
        for p in producers:
            fixed[side, p, -1] = "is not made by the parameter that scales the others"
            for i, j in first.ties.get(p, set()) | second.ties.get(p, set()):
                union.union((side, p, i), (side, p, j))
            for run in (first, second):
                for linear, columns in run.flows[p].balance:
                    fixed |= {(side, p, int(c)): f"also feeds {linear}" for c in columns.unique()}
                fixed |= {(side, p, c): reason for c, reason in run.flows[p].refused.items()}
    for a in attentions:
        for i, side in enumerate("qk"):
            for p, labels in first.operands.get((a.name, side), {}).items():
                for s in "qk":  # a scale of another attention's, or of the other side, would arrive here
                    if p in chosen[s] and (s != side or a.name not in ends or ends[a.name][i][0] != p):
                        reason = "is a query as well as a key, or read by another attention"
                        fixed |= {(s, p, int(c)): reason for c in labels.unique()}
        if a.name in ends:
            (q, of_q), (k, of_k) = ends[a.name]
            for x, y in torch.stack([of_q.flatten(), of_k.flatten()], -1).unique(dim=0).tolist():
                union.union(("q", q, x), ("k", k, y))
    return union, {union[label]: reason for label, reason in fixed.items()}


def _sites(
    gm: fx.GraphModule,
    flows: dict[str, Flow],
    attentions: dict[str, Attention],
    ends: dict[str, tuple[_End, _End]],
    maps: dict[str, list[list[_Label]]],
    union: UnionFind,
    dead: dict[_Label, str],
) -> list[HeadSite]:
    """One site per set of attentions that share a class; nearly always one attention."""
    from networkx.utils import UnionFind

    together: UnionFind = UnionFind()
    for name, roots in maps.items():
        together.union(name, *{r for head in roots for r in head if r not in dead})
    groups: dict[Any, list[str]] = {}
    for name in maps:
        groups.setdefault(together[name], []).append(name)
    nodes, const, linears = nodes_by_name(gm), constants(gm), {l.node: l for l in find_linears(gm)}
    sites = []
    for names in groups.values():
        index: dict[_Label, int] = {}
        for name in names:
            for r in (r for head in maps[name] for r in head if r not in dead):
                index.setdefault(r, len(index))

        def absorber(side: str, p: str, index: dict[_Label, int] = index) -> tuple[Site, Tensor]:
            flow = flows[p]
            classes = torch.tensor([index.get(union[side, p, c], -1) for c in range(flow.channels)])
            name = producer_name(nodes[p], flow.kind, linears, const)
            adds = tuple(a for a in flow.adds if bool((classes[a[2][a[2] >= 0]] >= 0).any()))
            return Site(name, flow.kind, p, flow.channels, (), adds, classes >= 0, f"folded into {name}"), classes

        heads = {n: torch.tensor([[index.get(r, -1) for r in head] for head in maps[n]]) for n in names}
        queries, keys = (
            tuple(absorber(side, p) for p in dict.fromkeys(ends[n][i][0] for n in names)) for i, side in enumerate("qk")
        )
        repeats = {n: attentions[n].heads // attentions[n].groups for n in names}
        sites.append(
            HeadSite(names[0], len(index), queries, keys, {n: (m, m[:: repeats[n]]) for n, m in heads.items()})
        )
    return sites
