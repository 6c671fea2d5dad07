"""match: GraphModule -> smoothing sites and refusals. Analysis only; every linear is in exactly one of the two.

A site is one producer that can absorb 1/s and every linear (balance layer) that must then absorb s:

    %n = layer_norm(%x, [4], %g, %b)
    %q = linear(%n, %wq)
    %k = linear(%n, %wk)
->
    g -> wq, wk: %n / s, folded into norm, 4 of 4 channels
    wq[:, j] * s[0 1 2 3]                                   # the label of each column
    wk[:, j] * s[0 1 2 3]

Which linears those are comes from channel labels (`labels`), so a consumer cannot be missed: a label that reaches
anything but a balance layer is refused, in words.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from sqcompile.passes.ir.form import once
from sqcompile.passes.ir.graph import Linear, constants, find_linears, first_leaf, nodes_by_name
from sqcompile.passes.ir.operators import HOMOGENEOUS, LAYOUT
from sqcompile.passes.ir.sizes import at_two_sizes
from sqcompile.passes.labels.interpreter import run_labels, vector_operand
from sqcompile.passes.labels.rules import Flow, behind, describe


@dataclass(frozen=True)
class Site:
    """Where smoothing scales can go.

    Attributes:
        name: "producer -> balance layers" by parameter names; the key of the site in a Plan.
        kind: what absorbs 1/s: "norm", "scale", "linear", or "input": nothing, it is multiplied explicitly.
        producer: name of the producer's node, [..., C]; for "input" the node the linears read.
        channels: C.
        balance: the linears that absorb s, each with its index map, int64 [K]: column j is multiplied by s[map[j]].
        adds: constants added on the way, divided along: (node, argument index, int64 labels broadcast like it).
        free: bool [C], the labels that may be scaled; the others keep s = 1.
        reason: why it is this kind, in words.
    """

    name: str
    kind: str
    producer: str
    channels: int
    balance: tuple[tuple[Linear, Tensor], ...]
    adds: tuple[tuple[str, int, Tensor], ...]
    free: Tensor
    reason: str

    def allows(self, s: Tensor) -> bool:
        """Whether scales [C] leave alone the channels that are not free."""
        return bool((s[~self.free.to(s.device)] == 1).all())


@dataclass(frozen=True)
class Refusal:
    """A linear whose input scales no parameter can absorb, and why."""

    linear: Linear
    reason: str


@once
def match(gm: fx.GraphModule) -> tuple[list[Site], list[Refusal]]:
    """Finds every site where a parameter can absorb 1/s.

    Args:
        gm: a traced graph; it is not changed.

    Returns:
        Sites in graph order, and a refusal for each linear in none of them.

    Raises:
        CaptureError: if the graph cannot be run at two sizes of batch and sequence.
    """
    linears = find_linears(gm)
    flows = _flows(gm, linears)
    by_node = {l.node: l for l in linears}
    nodes, const = nodes_by_name(gm), constants(gm)
    names = {f.producer: producer_name(nodes[f.producer], f.kind, by_node, const) for f in flows.values()}
    why: dict[str, str] = {}
    candidates = []
    for flow in flows.values():
        balance = _balanced(flow, names[flow.producer], by_node, why)
        if balance:
            candidates.append((flow, balance))
    order = {name: i for i, name in enumerate(nodes)}
    # The producer that serves most linears first; of two that serve the same ones, the nearer.
    candidates.sort(key=lambda c: (-len(c[1]), -order[c[0].producer]))
    taken: set[str] = set()
    sites = []
    for flow, balance in candidates:
        if any(l.node in taken for l, _ in balance):
            continue
        taken |= {l.node for l, _ in balance}
        sites.append(_site(flow, names[flow.producer], balance))
    stops = {node: reason for flow in flows.values() for node, reason in flow.stops.items()}
    refusals = [Refusal(l, why.get(l.node) or _blocked(nodes, l, stops)) for l in linears if l.node not in taken]
    return sorted(sites, key=lambda s: order[s.producer]), refusals


def input_sites(refusals: list[Refusal], quantized: Collection[str]) -> list[Site]:
    """The sites where x·(1/s) is multiplied explicitly: one per tensor that refused linears to be quantized read."""
    groups: dict[str, list[Refusal]] = {}
    for r in refusals:
        if r.linear.name not in quantized:
            continue
        groups.setdefault(r.linear.x, []).append(r)
    sites = []
    for x, group in groups.items():
        k = group[0].linear.in_features
        name = "input -> " + ", ".join(r.linear.name for r in group)
        balance = tuple((r.linear, torch.arange(k)) for r in group)
        sites.append(Site(name, "input", x, k, balance, (), torch.ones(k, dtype=torch.bool), group[0].reason))
    return sites


def _flows(gm: fx.GraphModule, linears: list[Linear]) -> dict[str, Flow]:
    """The flows that hold at every batch and sequence size: those at two sizes, with what differs refused."""
    first, second = at_two_sizes(gm, lambda size: run_labels(gm, linears, size))
    return {name: _agree(flow, second[name]) for name, flow in first.items()}


def _agree(a: Flow, b: Flow) -> Flow:
    reason = "is routed by batch or sequence size"
    merged = replace(a, refused={**b.refused, **a.refused})
    same = [n for n, _ in a.balance] == [n for n, _ in b.balance] and [n for n, _, _ in a.adds] == [
        n for n, _, _ in b.adds
    ]
    if not same:
        merged.refuse(torch.arange(a.channels), reason)
        return merged
    pairs = [(m, n) for (_, m), (_, n) in zip(a.balance, b.balance, strict=True)]
    pairs += [(m, n) for (_, _, m), (_, _, n) in zip(a.adds, b.adds, strict=True)]
    for m, n in pairs:
        if m.shape != n.shape:
            merged.refuse((m, n), reason)
        elif bool((m != n).any()):
            merged.refuse((m[m != n], n[m != n]), reason)
    return merged


def _balanced(
    flow: Flow, producer: str, linears: dict[str, Linear], why: dict[str, str]
) -> list[tuple[Linear, Tensor]]:
    """The linears all of whose columns a flow can scale; labels of any other linear it reaches are refused."""
    balance = list(flow.balance)
    while True:
        open_ = [(n, m) for n, m in balance if bool((m < 0).any()) or any(int(c) in flow.refused for c in m.unique())]
        if not open_:
            return [(linears[n], m) for n, m in balance]
        for n, m in open_:
            reasons = [flow.refused[c] for c in m.unique().tolist() if c in flow.refused]
            reason = reasons[0] if reasons else "covers only part of the linear's input"
            why.setdefault(n, f"{producer} {reason}")
            flow.refuse(m, "shares a linear with channels that cannot be scaled")
            balance.remove((n, m))


def _site(flow: Flow, producer: str, balance: list[tuple[Linear, Tensor]]) -> Site:
    free = torch.zeros(flow.channels, dtype=torch.bool)
    for _, m in balance:
        free[m] = True
    adds = tuple(a for a in flow.adds if bool(free[a[2][a[2] >= 0]].any()))
    name = f"{producer} -> {', '.join(l.name for l, _ in balance)}"
    return Site(name, flow.kind, flow.producer, flow.channels, tuple(balance), adds, free, f"folded into {flow.kind}")


def producer_name(node: fx.Node, kind: str, linears: dict[str, Linear], const: set[fx.Node]) -> str:
    """The parameter that absorbs 1/s; the node's own name where there is none yet (a norm without a weight)."""
    if kind == "linear":
        return linears[node.name].name
    at = vector_operand(node, const) if kind == "scale" else 2
    vector = node.args[at] if at is not None and len(node.args) > at else None
    return (first_leaf(vector) if isinstance(vector, fx.Node) else None) or node.name


def _blocked(nodes: dict[str, fx.Node], linear: Linear, stops: dict[str, str]) -> str:
    """Why no producer's labels reach a linear: what happened to them there, or at the operation its input comes from."""
    if linear.node in stops:
        return f"a channel {stops[linear.node]}"
    node = behind(nodes[linear.x], LAYOUT | HOMOGENEOUS)
    if node.op == "placeholder":
        return "reads an input of the model"
    if node.name in stops:
        return f"its input {stops[node.name]}"
    return f"its input {describe(node)}"
