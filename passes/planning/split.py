"""split: sites of a plan whose producer and linears are in different graphs. Analysis only.

    %q = linear(%n, %wq)                            # %n = layer_norm(%x, [64], %g) is in another graph
->
    input n -> wq: %n * 1/s, its producer is in another graph

A KV cache cuts v_proj -> o_proj the same way: o_proj reads what earlier calls have stored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import torch
from torch import Tensor

from sqcompile.errors import PlanError
from sqcompile.passes.ir.graph import Linear
from sqcompile.passes.labels.match import Site
from sqcompile.plan.plan import Plan


def split_sites(linears: list[Linear], sites: list[Site], plan: Plan) -> tuple[list[Site], Plan]:
    """The plan's sites as this graph has them.

    Args:
        linears: of the graph.
        sites: what can be scaled in it (`match`, and `input_sites` of the refusals).
        plan: of the whole model.

    Returns:
        The sites that are whole in this graph, and one of kind "input" for each tensor that linears of another site
        read; and the plan with the scales of these alone.

    Raises:
        PlanError: if the plan does not say how the linears of a site that is not whole are scaled.
    """
    whole = [
        s
        for s in sites
        if s.name in plan.scales and s.channels == len(plan.scales[s.name]) and s.allows(plan.scales[s.name])
    ]
    scales = {s.name: plan.scales[s.name] for s in whole}
    done = {l.name for s in whole for l, _ in s.balance}
    quantized = {l.name: l for l in plan.layers if l.quantized and l.smoothing != "none"}
    groups: dict[str, list[Linear]] = {}
    for l in linears:
        if l.name in quantized and l.name not in done:
            if l.name not in plan.columns:
                raise PlanError(f"the plan does not say how {l.name} is scaled apart from its site: calibrate again")
            groups.setdefault(l.x, []).append(l)
    for x, group in groups.items():
        for i, (s, same) in enumerate(_by_scale(group, plan.columns)):
            name = f"input {x}{f'#{i + 1}' if i else ''} -> " + ", ".join(l.name for l in same)
            k = len(s)
            balance = tuple((l, torch.arange(k)) for l in same)
            free = torch.ones(k, dtype=torch.bool)
            whole.append(Site(name, "input", x, k, balance, (), free, "its producer is in another graph"))
            scales[name] = s
    return whole, dataclasses.replace(plan, scales=scales)


def split_attention(found: Collection[str], plan: Plan) -> Plan:
    """The plan with the attentions of one graph, smoothed explicitly: a KV cache holds keys that others have put there.

    Args:
        found: names of the graph's attentions.
        plan: of the whole model.

    Raises:
        PlanError: if the plan does not say how a smoothed attention is scaled apart from its projections.
    """
    attention = []
    for a in plan.attention:
        if a.name not in found:
            a = dataclasses.replace(a, quantized="none")
        elif a.smoothing == "folded":
            if f"{a.name}/query_by" not in plan.heads:
                raise PlanError(
                    f"the plan does not say how {a.name} is scaled apart from its projections: calibrate again"
                )
            a = dataclasses.replace(a, smoothing="multiplied")
        attention.append(a)
    # V is not divided by the scale of v_proj -> o_proj, which its static Δ counts on: its Δ is dynamic here
    heads = {name: t for name, t in plan.heads.items() if name.rpartition("/")[2] not in ("scale", "value_scale")}
    return dataclasses.replace(plan, attention=tuple(attention), heads=heads)


def _by_scale(linears: list[Linear], columns: dict[str, Tensor]) -> list[tuple[Tensor, list[Linear]]]:
    """Linears that read one tensor by the scale they need: one scale, unless their sites differ."""
    found: list[tuple[Tensor, list[Linear]]] = []
    for l in linears:
        s = columns[l.name]
        for other, same in found:
            if torch.equal(other, s):
                same.append(l)
                break
        else:
            found.append((s, [l]))
    return found
