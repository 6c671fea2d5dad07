"""condense: the graph of a stage as a person would sketch it.

Before:  %mul_4 = aten.mul(%model.layers.0.input_layernorm.weight, %mul_3)
         %linear = aten.linear(%mul_4, %model.layers.0.self_attn.q_proj.weight) ... reshape, transpose, rotary, ...
After:   input_layernorm -> q_proj -> attention

A node is drawn if it is an input, a norm, a linear or another matrix product, an activation, a quantization, or joins
two drawn nodes (a residual addition, a gate). All else becomes edges. Masks and positions are not followed.
"""

from __future__ import annotations

import re
from typing import Any

import networkx as nx
from torch import Tensor, fx

from sqcompile.draw.roles import NORMS, Roles, operation, parameters_of
from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import LINEARS, constants, first_leaf, value
from sqcompile.passes.ir.text import show

_PRODUCTS = ("mm", "matmul", "linear", "einsum", "conv")
_ACTIVATIONS = {
    "gelu", "silu", "relu", "relu6", "leaky_relu", "tanh", "sigmoid", "softmax", "softplus", "elu", "mish", "hardtanh",
    "hardswish", "hardsigmoid", "topk",
}  # fmt: skip
# Pieces of INT8 attention, and operators that several have become: what they are drawn as, and called.
_PIECES = {
    "scaled_dot_product_attention": ("product", "attention"), "attention": ("product", "attention"),
    "int8_attention": ("product", "attention"), "int8_scores": ("product", "QKᵀ"), "attend": ("product", "PV"),
    "int8_attend": ("product", "softmax, PV"), "attention_weights": ("activation", "softmax"),
    "norm_quantize": ("norm", "norm, quantize"), "act_quantize": ("activation", "activation, quantize"),
    "quantize_rows": ("quantize", "quantize"), "rotate": ("quantize", "rotate"),
    "rotate_quantize": ("quantize", "rotate, quantize"),
    "linear_norm_quantize": ("norm", "norm, quantize"), "linear_act_quantize": ("activation", "activation, quantize"),
}  # fmt: skip
_ATTENTIONS = {"scaled_dot_product_attention", "attention", "int8_attention", "int8_scores", "attend", "int8_attend"}
_INT8_ATTENTION = {"int8_attention", "int8_attend", "attend"}  # the last node of one
_JOINS = {"add": "+", "sub": "−", "mul": "×", "div": "÷", "cat": "concat", "where": "where"}

# How many arguments carry activations, or which ones, where the others are masks, scales and weights.
_DATA_ARGS: dict[str, int | tuple[int, ...]] = {
    "scaled_dot_product_attention": 3, "attention": 3, "int8_attention": 5, "int8_scores": 3, "attention_weights": 1,
    "mask_scores": 1, "attend": 2, "int8_attend": 2, "norm_quantize": 1, "act_quantize": 2, "quantize_rows": 1, "rotate": 1, "rotate_quantize": 1, "linear": 1, "int8_linear": 1, "int8_linear_packed": 1, "int8_linear_s8": 1, "fp8_linear": 1,
    "quantize": 1, "dequantize": 1, "grouped_linear": 1, "grouped_dequantize": 1, "int8_grouped_linear": 1,
    "int8_grouped_linear_packed": 1, "matmul_u8s8": 1, "linear_act_quantize": 1, "linear_norm_quantize": (0, 3),
}  # fmt: skip

# What later stages append to the name of a weight.
_STAGE_SUFFIX = re.compile(r"_(int8|fp8|packed|merged|all|columns)(_\d+)?$")


_USE = re.compile(r"_use(\d+)$")  # "weight#2" in the name of a tensor


def condense(gm: fx.GraphModule, roles: Roles) -> nx.DiGraph:
    """The drawn nodes by name, in graph order.

    Args:
        gm: any stage of the graph the roles were made of.
        roles: its roles.

    Returns:
        Nodes have

        - ``kind``: "input", "output", "embedding", "norm", "product", "activation", "quantize" or "join";
        - ``label`` and ``detail``, two lines of text, ``roles``, a set, and ``format``, what quantized linears run in;
        - ``linears``, their names, and ``keys``: names that are those of the same things in other stages;
        - ``blocks``, the repeated blocks around it, the outermost first, and ``block``, that one;
        - ``facts``, what there is to read, as (term, text), ``sqnr`` in dB or None, and ``lines``, the text of the operations
          that it stands for.

        Edges have ``smooth``: from the producer of a site to its balance layers.
    """
    boxes = _Boxes(gm, roles)
    const, g = boxes.const, nx.DiGraph()
    data: dict[fx.Node, list[str]] = {}  # the drawn nodes that a float value comes from
    loose: dict[fx.Node, list[str]] = {}  # those that a value of any dtype comes from, as a mask does from token ids
    for n in (n for n in gm.graph.nodes if n not in const):
        if n.op != "output" and not isinstance(value(n), (Tensor, tuple, list)):
            continue  # a size
        read = _data_of(n)
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
    g = _finish(g, roles)
    boxes.tell(g)
    return g


def _data_of(n: fx.Node) -> list[fx.Node]:
    """What carries activations into a node."""
    which = _DATA_ARGS.get(operation(n))
    if which is None:
        return n.all_input_nodes
    args = n.args[:which] if isinstance(which, int) else [n.args[i] for i in which]
    return [a for a in args if isinstance(a, fx.Node)]


def _piece(n: fx.Node) -> tuple[str, str] | None:
    """What an operator of `_PIECES` is drawn as, and called."""
    if operation(n) == "linear_act_quantize" and "none" in n.args:
        return _PIECES["rotate_quantize" if n.args[8] else "quantize_rows"]
    return _PIECES.get(operation(n))


