"""rotated: a rotation and the quantization of its result are one operator, which reads and writes each value once.

    %rotate = sqcompile.rotate(%x, 32)
    %s = sqcompile.token_scale(%rotate)
    %q = sqcompile.quantize(%rotate, %s, 128)
->
    %rotate_quantize = sqcompile.rotate_quantize(%x, 32, None, 128)
    %getitem = getitem(%rotate_quantize, 0)                         # q
    %getitem_1 = getitem(%rotate_quantize, 1)                       # s

With a static scale the rows' factors are those of `finite_rows`.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from sqcompile.kernels.ops import sqcompile_ops
from sqcompile.passes.ir.graph import add_op, value
from sqcompile.passes.ir.origin import replace


def fuse_rotations(gm: fx.GraphModule) -> None:
    """Rewrites a graph in place; a rotation that is read otherwise, or quantized per tensor, stays what it is."""
    gm.graph.eliminate_dead_code()  # a quantize node whose twin with a zero point is read instead
    for rotation in list(gm.graph.find_nodes(op="call_function", target=sqcompile_ops.rotate.default)):
        x, block = rotation.args
        for q in [u for u in rotation.users if u.target == sqcompile_ops.quantize.default]:
            _fuse(gm, rotation, q, x, block)
    gm.graph.eliminate_dead_code()


def _fuse(gm: fx.GraphModule, rotation: fx.Node, q: fx.Node, x: Any, block: Any) -> None:
    scale: Any
    zero_point: Any
    scale, zero_point, *others = q.args[1:] if len(q.args) > 2 else (q.args[1], 0)
    if others:  # another number format
        return
    if scale.target == sqcompile_ops.token_scale.default and scale.args[0] is rotation:
        static, rows = None, scale
    elif scale.op == "get_attr":
        static = scale
        rows = next((u for u in rotation.users if u.target == sqcompile_ops.finite_rows.default), None)
    else:
        return
    with gm.graph.inserting_before(min(q, rows) if rows is not None else q):
        new = add_op(gm, sqcompile_ops.rotate_quantize.default, x, block, static, zero_point)
        items = [gm.graph.call_function(operator.getitem, (new, i)) for i in range(2)]
    for old, item, part in zip((q, rows), items, value(new), strict=True):
        item.meta["val"] = part
        if old is not None:
            replace(gm, old, item)
            gm.graph.erase_node(old)
