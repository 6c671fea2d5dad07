"""condense: the graph of a stage as a person would sketch it.

Before:  %mul_4 = aten.mul(%model.layers.0.input_layernorm.weight, %mul_3)
         %linear = aten.linear(%mul_4, %model.layers.0.self_attn.q_proj.weight) ... reshape, transpose, rotary, ...
After:   input_layernorm -> q_proj -> attention

A node is drawn if it is an input, a norm, a linear or another matrix product, an activation, a quantization, or joins
two drawn nodes (a residual addition, a gate). All else becomes edges. Masks and positions are not followed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
from torch import Tensor, fx

from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import LINEARS, Linear, aten, constants, first_leaf, value
from sqcompile.passes.ir.text import show
from sqcompile.passes.labels.interpreter import vector_operand
from sqcompile.plan.names import Names

_PRODUCTS = ("mm", "matmul", "linear", "einsum", "conv")
_NORMS = {"layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm"}
_ACTIVATIONS = {
    "gelu", "silu", "relu", "relu6", "leaky_relu", "tanh", "sigmoid", "softmax", "softplus", "elu", "mish", "hardtanh",
    "hardswish", "hardsigmoid", "topk",
}  # fmt: skip
# Pieces of INT8 attention, and operators fused for GPUs: what they are drawn as, and called.
_PIECES = {
    "scaled_dot_product_attention": ("product", "attention"), "attention": ("product", "attention"),
    "int8_attention": ("product", "attention"), "int8_scores": ("product", "QKᵀ"), "attend": ("product", "PV"),
    "int8_attend": ("product", "softmax, PV"), "attention_weights": ("activation", "softmax"),
    "norm_quantize": ("norm", "norm, quantize"), "act_quantize": ("activation", "activation, quantize"),
    "quantize_rows": ("quantize", "quantize"), "rotate": ("quantize", "rotate"),
    "rotate_quantize": ("quantize", "rotate, quantize"),
}  # fmt: skip
_INT8_ATTENTION = {"int8_attention", "int8_attend", "attend"}  # the last node of one
_JOINS = {"add": "+", "sub": "−", "mul": "×", "div": "÷", "cat": "concat", "where": "where"}

# How many arguments carry activations, where the others are masks, scales and weights.
_DATA_ARGS = {
    "scaled_dot_product_attention": 3, "attention": 3, "int8_attention": 5, "int8_scores": 3, "attention_weights": 1,
    "mask_scores": 1, "attend": 2, "int8_attend": 2, "norm_quantize": 1, "act_quantize": 2, "quantize_rows": 1, "rotate": 1, "rotate_quantize": 1, "linear": 1, "int8_linear": 1, "int8_linear_packed": 1, "int8_linear_s8": 1, "fp8_linear": 1,
    "quantize": 1, "dequantize": 1, "grouped_linear": 1, "grouped_dequantize": 1, "int8_grouped_linear": 1,
    "int8_grouped_linear_packed": 1,
}  # fmt: skip

# What later stages append to the name of a weight.
_STAGE_SUFFIX = re.compile(r"_(int8|fp8|packed|merged|all|columns)(_\d+)?$")


_USE = re.compile(r"_use(\d+)$")  # "weight#2" in the name of a tensor


@dataclass
class Roles:
    """What the norms, linears and attentions of a traced graph are to smoothing and quantization.

    Attributes:
        linears: by name.
        parameters: node -> parameter, for norms and linears.
        names: short names of these parameters.
        roles: linear's name, or norm's or attention's node -> "producer", "balance", "explicit", "refused", "quantized", "float".
        notes: the same -> lines to read on hover.
        producers: balance layer -> what absorbs 1/s for it.
        reasons: why no parameter can absorb 1/s, or why linears stay in float: one line per reason.
        attentions: attention's node -> which of its products are in INT8, in words; in the order of their results.
    """

    linears: dict[str, Linear]
    parameters: dict[str, str]
    names: Names
    roles: dict[str, set[str]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    producers: dict[str, str] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    attentions: dict[str, str] = field(default_factory=dict)

    def add(self, key: str, role: str, note: str) -> None:
        self.roles.setdefault(key, set()).add(role)
        self.notes.setdefault(key, []).append(note)


def parameters_of(gm: fx.GraphModule) -> dict[str, str]:
    """The parameter of each norm, by node: of its weight, or of the vector it is multiplied with."""
    const, found = constants(gm), {}
    for n in gm.graph.nodes:
        at = 2 if _operation(n) in _NORMS else vector_operand(n, const) if n.target == aten.mul.Tensor else None
        vector = n.args[at] if at is not None and len(n.args) > at else None
        leaf = first_leaf(vector) if isinstance(vector, fx.Node) else None
        if leaf:
            found[n.name] = leaf
    return found


def condense(gm: fx.GraphModule, roles: Roles) -> nx.DiGraph:
    """The drawn nodes by name, in graph order.

    Args:
        gm: any stage of the graph the roles were made of.
        roles: its roles.

    Returns:
        Nodes have ``kind`` ("input", "output", "embedding", "norm", "product", "activation", "quantize", "join"),
        ``roles`` (a set), ``label``, ``detail``, ``title`` (for hovering), ``block`` (the repeated block around it) and
        ``linears`` (their names). Edges have ``smooth``: from the producer of a site to its balance layers.
    """
    boxes = _Boxes(gm, roles)
    const, g = boxes.const, nx.DiGraph()
    data: dict[fx.Node, list[str]] = {}  # the drawn nodes that a float value comes from
    loose: dict[fx.Node, list[str]] = {}  # those that a value of any dtype comes from, as a mask does from token ids
    for n in (n for n in gm.graph.nodes if n not in const):
        if n.op != "output" and not isinstance(value(n), (Tensor, tuple, list)):
            continue  # a size
        count = _DATA_ARGS.get(_operation(n))
        read = n.all_input_nodes if count is None else [a for a in n.args[:count] if isinstance(a, fx.Node)]
        sources = [data[a] for a in read if data.get(a)]
        flat = list(dict.fromkeys(s for part in sources for s in part))
        other = list(dict.fromkeys(s for a in read for s in loose.get(a, [])))
        kind = boxes.kind(n, len({frozenset(s) for s in sources}) > 1)
        if kind is None or (kind in ("norm", "product") and not flat):  # tables of positions are made of such, too
            data[n], loose[n] = flat, other
            continue
        g.add_node(n.name, **boxes.describe(n, kind))
        g.add_edges_from(((s, n.name) for s in flat or other), smooth=False)
        ids = kind == "input" and not value(n).dtype.is_floating_point
        data[n], loose[n] = [] if ids else [n.name], [n.name]
    return _finish(g, roles)


class _Boxes:
    """What each node of a graph is drawn as."""

    def __init__(self, gm: fx.GraphModule, roles: Roles) -> None:
        self.roles, self.const = roles, constants(gm)
        self.vectors = parameters_of(gm)
        self.lines = {line[1:].partition(":")[0]: line for line in show(gm).splitlines()}
        self.uses: dict[str, int] = {}
        self.aliases = about(gm).aliases
        self.attentions = iter(roles.attentions)

    def kind(self, n: fx.Node, joins: bool) -> str | None:
        """None where a node is contracted. ``joins``: its operands come from different drawn nodes."""
        name = _operation(n)
        if n.op in ("placeholder", "output"):
            return "input" if n.op == "placeholder" else "output"
        if name in _NORMS or n.name in self.vectors:
            return "norm"
        if name in _PIECES:
            return _PIECES[name][0]
        if any(part in name for part in _PRODUCTS):
            return "product"
        if name in _ACTIVATIONS:
            return "activation"
        if name in ("embedding", "quantize"):
            return name
        return "join" if joins and name in _JOINS else None

    def describe(self, n: fx.Node, kind: str) -> dict[str, Any]:
        """The attributes of a drawn node."""
        roles, parameter = self.roles, self.roles.parameters.get(n.name)
        linears = self._linears(n) if kind == "product" else []
        owners = linears or ([parameter] if parameter else [])
        # a later stage has a node of its own for an attention of the traced graph
        own = next(self.attentions, n.name) if _operation(n) in _INT8_ATTENTION else n.name
        keys, block = linears or [own], roles.names.block(owners)
        label, detail = self._label(n, kind, block), roles.attentions.get(own, "")
        if linears:
            of = [roles.linears[name] for name in linears]
            label = ", ".join(roles.names.short(name, block) for name in linears)
            detail = f"{of[0].in_features} → {' + '.join(str(l.out_features) for l in of)}"
        notes = [note for key in keys for note in roles.notes.get(key, [])]
        title = "\n".join(dict.fromkeys(t for t in [*owners, *notes, self.lines.get(n.name, "")] if t))
        found = {role for key in keys for role in roles.roles.get(key, ())}
        found |= {"quantized"} if _operation(n) == "int8_scores" else set()
        outer = _outer(block) if owners else None  # None: that of the nodes before it
        return {
            "kind": kind, "roles": found, "label": label, "detail": detail, "title": title, "block": outer,
            "linears": tuple(linears),
        }  # fmt: skip

    def _label(self, n: fx.Node, kind: str, block: str) -> str:
        operation = _operation(n)
        if kind in ("input", "output"):
            return n.name if kind == "input" else "output"
        if kind == "norm" and operation not in _PIECES:
            parameter = self.roles.parameters.get(n.name, self.vectors.get(n.name, n.name))
            return "× 1/s" if parameter.startswith("smooth_") else self.roles.names.producer(parameter, block)
        if kind == "embedding" and isinstance(table := n.args[0], fx.Node):
            leaf = first_leaf(table) or "embedding"
            names = [x for x in self.aliases.get(leaf, ()) if x not in self.roles.linears]  # not that of a tied head
            return (names or [leaf])[0].removesuffix(".weight").rpartition(".")[2]
        return _PIECES[operation][1] if operation in _PIECES else _JOINS.get(operation, operation)

    def _linears(self, n: fx.Node) -> list[str]:
        """The linears a product computes: one, or those that `lower` merged, which read one input."""
        if n.name in self.roles.parameters:
            return [self.roles.parameters[n.name]]
        leaves = [first_leaf(a) or "" for a in n.all_input_nodes if a in self.const]
        names = [_USE.sub(r"#\1", _STAGE_SUFFIX.sub("", leaf)) for leaf in leaves]
        base = next((name for name in names if name in self.roles.linears), None)
        if base is None:
            return []
        self.uses[base] = uses = self.uses.get(base, 0) + 1
        first = self.roles.linears[base]
        if n.target in LINEARS:  # a float linear reads the parameter itself, whichever use it is
            first = self.roles.linears.get(f"{base}#{uses}", first)
        group = [l for l in self.roles.linears.values() if l.x == first.x and "quantized" in self.roles.roles[l.name]]
        whole = sum(l.out_features for l in group) == value(n).shape[-1]
        return [l.name for l in group] if whole else [first.name]


def _finish(g: nx.DiGraph, roles: Roles) -> nx.DiGraph:
    """Removes what no output reads, gives unnamed nodes the block of what they read, and marks the sites' edges."""
    outputs = [n for n, kind in g.nodes(data="kind") if kind == "output"]
    read = set(outputs).union(*(nx.ancestors(g, n) for n in outputs))
    g.remove_nodes_from(
        [n for n, d in g.nodes(data=True) if n not in read and d["kind"] != "input" and not d["linears"]]
    )
    place = {n: i for i, n in enumerate(g)}
    for n, data in g.nodes(data=True):
        if data["kind"] == "input" and not g.succ[n]:
            data["title"] += "\nread by masks and positions alone, which are not drawn"
        if data["block"] is None:
            inner = data["kind"] not in ("input", "output", "embedding") and g.pred[n]
            data["block"] = g.nodes[max(g.pred[n], key=place.__getitem__)]["block"] if inner else ""
    for u, v, data in g.edges(data=True):
        absorbing = {roles.producers.get(name) for name in g.nodes[v]["linears"]}
        data["smooth"] = not absorbing.isdisjoint({u, *g.nodes[u]["linears"]})
    return g


def _outer(block: str) -> str:
    """The outermost repeated block: "encoder.block.0.layer.1" -> "encoder.block.0"."""
    parts = block.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[: index + 1])


def _operation(n: fx.Node) -> str:
    packet = getattr(n.target, "overloadpacket", None)
    return str(getattr(packet or n.target, "__name__", n.target))
