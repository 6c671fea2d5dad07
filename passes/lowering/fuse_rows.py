"""fuse_rows: what stands between two INT8 linears becomes one operator of rows. For CPUs with kernels for packed weights.

    %y = sqcompile.int8_linear_packed(%q0, %s0, %w, %ws, %sum, %bias, float32)
    %h = add(%x, %y)
    %n = layer_norm(%h, [64], %g, %b, 1e-05)
    %s1 = sqcompile.token_scale(%n)
    %q = sqcompile.quantize(%n, %s1, 128)
->
    %matmul_u8s8 = sqcompile.matmul_u8s8(%q0, %w, %ws, %sum, float32)
    %linear_norm_quantize = sqcompile.linear_norm_quantize(%matmul_u8s8, %s0, %bias, %x, %g, %b, 1e-05, False, False, None,
        0, None, 128, True, False)
    %getitem_2 = getitem(%linear_norm_quantize, 1)                  # s1
    %getitem_1 = getitem(%linear_norm_quantize, 0)                  # q
    %getitem = getitem(%linear_norm_quantize, 2)                    # h, where something else reads it

Likewise an activation of what a linear gives, or of one part of it that is multiplied by another:

    %a = slice(%y, -1, 0, 32)
    %u = slice(%y, -1, 32, 64)
    %t = silu(%a)
    %n = mul(%t, %u)
->
    %linear_act_quantize = sqcompile.linear_act_quantize(%matmul_u8s8, %s0, %bias, 0, 32, 32, silu, None, 0, None, 128)

Values between stay in float32, where PyTorch rounds each to the model's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sqcompile.kernels.ops import sqcompile_ops
from sqcompile.kernels.rotation import BLOCKS
from sqcompile.passes.ir.graph import above, add_op, arguments, aten, constants, value
from sqcompile.passes.labels.rules import behind
from sqcompile.passes.lowering.quantized import ATTENTION, Quantized, before_views, point, quantized

_DTYPES = (torch.float32, torch.bfloat16)
_LANES = 16  # the kernel takes a multiple of so many channels


@dataclass(frozen=True)
class _Source:
    """What the operator reads: a tensor, or a linear's product that it scales.

    Attributes:
        y: the tensor, or the linear.
        linear: whether it is a linear, whose product is read.
        gate, up: the first columns that are read.
        residual: what is added.
        others: readers of the sum, which the operator gives them.
        result, second: the nodes of the linear's result, or of those of two linears that are one.
    """

    y: fx.Node
    linear: bool = False
    gate: int = 0
    up: int = -1
    residual: fx.Node | None = None
    others: frozenset[fx.Node] = frozenset()
    result: fx.Node | None = None
    second: fx.Node | None = None


def fuse_rows(gm: fx.GraphModule) -> None:
    """Rewrites a graph of `int8_linear_packed` in place; what matches no pattern is left to the compiler."""
    gm.graph.eliminate_dead_code()  # a quantize node whose twin with a zero point is read instead
    const = constants(gm)
    for q in list(gm.graph.find_nodes(op="call_function", target=sqcompile_ops.quantize.default)):
        if any(u.target in ATTENTION for u in q.users):
            continue
        found = quantized(before_views(gm, q), const)
        if found is not None and found.by_rows and found.alone and _fits(found):
            _fuse(gm, found, const)
    gm.graph.eliminate_dead_code()


def _fits(d: Quantized) -> bool:
    v, k = value(d.base), value(d.base).shape[-1]
    blocks = not d.rotation or (d.rotation in BLOCKS and k % d.rotation == 0)
    return v.dtype in _DTYPES and k % _LANES == 0 and blocks and (d.static is None or value(d.static).numel() == 1)


def _fuse(gm: fx.GraphModule, d: Quantized, const: set[fx.Node]) -> None:
    first = min(d.q, d.rows)
    rest = d.multiplier, d.rotation, d.static, d.zero_point
    if d.norm is not None:
        h, weight, shift, *how = d.norm
        vectors = [value(v).dtype for v in (weight, shift) if v is not None]
        if value(h).dtype != value(d.base).dtype or not {*vectors} <= {*_DTYPES}:
            return
        readers = {u for u in d.readers if u > d.q}  # who reads it earlier computes the norm by itself
        source = _summed(h, d, first, const) if readers == d.readers else _Source(h)
        with gm.graph.inserting_before(first):
            read = *_read(gm, source), source.residual
            kept = bool(source.others), bool(readers)
            new = add_op(gm, sqcompile_ops.linear_norm_quantize.default, *read, weight, shift, *how, *rest, *kept)
        if source.others:
            point(gm, h, new, 2, source.others, source.result)
        if readers:
            point(gm, d.base, new, 3, readers, source.result)
    else:
        gate, up, activation = (d.base, None, "none") if d.act is None else d.act
        activated = None if d.readers else _activated(gate, up)
        if activated is None or (d.act is None and not activated.linear and not _opaque(gate)):
            return  # the compiler fuses it with what it finds
        source = activated
        with gm.graph.inserting_before(first):
            columns = source.gate, source.up, value(d.base).shape[-1]
            new = add_op(gm, sqcompile_ops.linear_act_quantize.default, *_read(gm, source), *columns, activation, *rest)
    point(gm, d.q, new, 0, result_of=source.second or source.result)
    point(gm, d.rows, new, 1, result_of=source.result)


def _read(gm: fx.GraphModule, source: _Source) -> tuple[fx.Node, Any, Any]:
    """What is read, and the factors of its rows and the bias, where it is a linear's product."""
    if not source.linear:
        return source.y, None, None
    q, scale, w, w_scale, w_sum, bias, dtype = source.y.args
    y = gm.graph.call_function(sqcompile_ops.matmul_u8s8.default, (q, w, w_scale, w_sum, dtype))
    y.meta["val"] = value(source.y)
    return y, scale, bias


