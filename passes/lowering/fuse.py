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
from sqcompile.passes.lowering.patterns import act_of, activation_of, multiplied, norm_of

_ATTENTION = {
    sqcompile_ops.int8_attention.default,
    sqcompile_ops.int8_scores.default,
    sqcompile_ops.int8_attend.default,
}


def fuse(gm: fx.GraphModule) -> None:
    """Rewrites a graph of `int8_gemm` in place; what matches no pattern is quantized by a kernel of its own."""
    const = constants(gm)
    for node in list(gm.graph.find_nodes(op="call_function", target=aten.add.Tensor)):
        _residual(gm, node)
    for q in list(gm.graph.find_nodes(op="call_function", target=sqcompile_ops.quantize.default)):
        if any(u.target in _ATTENTION for u in q.users):
            _into_attention(gm, q)
            continue  # the compiler fuses those of keys and values with the rotary embedding before them
        q = _before_views(gm, q)
        if not _into_gemm(gm, q, const):
            _quantize(gm, q, const)
    gm.graph.eliminate_dead_code()


def _before_views(gm: fx.GraphModule, q: fx.Node) -> fx.Node:
    """quantize(reshape(x)) -> reshape(quantize(x)), where tokens stay tokens: what computes x is in sight then."""
    while True:
        x, scale = q.args[:2]
        assert isinstance(x, fx.Node) and isinstance(scale, fx.Node)
        rows = _rows(q)
        if x.target in (aten.clone.default, aten.contiguous.default):
            others = [rows] if rows else [scale] if scale.args and scale.args[0] is x else []
            for node in (q, *others):
                node.update_arg(0, x.args[0])
            if not x.users:
                gm.graph.erase_node(x)
            continue
        sizes: Any = x.args[1] if x.target == aten.reshape.default else None
        tokens = sizes and sizes[-1] == value(x.args[0]).shape[-1]  # type: ignore[arg-type]
        if not tokens or len(q.args) > 2 or rows is None:
            return q
        with gm.graph.inserting_before(min(q, rows)):
            inner = add_op(gm, rows.target, x.args[0])  # type: ignore[arg-type]
            new = add_op(gm, sqcompile_ops.quantize.default, x.args[0], inner if rows is scale else scale)
            replace(gm, q, add_op(gm, aten.reshape.default, new, sizes))
            replace(gm, rows, add_op(gm, aten.reshape.default, inner, [*sizes[:-1], 1]))
        gm.graph.erase_node(q)
        gm.graph.erase_node(rows)
        if not x.users:
            gm.graph.erase_node(x)
        q = new


def _rows(q: fx.Node) -> fx.Node | None:
    """What gives the rows of a quantize node their factors: its own scale per token, or finite_rows of a static one."""
    x, scale = q.args[:2]
    if scale.target == sqcompile_ops.token_scale.default and scale.args[0] is x:  # type: ignore[union-attr]
        return scale  # type: ignore[return-value]
    static = scale.op == "get_attr"  # type: ignore[union-attr]
    same = [u for u in x.users if u.target == sqcompile_ops.finite_rows.default]  # type: ignore[union-attr]
    return same[0] if static and same else None


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
    rows = _rows(q)
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


def _quantize(gm: fx.GraphModule, q: fx.Node, const: set[fx.Node]) -> None:
    x, scale = q.args[:2]
    assert isinstance(x, fx.Node) and isinstance(scale, fx.Node)
    if any(q.args[2:]):  # a zero point, or another number format
        return
    per_token = scale.target == sqcompile_ops.token_scale.default
    if not per_token and scale not in const and scale.target != sqcompile_ops.tensor_scale.default:
        return
    rows = _rows(q) if per_token or scale in const else scale
    if rows is None:
        return
    static = _plane(gm, scale, min(q, rows)) if scale in const else None
    readers = {u for u in x.users if u is not q and u is not rows}
    turned: list[Any] = []  # the size of the blocks
    if x.target == sqcompile_ops.rotate.default:
        if readers or not (per_token or static is not None):
            return
        rotated, (inner, *turned) = x, x.args
        assert isinstance(inner, fx.Node)
        x = inner
        readers = {u for u in x.users if u is not rotated}
    base, multiplier = x, None
    norm, act = norm_of(x, const), act_of(x, const)
    if norm is None and act is None and (found := multiplied(x, const)) is not None:
        base, multiplier = found
        norm, act = norm_of(base, const), act_of(base, const)
        readers = {u for u in base.users if u is not x} | readers
    with gm.graph.inserting_before(min(q, rows) if per_token or static is not None else q):
        if norm is not None and (per_token or static is not None) and (multiplier is None or len(x.users) <= 2):
            readers = {u for u in readers if u > q}  # who reads it earlier computes the norm by itself
            new = add_op(gm, sqcompile_ops.norm_quantize.default, *norm, static, multiplier, bool(readers), *turned)
            if readers:
                _point(gm, base, new, 2, keep=readers)
        elif act is not None and (per_token or static is not None) and not readers:
            new = add_op(gm, sqcompile_ops.act_quantize.default, *act, static, multiplier, *turned)
        elif turned:
            return  # `fuse_rotations`
        elif static is None:
            granularity = "token" if per_token else "tensor"
            new = add_op(gm, sqcompile_ops.quantize_rows.default, base, granularity, multiplier)
        else:
            return  # pointwise: the compiler fuses it with what it finds
    _point(gm, q, new, 0)
    _point(gm, rows, new, 1)


def _plane(gm: fx.GraphModule, scale: fx.Node, reader: fx.Node) -> fx.Node:
    """A static scale as [1, 1]: Inductor writes constants of fewer dims into its code, where no kernel can read them."""
    if scale.op != "get_attr" or value(scale).dim() or value(reader).dim() < 2:
        return scale
    with gm.graph.inserting_before(reader):
        return add_tensor(gm, f"{scale.target}_plane", get_tensor(gm, str(scale.target)).reshape(1, 1))


def _point(gm: fx.GraphModule, old: fx.Node, new: fx.Node, i: int, keep: set[fx.Node] | None = None) -> None:
    """Readers of old (or those in keep) read item i of new."""
    with gm.graph.inserting_after(new):
        item = gm.graph.call_function(operator.getitem, (new, i))
    item.meta["val"] = value(new)[i]
    replace(gm, old, item, keep)


def _redo(gm: fx.GraphModule, gemm: fx.Node, old: fx.Node, *args: Any) -> None:
    """Puts the GEMM with other arguments, by which it does old's work too, in old's place."""
    with gm.graph.inserting_before(old):
        new = add_op(gm, sqcompile_ops.int8_gemm.default, *args)
    replace(gm, old, new, result_of=gemm)
    gm.graph.erase_node(old)
    gm.graph.eliminate_dead_code()
