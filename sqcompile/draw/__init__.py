"""draw: a stage as a picture, coloured by what smoothing and quantization do with each norm and linear."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import networkx as nx
from torch import fx

from sqcompile.draw.condense import Roles, condense, parameters_of
from sqcompile.draw.svg import page, render
from sqcompile.errors import DrawError
from sqcompile.passes.attention.chains import find_attentions
from sqcompile.passes.ir.graph import find_linears, nodes_by_name
from sqcompile.passes.labels.match import match
from sqcompile.plan.entries import AttentionPlan, LayerPlan
from sqcompile.plan.names import PRODUCTS, Names, collapse, refusal_lines
from sqcompile.plan.plan import Plan

# Runs of equal blocks this long are drawn as one block and "... more like it".
_LONG_RUN = 4


def draw(
    path: str | os.PathLike[str],
    traced: fx.GraphModule,
    plan: Plan | None = None,
    stage: fx.GraphModule | None = None,
    full: bool = False,
) -> None:
    """Writes a drawing: .svg, or .html that pans, zooms and explains what the pointer is on.

    Args:
        path: where to.
        traced: a traced graph.
        plan: what was decided; without one, the sites and refusals of `match` are shown.
        stage: a later stage of the same graph to draw instead.
        full: draws every block; otherwise of four and more equal blocks in a row, one.

    Raises:
        DrawError: for another suffix, or a path that cannot be written.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".svg", ".html"):
        raise DrawError(f"cannot draw to {os.fspath(path)!r}: name a file that ends in .svg or .html")
    roles = roles_of(traced, plan)
    graph = condense(traced if stage is None else stage, roles)
    text = render(graph if full else fold_repeats(graph), roles.reasons)
    try:
        Path(path).write_text(page(text, Path(path).stem) if suffix == ".html" else text, encoding="utf-8")
    except OSError as e:
        raise DrawError(f"cannot write {os.fspath(path)} ({e.strerror}): name a file in a folder you can write") from e


def roles_of(traced: fx.GraphModule, plan: Plan | None = None) -> Roles:
    """The roles that `match`, and a plan if there is one, give to a traced graph's norms and linears."""
    sites, refusals = match(traced)
    linears = find_linears(traced)
    parameters = {**parameters_of(traced), **{l.node: l.name for l in linears}}
    roles = Roles({l.name: l for l in linears}, parameters, Names(parameters.values()))
    for site in sites:
        if plan is not None and site.name not in plan.scales:
            continue
        label, own = str(roles.names.site(site.name)), parameters.get(site.producer)
        key = own if own in roles.linears else site.producer
        roles.add(key, "producer", f"absorbs 1/s of  {label}")
        for linear, _ in site.balance:
            roles.add(linear.name, "balance", f"absorbs s of  {label}")
            roles.producers[linear.name] = key
    for refusal in refusals:
        roles.add(refusal.linear.name, "refused", f"no parameter can absorb 1/s: {refusal.reason}")
    reasons = {r.linear.name: r.reason for r in refusals}
    dtype = plan.recipe.dtype if plan is not None else ""
    for layer in plan.layers if plan is not None else ():
        _add_layer(roles, layer, dtype)
        if not layer.quantized:
            reasons[layer.name] = f"stays in float: {layer.reason}"
    roles.reasons = refusal_lines(reasons.items(), roles.linears)
    if plan is not None and plan.attention:
        _add_attentions(roles, traced, plan)
    return roles


def _add_attentions(roles: Roles, traced: fx.GraphModule, plan: Plan) -> None:
    plans, order = {a.name: a for a in plan.attention}, {n: i for i, n in enumerate(nodes_by_name(traced))}
    for a in sorted(find_attentions(traced), key=lambda a: order[a.output or a.softmax]):
        how = plans.get(a.name)
        if how is None:
            continue
        result, words = a.output or a.softmax, PRODUCTS[how.quantized]
        role = "float" if how.quantized == "none" else "quantized"
        for node in dict.fromkeys((a.product, result)):
            roles.add(node, role, f"{a.name}: {', '.join([words, *_numbers(how), how.reason])}")
        if role == "quantized":
            roles.attentions[result] = words


def _add_layer(roles: Roles, layer: LayerPlan, dtype: str) -> None:
    kind = dtype if layer.quantized else "float"
    turn = [f"rotated in blocks of {layer.rotation}"] if layer.rotation else []
    note = ", ".join([kind, *turn, *_numbers(layer), layer.reason])
    roles.add(layer.name, "quantized" if layer.quantized else "float", note)
    if layer.smoothing == "multiplied":
        roles.add(layer.name, "explicit", "its input is multiplied by 1/s right before quantization")


def _numbers(x: LayerPlan | AttentionPlan) -> list[str]:
    numbers = [f"α {x.alpha:.2f}"] if x.alpha is not None else []
    return numbers + ([f"{x.sqnr_db:.1f} dB"] if x.sqnr_db is not None else [])


def fold_repeats(g: nx.DiGraph) -> nx.DiGraph:
    """Draws runs of blocks that look alike as the first one, and a box for the others.

    Blocks look alike if they have the same boxes in the same order and roles; what the others have in numbers (α, dB)
    stands in the report.
    """
    blocks: dict[str, list[str]] = {}
    for n, data in g.nodes(data=True):
        if data["block"]:
            blocks.setdefault(data["block"], []).append(n)
    looks = {b: (b.rpartition(".")[0], [_look(g.nodes[n]) for n in nodes]) for b, nodes in blocks.items()}
    runs: list[list[str]] = []
    for b in blocks:
        if runs and looks[runs[-1][0]] == looks[b]:
            runs[-1].append(b)
        else:
            runs.append([b])
    for _, *rest in runs:
        if len(rest) + 1 >= _LONG_RUN:
            contracted = _contract(g, rest, {n for b in rest for n in blocks[b]})
            g = contracted if nx.is_directed_acyclic_graph(contracted) else g
    return g


def _look(data: dict[str, Any]) -> tuple[Any, ...]:
    return data["kind"], data["label"], data["detail"], frozenset(data["roles"])


def _contract(g: nx.DiGraph, blocks: list[str], members: set[str]) -> nx.DiGraph:
    name = collapse(blocks)[0]
    title = "\n".join([f"{len(blocks)} blocks like the one before", name])
    box = dict(
        kind="repeat", label=f"{len(blocks)} more like it", detail=name, title=title, block="", roles=set(), linears=()
    )
    out = nx.DiGraph()
    for n, data in g.nodes(data=True):
        out.add_node(name if n in members else n, **(box if n in members else data))
    for u, v, data in g.edges(data=True):
        a, b = (name if n in members else n for n in (u, v))
        if a != b:
            out.add_edge(a, b, **({"smooth": False} if name in (a, b) else data))
    return out
