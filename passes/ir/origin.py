"""origin: which node of the quantized stage a lowered node stands for, and whose result it is by the plan.

Lowering gives operators new names. With these two marks its result can be compared with the stage before, node by node.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from sqcompile.passes.ir.record import substitute

PLANNED = "sqcompile_planned"  # in ``node.meta``: the linear or attention whose result it is, by its name in the plan
STANDS_FOR = "sqcompile_stands_for"  # in ``node.meta``: the name of the quantized stage's node that has the same value


def replace(
    gm: fx.GraphModule,
    old: fx.Node,
    new: fx.Node,
    readers: Collection[fx.Node] | None = None,
    result_of: fx.Node | None = None,
) -> None:
    """Lets what reads ``old`` read ``new``, which has the same value, and marks it so.

    Args:
        readers: those that change over; all by default.
        result_of: the node whose work ``new`` does besides; ``old`` by default.
    """
    substitute(gm, old, new, readers)
    new.meta[STANDS_FOR] = old.meta.get(STANDS_FOR, old.name)
    planned = (result_of or old).meta.get(PLANNED)
    if planned is not None:
        new.meta[PLANNED] = planned
