"""roles: what the norms, linears and attentions of a traced graph are to smoothing and quantization, in words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx

from sqcompile.passes.attention.chains import find_attentions
from sqcompile.passes.ir.graph import Linear, aten, constants, find_linears, first_leaf, nodes_by_name
from sqcompile.passes.labels.interpreter import vector_operand
from sqcompile.passes.labels.match import match
from sqcompile.plan.entries import AttentionPlan, LayerPlan
from sqcompile.plan.names import PRODUCTS, Names, refusal_lines
from sqcompile.plan.plan import Plan
from sqcompile.plan.said import decibels

NORMS = {"layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm"}
_FORMATS = {"int8": "INT8", "fp8": "FP8"}
_NUMBER = re.compile(r"\d+")
_SCALED = {
    "per_token": "per token", "per_head": "per head", "per_tensor": "per tensor", "per_tensor_static": "static",
    "per_channel": "per output channel",
}  # fmt: skip


@dataclass(frozen=True)
class Reason:
    """Why some linears have no parameter that absorbs 1/s, or stay in float, and what is done with them.

    Attributes:
        done: what is done with them, "run in INT8 without smoothing", and the like; several reasons may have one.
        lines: which linears, and why; those of repeated blocks in one line.
        linears: their names.
    """

    done: str
    lines: tuple[str, ...]
    linears: tuple[str, ...]


def by_done(reasons: Sequence[Reason]) -> dict[str, list[Reason]]:
    """Reasons by what is done, with how often: "7 linears run in INT8 without smoothing"."""
    groups: dict[str, list[Reason]] = {}
    for reason in reasons:
        groups.setdefault(reason.done, []).append(reason)
    counts = {done: sum(len(r.linears) for r in found) for done, found in groups.items()}
    return {
        f"{n} linear {done.replace('run ', 'runs ').replace('stay ', 'stays ')}"
        if n == 1
        else f"{n} linears {done}": groups[done]
        for done, n in counts.items()
    }


@dataclass
class Roles:
    """The roles of a traced graph's norms, linears and attentions.

    A key below is a linear's name, or the node of a norm or an attention.

    Attributes:
        linears: by name.
        parameters: node -> parameter, for norms and linears.
        names: short names of these parameters.
        roles: key -> "producer", "balance", "explicit", "refused", "quantized", "float", "attention".
        facts: key -> what there is to read, as (term, text).
        sqnr: key -> signal to quantization noise ratio on the calibration sample, in dB.
        producers: balance layer -> what absorbs 1/s for it.
        reasons: why no parameter can absorb 1/s, or why linears stay in float.
        attentions: attention's node -> which of its products are in INT8, in words; in the order of their results.
        owners: attention's node -> its name.
        format: what quantized linears run in, "INT8".
    """

    linears: dict[str, Linear]
    parameters: dict[str, str]
    names: Names
    roles: dict[str, set[str]] = field(default_factory=dict)
    facts: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    sqnr: dict[str, float] = field(default_factory=dict)
    producers: dict[str, str] = field(default_factory=dict)
    reasons: list[Reason] = field(default_factory=list)
    attentions: dict[str, str] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)
    format: str = "INT8"

    def add(self, key: str, role: str, *facts: tuple[str, str]) -> None:
        self.roles.setdefault(key, set()).add(role)
        self.facts.setdefault(key, []).extend(facts)


def parameters_of(gm: fx.GraphModule) -> dict[str, str]:
    """The parameter of each norm, by node: of its weight, or of the vector it is multiplied with."""
    const, found = constants(gm), {}
    for n in gm.graph.nodes:
        at = 2 if operation(n) in NORMS else vector_operand(n, const) if n.target == aten.mul.Tensor else None
        vector = n.args[at] if at is not None and len(n.args) > at else None
        leaf = first_leaf(vector) if isinstance(vector, fx.Node) else None
        if leaf:
            found[n.name] = leaf
    return found


def operation(n: fx.Node) -> str:
    """The name of what a node computes, without its overload: "linear"."""
    packet = getattr(n.target, "overloadpacket", None)
    return str(getattr(packet or n.target, "__name__", n.target))


def roles_of(traced: fx.GraphModule, plan: Plan | None = None) -> Roles:
    """The roles that `match`, and a plan if there is one, give to a traced graph's norms, linears and attentions."""
    sites, refusals = match(traced)
    linears = find_linears(traced)
    parameters = {**parameters_of(traced), **{l.node: l.name for l in linears}}
    roles = Roles({l.name: l for l in linears}, parameters, Names(parameters.values()), format=_format(plan))
    for site in sites:
        if plan is not None and site.name not in plan.scales:
            continue
        label, own = str(roles.names.site(site.name)), parameters.get(site.producer)
        key = own if own in roles.linears else site.producer
        s = [("s", _spread(plan.scales[site.name]))] if plan is not None else []
        roles.add(key, "producer", ("absorbs 1/s of", label), *s)
        for linear, _ in site.balance:
            roles.add(linear.name, "balance", ("absorbs s of", label), *s)
            roles.producers[linear.name] = key
    refused = {r.linear.name: r.reason for r in refusals}
    for name, reason in refused.items():
        roles.add(name, "refused", ("no parameter can absorb 1/s", reason))
    if plan is not None:
        for layer in plan.layers:
            _add_layer(roles, layer, plan)
    roles.reasons = _reasons(roles, refused, plan)
    _add_attentions(roles, traced, plan)
    return roles