class _Boxes:
    """What each node of a graph is drawn as."""

    def __init__(self, gm: fx.GraphModule, roles: Roles) -> None:
        self.roles, self.const = roles, constants(gm)
        self.vectors = parameters_of(gm)
        self.gm = gm
        self.uses: dict[str, int] = {}
        self.aliases = about(gm).aliases
        self.attentions, self.scores = iter(roles.attentions), iter(roles.attentions)

    def kind(self, n: fx.Node, joins: bool) -> str | None:
        """None where a node is contracted. ``joins``: its operands come from different drawn nodes."""
        name = operation(n)
        if n.op in ("placeholder", "output"):
            return "input" if n.op == "placeholder" else "output"
        if name in NORMS or n.name in self.vectors:
            return "norm"
        if (piece := _piece(n)) is not None:
            return piece[0]
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
        own = self._attention(n)
        keys, block = linears or [own], roles.names.block(owners)
        label, detail = self._label(n, kind, block), roles.attentions.get(own, "")
        if linears:
            of = [roles.linears[name] for name in linears]
            label = ", ".join(roles.names.short(name, block) for name in linears)
            detail = f"{of[0].in_features} → {' + '.join(str(l.out_features) for l in of)}"
        found = {role for key in keys for role in roles.roles.get(key, ())}
        found |= {"attention"} if operation(n) in _ATTENTIONS else set()
        blocks = _nested(block) if owners else None  # None: those of the nodes before it
        return {
            "kind": kind, "format": self.roles.format, "roles": found, "label": label, "detail": detail, "blocks": blocks, "linears": tuple(linears),
            "keys": tuple(owners) or ((f"{roles.owners[own]} {label}",) if own in roles.owners else ()),
            "facts": self._facts(keys, block),
            "sqnr": min((roles.sqnr[k] for k in keys if k in roles.sqnr), default=None), "lines": [],
        }  # fmt: skip

    def _facts(self, keys: list[str], block: str) -> list[tuple[str, str]]:
        """What there is to read of some linears: what all of them share, then what is each one's own."""
        facts = {key: self.roles.facts.get(key, []) for key in keys}
        shared = [fact for fact in facts[keys[0]] if all(fact in own for own in facts.values())]
        own = [(k, term, text) for k in keys for term, text in facts[k] if (term, text) not in shared]
        return shared + [(f"{self.roles.names.short(k, block)}: {term}", text) for k, term, text in own]

    def _attention(self, n: fx.Node) -> str:
        """The node of the traced graph whose attention this is; a later stage has nodes of its own for it."""
        if operation(n) in _INT8_ATTENTION:
            return next(self.attentions, n.name)
        return next(self.scores, n.name) if operation(n) == "int8_scores" else n.name

    def tell(self, g: nx.DiGraph) -> None:
        """Gives each line of the graph's text to the box that it is part of: the first that reads its value."""
        lines = {line[1:].partition(":")[0]: line for line in show(self.gm).splitlines()}
        owner: dict[fx.Node, str] = {}
        place = {name: i for i, name in enumerate(g)}
        for n in reversed(self.gm.graph.nodes):
            readers = [owner[user] for user in n.users if user in owner]
            if n.name in place:
                owner[n] = n.name
            elif readers:
                owner[n] = min(readers, key=place.__getitem__)
        for n in self.gm.graph.nodes:
            if n in owner and n.op != "get_attr":
                g.nodes[owner[n]]["lines"].append(lines.get(n.name, "") or f"%{n.name}")
        for _, data in g.nodes(data=True):
            if data["kind"] == "output":
                data["lines"][-1:] = [line for line in lines.values() if line.startswith("return ")]

    def _label(self, n: fx.Node, kind: str, block: str) -> str:
        of = operation(n)
        if kind in ("input", "output"):
            return n.name if kind == "input" else "output"
        if kind == "norm" and of not in _PIECES:
            parameter = self.roles.parameters.get(n.name, self.vectors.get(n.name, n.name))
            return "× 1/s" if parameter.startswith("smooth_") else self.roles.names.producer(parameter, block)
        if kind == "embedding" and isinstance(table := n.args[0], fx.Node):
            leaf = first_leaf(table) or "embedding"
            names = [x for x in self.aliases.get(leaf, ()) if x not in self.roles.linears]  # not that of a tied head
            return (names or [leaf])[0].removesuffix(".weight").rpartition(".")[2]
        piece = _piece(n)
        return _JOINS.get(of, of) if piece is None else piece[1]

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
    for n in reversed(list(g)):  # what prepares the input of linears belongs to them
        data, readers = g.nodes[n], {g.nodes[s]["blocks"] for s in g.succ[n]}
        if (data["kind"] == "quantize" or data["label"] == "× 1/s") and len(readers) == 1:
            data["blocks"] = data["blocks"] or readers.pop()
    for n, data in g.nodes(data=True):
        if data["kind"] == "input" and not g.succ[n]:
            data["facts"].append(("read by", "masks and positions alone, which are not drawn"))
        if data["blocks"] is None:
            inner = data["kind"] not in ("input", "output", "embedding") and g.pred[n]
            data["blocks"] = g.nodes[max(g.pred[n], key=place.__getitem__)]["blocks"] if inner else ()
        data["block"] = (*data["blocks"], "")[0]
    for u, v, data in g.edges(data=True):
        absorbing = {roles.producers.get(name) for name in g.nodes[v]["linears"]}
        data["smooth"] = not absorbing.isdisjoint({u, *g.nodes[u]["linears"]})
    return g


def _nested(block: str) -> tuple[str, ...]:
    """ "encoder.block.0.layer.1" -> "encoder.block.0" and "encoder.block.0.layer.1"."""
    parts = block.split(".")
    return tuple(".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit())
