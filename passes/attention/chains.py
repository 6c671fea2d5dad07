"""find_attentions: every attention of a graph, in both spellings, by dataflow. Analysis only.

    %y = scaled_dot_product_attention(%q, %k, %v, %mask)
->
    Attention(name=y, product=y, softmax=y, output=y, q=q, k=k, v=v, heads=4, groups=4, width=8,
        scores=Scores(scale=0.353553, masks=[Mask(node=%mask)]))

    %kt = transpose(%k, -2, -1)
    %s = matmul(%q, %kt)                            # bmm, baddbmm and einsum were turned into matmul
    %a = mul(%s, 0.125)                             # scale, soft-cap, masks, biases of positions, casts, in any order
    %e = add(%d, %mask)
    %p = softmax(%e, -1)
    %y = matmul(%p, %v)
->
    Attention(name=p, product=s, softmax=p, output=y, q=q, k=k, v=v, heads=4, groups=4, width=8,
        scores=Scores(scale=0.125, softcap=50, masks=[Mask(node=%mask)]))

An attention is what reaches a softmax from a product of two tensors of data: a router or a classifier has none. One
that cannot be quantized is listed all the same, with the reason. What lies between product and softmax is left to the
graph; `read_scores` says whether it is a scale, a soft-cap and masks, which one operator can do.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from sqcompile.kernels.ops import sqcompile_ops
from sqcompile.passes.attention.heads import head_count, same_batch, unmerged, unrepeated_pair
from sqcompile.passes.attention.scores import SAME, Mask, Number, Scores, numbers, read_scores
from sqcompile.passes.ir.form import once
from sqcompile.passes.ir.graph import LINEARS, arguments, aten, constants, find_linears, nodes_by_name, value
from sqcompile.passes.ir.operators import Fact, having
from sqcompile.passes.ir.symbols import statically_known_true
from sqcompile.passes.labels.rules import OUTPUT, describe

SOFTMAX = having(Fact.SOFTMAX)
# What may stand between QKᵀ and softmax: a product of the two is still found behind it.
POINTWISE = SAME | having(Fact.SCORES)
PRODUCTS = having(Fact.PRODUCT) | {aten.einsum.default}

NOT_ATTENDING = "its weights are not multiplied with values"


@dataclass(frozen=True)
class Attention:
    """One attention of a graph, by the names of its nodes.

    Attributes:
        name: of the module that holds its projections; the key of the attention in a Plan.
        product: computes QKᵀ: a matmul, or scaled_dot_product_attention, which is ``softmax`` and ``output``, too.
        softmax: computes the weights.
        output: computes P V: [B, H, Sq, Dv], or [N, Sq, Dv].
        q: [B, H, Sq, D], or [N, Sq, D] where a graph merges batch and heads.
        k: [B, G, Sk, D] before its heads are repeated; [B, G, D, Sk] if ``transposed``; or 3-D, [B G, ., .].
        v: [B, G, Sk, Dv], or 3-D as q.
        transposed: whether k's last two dims are swapped.
        heads: H, 1 where q is 3-D.
        groups: G; query head h reads key head h // (H / G).
        width: D.
        scores: what happens between product and softmax, or, in words, what keeps it from being one operator.
        refused: why it stays in float, in words; None if it can be quantized.
    """

    name: str
    product: str
    softmax: str
    output: str = ""
    q: str = ""
    k: str = ""
    v: str = ""
    transposed: bool = False
    heads: int = 1
    groups: int = 1
    width: int = 0
    scores: Scores | str = field(default_factory=Scores)
    refused: str | None = None

    @property
    def operands(self) -> dict[str, str]:
        """The nodes of q, k and v by what they hold."""
        return {"queries": self.q, "keys": self.k, "values": self.v}


@once
def find_attentions(gm: fx.GraphModule) -> list[Attention]:
    """Every attention, in graph order; see `Attention`."""
    const = constants(gm)
    number = numbers(gm, const)
    by_node = {l.node: l.name for l in find_linears(gm)}
    found: list[Attention] = []
    for node in gm.graph.nodes:
        attention = None
        if node.target == aten.scaled_dot_product_attention.default:
            attention = _whole(node)
        elif node.target in SOFTMAX and node not in const:
            attention = _spelled_out(node, const, number)
        if attention is not None:
            found.append(attention)
    nodes, uses = nodes_by_name(gm), dict[str, int]()
    named = []
    for a in found:
        ends = (a.q, a.k, a.v) if a.q else (a.product,)
        base = _module(by_node, [nodes[n] for n in ends]) or a.softmax
        uses[base] = uses.get(base, 0) + 1
        named.append(_with(a, name=base if uses[base] == 1 else f"{base}#{uses[base]}"))
    return named


def _with(a: Attention, **changes: Any) -> Attention:
    return Attention(**{**a.__dict__, **changes})


def _whole(node: fx.Node) -> Attention:
    """scaled_dot_product_attention."""
    args = arguments(node)
    q, k, v, mask = args["query"], args["key"], args["value"], args["attn_mask"]
    scale = args["scale"]
    masks = (Mask(mask, causal=args["is_causal"]),) if mask is not None or args["is_causal"] else ()
    width = value(q).shape[-1]
    a = Attention(
        "", node.name, node.name, node.name, scores=Scores(width**-0.5 if scale is None else scale, 0.0, masks)
    )
    if args["dropout_p"]:
        return _with(a, refused="drops weights at random")
    return _operands(a, q, k, v, False)


def _spelled_out(softmax: fx.Node, const: set[fx.Node], number: Number) -> Attention | None:
    """A softmax of the product of two tensors of data; None if it is not one."""
    scores, dim = softmax.args[:2]
    assert isinstance(scores, fx.Node)
    paths = _paths(scores, const)
    if not paths:
        return _out_of_reach(softmax, const)
    product = paths[0][0]
    a = Attention("", product.name, softmax.name)
    if len(paths) > 1:
        return _with(a, refused="its scores are a sum of several products")
    if dim not in (-1, value(softmax).dim() - 1):
        return _with(a, refused="its softmax does not run over the last dim")
    for node in paths[0]:
        others = [u for u in node.users if u not in paths[0] and u is not softmax]
        if others:
            return _with(a, refused=f"its scores are read elsewhere, too: {_reader(others[0])}")
    output = _weighted(softmax)
    if isinstance(output, str):
        return _with(a, refused=output)
    q, kt = product.args[:2]
    assert isinstance(q, fx.Node) and isinstance(kt, fx.Node)
    k = _untransposed(kt)
    same = zip(value(softmax).shape[-2:], value(product).shape[-2:], strict=True)
    if not all(statically_known_true(x == y) for x, y in same):
        return _with(a, refused="its scores are regrouped before the softmax")
    v: Any = output.args[1]
    if v in const:
        return _with(a, refused="its values are constant")
    a = _operands(_with(a, output=output.name), q, k or kt, v, k is None)
    return _with(a, scores=read_scores(paths[0], a.heads, number))


def _paths(scores: fx.Node, const: set[fx.Node]) -> list[list[fx.Node]]:
    """The products of data that scores are made of pointwise, each with the nodes from it to the scores."""
    found, seen = [], set[fx.Node]()
    todo = [(scores, [scores])]
    while todo:
        node, path = todo.pop()
        if node in seen or node in const or not isinstance(value(node), Tensor):
            continue
        seen.add(node)
        if node.target in (aten.matmul.default, sqcompile_ops.int8_scores.default):
            found.append(path)
        elif node.target in POINTWISE:
            todo += [(a, [a, *path]) for a in node.all_input_nodes]
    return found


def _out_of_reach(softmax: fx.Node, const: set[fx.Node]) -> Attention | None:
    """A softmax of something else made of a product of data, refused with the first operation on the way up to it."""
    todo: list[tuple[Any, str]] = [(softmax.args[0], "")]
    seen = set[fx.Node]()
    for node, why in todo:  # nearest first
        if node in seen or node in const or node.target in (*LINEARS, aten.scaled_dot_product_attention.default):
            continue
        seen.add(node)
        why = why or ("" if node.target in POINTWISE else f"one of its scores {describe(node)}")
        factors = node.args[1] if node.target == aten.einsum.default else node.args
        if node.target in PRODUCTS and sum(isinstance(a, fx.Node) and a not in const for a in factors) > 1:
            return Attention("", node.name, softmax.name, refused=why)
        todo += [(a, why) for a in node.all_input_nodes]
    return None


def _weighted(softmax: fx.Node) -> fx.Node | str:
    """The product of a softmax's weights with values, or why there is none."""
    node = softmax
    while True:
        users = list(node.users)
        products = [u for u in users if u.target == aten.matmul.default and u.args[0] is node]
        if len(users) == 1 and products:
            return products[0]
        if len(users) == 1 and users[0].target in SAME:
            node = users[0]
            continue
        others = [u for u in users if u not in products]
        if not others:
            return "its weights are multiplied with several values"
        return f"its weights are read elsewhere, too: {_reader(others[0])}" if products else NOT_ATTENDING


