"""integer_products: products of INT8 values in integers, in a graph that is run operation by operation.

    %acc = linear(to(%q, float32), to(%w, float32))   ->   %acc = product(%q, %w)    # the same sums, as float32

The quantized stage computes them in float32, which every device has. Where a plan is tried on calibration calls they are
most of the time, and CPUs with INT8 instructions are several times as fast at the integers themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.kernels.ops import sqcompile_ops
from sqcompile.kernels.products import grouped_product, has_products, product
from sqcompile.passes.ir.graph import aten, value


def integer_products(gm: fx.GraphModule) -> fx.GraphModule:
    """Has the products of a quantized stage computed in integers, where its device is faster at them.

    In place. The result is no graph of operators: it is run node by node.
    """
    products: dict[Any, Callable[..., Tensor]] = {
        aten.linear.default: product,
        sqcompile_ops.grouped_linear.default: grouped_product,
    }
    for acc in [n for n in gm.graph.nodes if n.target in products]:
        casts = acc.args[:2]
        if any(_int8(cast) is None for cast in casts) or not has_products(value(casts[1]).device):
            continue
        with gm.graph.inserting_before(acc):
            new = gm.graph.call_function(products[acc.target], (*map(_int8, casts), *acc.args[2:]))
        new.meta["val"] = value(acc)
        acc.replace_all_uses_with(new)
        for node in (acc, *dict.fromkeys(casts)):
            if not node.users:
                gm.graph.erase_node(node)
    return gm


def _int8(cast: fx.Node) -> fx.Node | None:
    """What a node casts from int8 to float32; None for any other node."""
    if cast.target != aten.to.dtype or value(cast).dtype != torch.float32:
        return None
    of = cast.args[0]
    return of if isinstance(of, fx.Node) and value(of).dtype == torch.int8 else None
