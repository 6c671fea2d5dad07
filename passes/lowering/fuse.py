"""fuse: a quantize meets what computes its input, a GEMM what is done with its result. For GPUs, where each is a kernel.

    %h = to(%x, float32)                                            # or rms_norm, or layer_norm
    %square = pow(%h, 2)
    %mean = mean(%square, [-1], True)
    %eps = add(%mean, 1e-06)
    %root = rsqrt(%eps)
    %n = mul(%h, %root)
    %m = to(%n, bfloat16)
    %y = mul(%g, %m)
    %s = sqcompile.token_scale(%y)
    %q = sqcompile.quantize(%y, %s)
->
    %norm_quantize = sqcompile.norm_quantize(%x, %g, None, 1e-06, True, True, None, None, False)
    %getitem_1 = getitem(%norm_quantize, 1)                         # s
    %getitem = getitem(%norm_quantize, 0)                           # q

Likewise an activation, an explicit multiplier 1/s, and whatever else is quantized:

    sqcompile.quantize(mul(silu(%gate), %up), sqcompile.token_scale(mul(silu(%gate), %up)))
    -> getitem(sqcompile.act_quantize(%gate, %up, silu, None, None), 0)
    sqcompile.quantize(mul(%gate, %inv_s), sqcompile.token_scale(mul(%gate, %inv_s)))
    -> getitem(sqcompile.quantize_rows(%gate, token, %inv_s), 0)

A GEMM takes a residual:

    add(%x, sqcompile.int8_gemm(%q, %r, %w, %ws, None, float32, none, None, None))
    -> sqcompile.int8_gemm(%q, %r, %w, %ws, None, float32, none, %x, None)

or an activation and a quantization with a static Δ, so that it takes and gives int8:

    %g = sqcompile.int8_gemm(%q, %r, %w, %ws, None, float32, none, None, None)
    %a = relu(%g)
    %d = sqcompile.finite_rows(%a)                                  # %r: the rows that are finite stay the same
    %y = sqcompile.quantize(%a, %s)
->
    %int8_gemm = sqcompile.int8_gemm(%q, %r, %w, %ws, None, float32, relu, None, %s)

And an attention quantizes its queries:

    sqcompile.int8_attention(sqcompile.quantize(%x, sqcompile.token_scale(%x)), sqcompile.token_scale(%x), %k, %ks,
        %v, None, None, None, None, 0.25, 0, float32)
    -> sqcompile.int8_attention(%x, None, %k, %ks, %v, None, None, None, None, 0.25, 0, float32)

Values between are rounded as before, but for the GEMM's own result, which is rounded once, after residual or activation.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from sqcompile.kernels.ops import sqcompile_ops
from sqcompile.passes.ir.graph import (
    add_op,
    add_tensor,
    aten,
    constants,
    get_tensor,
    value,
)
from sqcompile.passes.ir.origin import replace
from sqcompile.passes.lowering.patterns import activation_of
from sqcompile.passes.lowering.quantized import ATTENTION, Quantized, before_views, point, quantized, rows_of


def fuse(gm: fx.GraphModule) -> None:
    """Rewrites a graph of `int8_gemm` in place; what matches no pattern is quantized by a kernel of its own."""
    const = constants(gm)
    for node in list(gm.graph.find_nodes(op="call_function", target=aten.add.Tensor)):
        _residual(gm, node)
    for q in list(gm.graph.find_nodes(op="call_function", target=sqcompile_ops.quantize.default)):
        if any(u.target in ATTENTION for u in q.users):
            _into_attention(gm, q)
            continue  # the compiler fuses those of keys and values with the rotary embedding before them
        q = before_views(gm, q)
        if not _into_gemm(gm, q, const) and (found := quantized(q, const)) is not None:
            _quantize(gm, found)
    gm.graph.eliminate_dead_code()


def _residual(gm: fx.GraphModule, add: fx.Node) -> None:
    """y + r, where nothing else reads y."""
    a, b = add.args[:2]
    for y, r in ((b, a), (a, b)):
        if not isinstance(y, fx.Node) or not isinstance(r, fx.Node) or add.kwargs:
            continue
        if y.target != sqcompile_ops.int8_gemm.default or len(y.users) != 1 or y is r:
            continue
        args = list(y.args)
        fits = value(r).shape == value(y).shape and value(r).dtype == value(y).dtype == value(add).dtype
        if fits and args[6:] == ["none", None, None]:
            _redo(gm, y, add, *args[:7], r, None)
            return


def _into_gemm(gm: fx.GraphModule, q: fx.Node, const: set[fx.Node]) -> bool:
    """A static quantization of a GEMM's result, activated or not, happens in the GEMM: int8 in, int8 out."""
    x, scale = q.args[:2]
    assert isinstance(x, fx.Node) and isinstance(scale, fx.Node)
    rows = rows_of(q)
    if scale not in const or rows is None or set(x.users) != {q, rows}:
        return False
    activation, gemm = activation_of(x), x
    if activation:
        gemm = x.args[0]  # type: ignore[assignment]
    if gemm.target != sqcompile_ops.int8_gemm.default or (activation and len(gemm.users) != 1):
        return False
    args = list(gemm.args)
    factors = args[1]
    assert isinstance(factors, fx.Node)
    if args[6:] != ["none", None, None] or not _is_factor(factors) or value(factors).dim() != value(rows).dim():
        return False
    rows.replace_all_uses_with(factors)
    gm.graph.erase_node(rows)
    _redo(gm, gemm, q, *args[:6], activation or "none", None, scale)
    return True