def _is_linear(node: Any, readers: int = 1) -> bool:
    """Whether a node is a linear whose product can be read in its place, by all who read it."""
    if not isinstance(node, fx.Node) or node.target != sqcompile_ops.int8_linear_packed.default:
        return False
    bias: Any = node.args[5]
    dtypes = {node.args[-1]} if bias is None else {node.args[-1], value(bias).dtype}
    if bias is not None and value(bias).shape != value(node).shape[-1:]:  # of a graph that was saved with such a bias
        return False
    return len(node.users) == readers and dtypes <= {*_DTYPES}


def _summed(h: fx.Node, d: Quantized, first: fx.Node, const: set[fx.Node]) -> _Source:
    """A linear's result and what is added to it, where h is their sum, or the result alone; else h."""
    between = above(d.base, start=[h])  # what the norm is made of, however it is spelled
    others = frozenset(h.users) - between
    shared = any(u not in between for n in between - {h, d.base} if n not in const for u in n.users)
    if shared or any(u < first for u in others):  # who reads a part of the norm would have it all computed again
        return _Source(h)
    if h.target == aten.add.Tensor and not h.kwargs:
        pairs: list[Any] = [h.args[:2], h.args[1::-1]]
        for linear, residual in pairs:
            y = _behind_views(linear)
            fits = isinstance(residual, fx.Node) and linear is not residual and _is_linear(y)
            if fits and value(residual).shape == value(linear).shape == value(h).shape:
                same = value(residual).dtype == value(linear).dtype == value(h).dtype
                return _Source(y, True, residual=residual, others=others, result=y) if same else _Source(h)
    return _Source(h, True, result=h) if _is_linear(h, len(h.users)) and not others else _Source(h)


def _behind_views(node: Any) -> Any:
    """What a node has the rows of, in other dims."""
    while isinstance(node, fx.Node) and node.target == aten.reshape.default and len(node.users) == 1:
        inner: Any = node.args[0]
        if value(inner).shape[-1] != value(node).shape[-1]:
            break
        node = inner
    return node


def _activated(gate: fx.Node, up: fx.Node | None) -> _Source | None:
    """A linear of which both are columns, or whose result gate is; gate itself where there is no up; else None."""
    if up is None and _is_linear(gate):
        return _Source(gate, True, result=gate)
    parts = [p for p in (gate, up) if p is not None]
    columns = [_columns(p) for p in parts]
    if None not in columns:
        linears, starts = zip(*columns, strict=True)
        if len({*linears}) == 1 and _is_linear(linears[0], len(parts)):
            return _Source(linears[0], True, starts[0], starts[1] if up is not None else -1, result=gate, second=up)
    return _Source(gate) if up is None else None


def _columns(part: fx.Node) -> tuple[fx.Node, int] | None:
    """What a node has columns of, one beside the other, that nobody else reads, and the first of them."""
    if part.target != aten.slice.Tensor or len(part.users) != 1:
        return None
    args = arguments(part)
    source, start, dims = args["self"], args["start"] or 0, value(args["self"]).dim()
    width, size = value(source).shape[-1], value(part).shape[-1]
    if args["dim"] % dims != dims - 1 or args["step"] != 1 or not all(type(n) is int for n in (start, width, size)):
        return None
    start = start + width if start < 0 else start
    return (source, start) if start >= 0 and start + size <= width else None


def _opaque(x: fx.Node) -> bool:
    """Whether an operator that the compiler cannot look into gives x, in other dims."""
    source = behind(x, {aten.reshape.default, aten.transpose.int, aten.clone.default, aten.contiguous.default})
    return source.target == sqcompile_ops.attention.default or source.target in ATTENTION
