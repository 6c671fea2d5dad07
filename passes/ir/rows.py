"""rows: a weight that is computed a few rows at a time, so that no float copy of all of it is made.

    %mul = mul(%w, %smooth_0_columns)
    %rotate = sqcompile.rotate(%mul, 16)
->
    rows 0 to 99 of %rotate: rotate(mul(%w[0:100], %smooth_0_columns), 16)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.kernels.ops import sqcompile_ops
from sqcompile.passes.ir.graph import FOLD_CAST, above, aten, evaluate, get_tensor, value
from sqcompile.process.interrupts import checkpoint

Rows = Callable[[slice], Tensor]

# What gives each row of its result, [N, ...] or [E, N, ...], from that row of its operands alone, to the bit.
_BY_ROW = (aten.mul.Tensor, aten.div.Tensor, aten.to.dtype, aten.to.device, sqcompile_ops.rotate.default)


def rows_of(gm: fx.GraphModule, node: fx.Node) -> Rows:
    """What gives some of a constant expression's first dim, as `evaluate` gives all of it.

    Where an operator mixes rows, as a transposition does, all of it is computed once, and kept as long as the answer.
    """
    count, dims = value(node).shape[0], value(node).dim()
    if not all(_by_row(n, count, dims) for n in above(node)):
        whole = evaluate(gm, node)
        return lambda part: whole[part]

    def run(n: fx.Node, part: slice) -> Any:
        if n.op == "get_attr":
            t = get_tensor(gm, str(n.target))
            return t[part] if t.dim() == dims and t.shape[0] == count else t
        if n.meta.get(FOLD_CAST):
            return run(n.args[0], part)  # type: ignore[arg-type]
        args, kwargs = fx.node.map_arg((n.args, n.kwargs), lambda a: run(a, part))
        return n.target(*args, **kwargs)  # type: ignore[operator]

    def rows(part: slice) -> Tensor:
        checkpoint()
        with torch.no_grad():
            return run(node, part)

    return rows


def _by_row(n: fx.Node, count: int, dims: int) -> bool:
    """Whether a node of an expression [count, ...] of so many dims gives a row from that row alone."""
    if n.op == "call_function":
        if n.target not in _BY_ROW or (n.target == sqcompile_ops.rotate.default and value(n).dim() < 2):
            return False
    elif n.op != "get_attr":
        return False
    v = value(n)  # of fewer dims, or of one row: the same for all rows
    return isinstance(v, Tensor) and (v.dim() < dims or (v.dim() == dims and v.shape[0] in (1, count)))