def _reader(node: fx.Node) -> str:
    return OUTPUT if node.op == "output" else describe(node)


def _untransposed(kt: fx.Node) -> fx.Node | None:
    """What is transposed in its last two dims to make kt."""
    n = value(kt).dim()
    args: Any = kt.args[1:]
    dims = sorted(d % n for d in args) if kt.target == aten.transpose.int else []
    order = [d % n for d in args[0]] if kt.target == aten.permute.default else []
    if dims == [n - 2, n - 1] or (order and order == [*range(n - 2), n - 1, n - 2]):
        return kt.args[0]  # type: ignore[return-value]
    return None


def _operands(a: Attention, q: fx.Node, k: fx.Node, v: fx.Node, transposed: bool) -> Attention:
    """The attention with its operands as they are before heads are merged with the batch, or repeated."""
    dims = {value(t).dim() for t in (q, k, v)}
    if len(dims) > 1 or not dims <= {3, 4}:
        sizes = ", ".join(str(value(t).dim()) for t in (q, k, v))
        return _with(a, refused=f"its queries, keys and values have {sizes} dims: 3 or 4 are expected")
    if not same_batch(q, k, v):
        return _with(a, refused="its queries and keys have different batches")
    if dims == {3}:
        apart = unmerged(q), unmerged(v)
        if apart[0] is not None and apart[1] is not None:
            q, k, v = apart[0], unmerged(k) or k, apart[1]
    elif not transposed:
        k, v = unrepeated_pair(k, v)
    heads, groups, width = head_count(q), head_count(v), value(q).shape[-1]
    if heads is None or groups is None:
        return _with(a, refused="its heads are a dim that varies from call to call")
    if not isinstance(width, int) or not isinstance(value(v).shape[-1], int):
        return _with(a, refused="its channels are a dim that varies from call to call")
    if (value(k).dim() == 4 and head_count(k) != groups) or heads % groups:
        return _with(a, refused=f"{heads} query heads share {head_count(k)} key heads and {groups} value heads")
    return _with(a, q=q.name, k=k.name, v=v.name, transposed=transposed, heads=heads, groups=groups, width=width)


def _module(linears: dict[str, str], ends: list[fx.Node]) -> str:
    """The innermost module that holds the linears nearest above some nodes, "" for none."""
    todo, seen, names = list(ends), set[fx.Node](), []
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name in linears:
            names.append(linears[node.name].partition("#")[0].split(".")[:-2])  # without projection and parameter
        else:
            todo += node.all_input_nodes
    common = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*names, strict=False))
    return ".".join(parts[0] for parts in common)
