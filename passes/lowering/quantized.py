"""quantized: a quantize node, and what of the nodes before it a kernel can compute on the way. `fuse` and `fuse_rows` use it."""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import fx

from sqcompile.kernels.ops import sqcompile_ops
from sqcompile.passes.ir.graph import add_op, aten, value
from sqcompile.passes.ir.origin import replace
from sqcompile.passes.lowering.patterns import act_of, multiplied, norm_of

ATTENTION = {
    sqcompile_ops.int8_attention.default,
    sqcompile_ops.int8_scores.default,
    sqcompile_ops.int8_attend.default,
}


@dataclass(frozen=True)
class Quantized:
    """The integers of base · multiplier, rotated.

    Attributes:
        q, rows: the quantize node, and what gives the factors of its rows: its scale, or finite_rows of a static one.
        static: a static scale, else None.
        by_rows: whether each row has a factor of its own; else all have one, that depends on them all.
        zero_point: 0 or 128.
        base: what is multiplied, rotated and quantized.
        multiplier: float32 [K], or None.
        rotation: the size of the blocks, 0 for none.
        norm, act: what `patterns.norm_of` and `act_of` find in base.
        readers: of base, besides.
        alone: whether nothing else reads base · multiplier.
    """

    q: fx.Node
    rows: fx.Node
    static: fx.Node | None
    by_rows: bool
    zero_point: int
    base: fx.Node
    multiplier: fx.Node | None
    rotation: int
    norm: tuple[Any, ...] | None
    act: tuple[Any, ...] | None
    readers: set[fx.Node]
    alone: bool


def quantized(q: fx.Node, const: set[fx.Node]) -> Quantized | None:
    """What a quantize node quantizes; None for another number format, or a scale of another kind."""
    x: Any
    scale: Any
    x, scale, *more = q.args
    if len(more) > 1:
        return None
    per_token = scale.target == sqcompile_ops.token_scale.default
    if not per_token and scale not in const and scale.target != sqcompile_ops.tensor_scale.default:
        return None
    by_rows = per_token or scale in const
    rows = rows_of(q) if by_rows else scale
    if rows is None:
        return None
    readers = {u for u in x.users if u is not q and u is not rows}
    rotation: Any = 0
    if x.target == sqcompile_ops.rotate.default:
        if readers or not by_rows:
            return None
        rotated, (x, rotation) = x, x.args
        readers = {u for u in x.users if u is not rotated}
    base, multiplier = x, None
    norm, act = norm_of(x, const), act_of(x, const)
    if norm is None and act is None and (found := multiplied(x, const)) is not None:
        base, multiplier = found
        norm, act = norm_of(base, const), act_of(base, const)
        readers = {u for u in base.users if u is not x} | readers
    alone = multiplier is None or len(x.users) <= 2
    static = scale if scale in const else None
    zero_point: Any = more[0] if more else 0
    return Quantized(q, rows, static, by_rows, zero_point, base, multiplier, rotation, norm, act, readers, alone)


def before_views(gm: fx.GraphModule, q: fx.Node) -> fx.Node:
    """quantize(reshape(x)) -> reshape(quantize(x)), where tokens stay tokens: what computes x is in sight then.

    Likewise quantize(rotate(reshape(x))) -> reshape(quantize(rotate(x))).
    """
    while True:
        x: Any
        scale: Any
        x, scale = q.args[:2]
        rows, readers, block = rows_of(q), [q], None
        if x.target == sqcompile_ops.rotate.default and {*x.users} <= {q, rows}:
            readers = [x]
            x, block = x.args
        elif rows is not None or (scale.args and scale.args[0] is x):
            readers.append(rows or scale)
        if x.target in (aten.clone.default, aten.contiguous.default):
            for node in readers:
                node.update_arg(0, x.args[0])
            if not x.users:
                gm.graph.erase_node(x)
            continue
        sizes: Any = x.args[1] if x.target == aten.reshape.default else None
        tokens = sizes and sizes[-1] == value(x.args[0]).shape[-1]
        if not tokens or rows is None:
            return q
        with gm.graph.inserting_before(min(q, rows)):
            inner = x.args[0] if block is None else add_op(gm, sqcompile_ops.rotate.default, x.args[0], block)
            factors = add_op(gm, rows.target, inner)  # type: ignore[arg-type]
            new = add_op(gm, sqcompile_ops.quantize.default, inner, factors if rows is scale else scale, *q.args[2:])
            replace(gm, q, add_op(gm, aten.reshape.default, new, sizes))
            replace(gm, rows, add_op(gm, aten.reshape.default, factors, [*sizes[:-1], 1]))
        for node in dict.fromkeys((q, rows, *readers, x)):
            if not node.users:
                gm.graph.erase_node(node)
        q = new


def rows_of(q: fx.Node) -> fx.Node | None:
    """What gives the rows of a quantize node their factors: its own scale per token, or finite_rows of a static one."""
    x, scale = q.args[:2]
    if scale.target == sqcompile_ops.token_scale.default and scale.args[0] is x:  # type: ignore[union-attr]
        return scale  # type: ignore[return-value]
    static = scale.op == "get_attr"  # type: ignore[union-attr]
    same = [u for u in x.users if u.target == sqcompile_ops.finite_rows.default]  # type: ignore[union-attr]
    return same[0] if static and same else None


def point(
    gm: fx.GraphModule,
    old: fx.Node,
    new: fx.Node,
    i: int,
    readers: Collection[fx.Node] | None = None,
    result_of: fx.Node | None = None,
) -> None:
    """Readers of old, or some of them, read item i of new; ``result_of`` as of `origin.replace`."""
    with gm.graph.inserting_after(new):
        item = gm.graph.call_function(operator.getitem, (new, i))
    item.meta["val"] = value(new)[i]
    replace(gm, old, item, readers, result_of)