def _is_factor(node: fx.Node) -> bool:
    """Whether a GEMM's row factors are those of a static scale, 1 or NaN."""
    while node.target == aten.reshape.default:
        node = node.args[0]  # type: ignore[assignment]
    if node.target is not operator.getitem:
        return node.target == sqcompile_ops.finite_rows.default
    source: Any = node.args[0]
    static = {sqcompile_ops.norm_quantize.default: 6, sqcompile_ops.act_quantize.default: 3}.get(source.target)
    return static is not None and source.args[static] is not None


def _into_attention(gm: fx.GraphModule, q: fx.Node) -> None:
    """Queries are quantized by the attention kernel, which reads them once."""
    x, scale = q.args[:2]
    assert isinstance(x, fx.Node) and isinstance(scale, fx.Node)
    target = sqcompile_ops.int8_attention.default
    if len(q.args) > 2 or any(u.target != target or u.args[0] is not q or q in u.args[1:] for u in q.users):
        return
    own = scale.target == sqcompile_ops.token_scale.default and scale.args[0] is x
    for attention in list(q.users):
        factor = attention.args[1]
        # of a static scale, mul(finite_rows(x), scale): the kernel sees itself what is finite
        static = factor.target == aten.mul.Tensor and factor.args[1] is scale  # type: ignore[union-attr]
        if factor is scale or static:
            attention.args = (x, None if own else scale, *attention.args[2:])


def _quantize(gm: fx.GraphModule, d: Quantized) -> None:
    if d.zero_point:
        return
    static = _plane(gm, d.static, min(d.q, d.rows)) if d.static is not None else None
    turned = [d.rotation] if d.rotation else []
    with gm.graph.inserting_before(min(d.q, d.rows) if d.by_rows else d.q):
        if d.norm is not None and d.by_rows and d.alone:
            readers = {u for u in d.readers if u > d.q}  # who reads it earlier computes the norm by itself
            args = *d.norm, static, d.multiplier, bool(readers), *turned
            new = add_op(gm, sqcompile_ops.norm_quantize.default, *args)
            if readers:
                point(gm, d.base, new, 2, readers)
        elif d.act is not None and d.by_rows and not d.readers:
            new = add_op(gm, sqcompile_ops.act_quantize.default, *d.act, static, d.multiplier, *turned)
        elif turned:
            return  # `fuse_rotations`
        elif static is None:
            granularity = "token" if d.by_rows else "tensor"
            new = add_op(gm, sqcompile_ops.quantize_rows.default, d.base, granularity, d.multiplier)
        else:
            return  # pointwise: the compiler fuses it with what it finds
    point(gm, d.q, new, 0)
    point(gm, d.rows, new, 1)


def _plane(gm: fx.GraphModule, scale: fx.Node, reader: fx.Node) -> fx.Node:
    """A static scale as [1, 1]: Inductor writes constants of fewer dims into its code, where no kernel can read them."""
    if scale.op != "get_attr" or value(scale).dim() or value(reader).dim() < 2:
        return scale
    with gm.graph.inserting_before(reader):
        return add_tensor(gm, f"{scale.target}_plane", get_tensor(gm, str(scale.target)).reshape(1, 1))


def _redo(gm: fx.GraphModule, gemm: fx.Node, old: fx.Node, *args: Any) -> None:
    """Puts the GEMM with other arguments, by which it does old's work too, in old's place."""
    with gm.graph.inserting_before(old):
        new = add_op(gm, sqcompile_ops.int8_gemm.default, *args)
    replace(gm, old, new, result_of=gemm)
    gm.graph.erase_node(old)
    gm.graph.eliminate_dead_code()