def _add_attentions(roles: Roles, traced: fx.GraphModule, plan: Plan | None) -> None:
    plans = {a.name: a for a in plan.attention} if plan is not None else {}
    order = {n: i for i, n in enumerate(nodes_by_name(traced))}
    for a in sorted(find_attentions(traced), key=lambda a: order[a.output or a.softmax]):
        how, result = plans.get(a.name), a.output or a.softmax
        facts = _of_attention(how) if how is not None else []
        for node in dict.fromkeys((a.product, result)):
            roles.add(node, "attention", ("attention of", a.name), *facts)
            roles.owners[node] = a.name
            if how is not None:
                roles.roles[node].add("float" if how.quantized == "none" else "quantized")
            if how is not None and how.sqnr_db is not None:
                roles.sqnr[node] = how.sqnr_db
        if how is not None and how.quantized != "none":
            roles.attentions[result] = PRODUCTS[how.quantized]


def _of_attention(how: AttentionPlan) -> list[tuple[str, str]]:
    facts = [("runs in", PRODUCTS[how.quantized].replace("int8", "INT8"))]
    if how.quantized != "none":
        facts += [("smoothing", _smoothing(how))]
        facts += (
            [("Δ of Q and K", f"static, {how.q_scale:.4g} and {how.k_scale:.4g}")]
            if how.q_scale and how.k_scale
            else []
        )
    facts += [("SQNR of the scores", decibels(how.sqnr_db))] if how.sqnr_db is not None else []
    return [*facts, *([("because", how.reason)] if how.reason else [])]


def _add_layer(roles: Roles, layer: LayerPlan, plan: Plan) -> None:
    facts = [("runs in", _format(plan) if layer.quantized else "float")]
    if layer.quantized:
        facts.append(("smoothing", _smoothing(layer)))
        if layer.rotation:
            facts.append(("rotation", f"in blocks of {layer.rotation} channels"))
        activation = layer.activation or plan.recipe.activation
        static = f"static, {layer.input_scale:.4g}" if layer.input_scale is not None else _SCALED[activation]
        facts += [("Δ of the input", static), ("Δ of the weight", _SCALED[layer.weight or plan.recipe.weight])]
    if layer.sqnr_db is not None:
        roles.sqnr[layer.name] = layer.sqnr_db
        facts.append(("SQNR", decibels(layer.sqnr_db)))
    if layer.loss is not None:
        facts.append(("costs the outputs", f"{layer.loss:.2g}"))
    if layer.reason:
        facts.append(("because", layer.reason))
    roles.add(layer.name, "quantized" if layer.quantized else "float", *facts)
    if layer.quantized and layer.smoothing == "multiplied":
        roles.add(layer.name, "explicit", ("instead", "x·(1/s) is multiplied before quantization"))


def _smoothing(x: LayerPlan | AttentionPlan) -> str:
    how = {"folded": "1/s is folded into a parameter", "multiplied": "x·(1/s) is multiplied", "none": "none"}[
        x.smoothing
    ]
    return f"{how}, α {x.alpha:.2f}" if x.alpha is not None else how


def _spread(s: Tensor) -> str:
    values = s.detach().float().cpu().reshape(-1)
    if not values.numel():
        return "no channels"
    low, middle, high = (float(x) for x in (values.min(), values.median(), values.max()))
    return f"{values.numel()} channels, {low:.3g} to {high:.3g}, median {middle:.3g}"


def _format(plan: Plan | None) -> str:
    return _FORMATS.get(plan.recipe.dtype, plan.recipe.dtype) if plan is not None else "INT8"


def _reasons(roles: Roles, refused: dict[str, str], plan: Plan | None) -> list[Reason]:
    layers = {layer.name: layer for layer in plan.layers} if plan is not None else {}
    groups: dict[tuple[str, str], dict[str, str]] = {}
    for name in roles.linears:
        layer = layers.get(name)
        if layer is not None and not layer.quantized:
            done, why = "stay in float", layer.reason
        elif name in refused:
            done, why = _done(layer).replace("INT8", _format(plan)), refused[name]
        else:
            continue
        groups.setdefault((done, _NUMBER.sub("#", why)), {})[name] = why
    return [
        Reason(done, tuple(refusal_lines(found.items(), roles.linears)), tuple(found))
        for (done, _), found in groups.items()
    ]


def _done(layer: LayerPlan | None) -> str:
    if layer is None:
        return "whose x·(1/s) is multiplied before quantization, since no parameter can absorb 1/s"
    how = "with x·(1/s) multiplied before quantization" if layer.smoothing == "multiplied" else "without smoothing"
    return f"run in INT8 {how}, since no parameter can absorb 1/s"
