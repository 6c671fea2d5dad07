"""aliases: operations that PyTorch knows under several names, under one. Part of `canonicalize`.

    concat([%x, %x], 1)            -> cat([%x, %x], 1)             # concatenate
    hstack([%x, %x])               -> cat([%x, %x], 1)
    mT(%x)                         -> transpose(%x, -2, -1)        # adjoint, mH and matrix_H of what is not complex
    swapdims(%x, 0, 2)             -> transpose(%x, 0, 2)          # swapaxes
    numpy_T(%x)                    -> transpose(%x, -2, -1)
    moveaxis(%x, 0, 2)             -> movedim(%x, 0, 2)
    tile(%x, [2])                  -> repeat(%x, [1, 1, 2])
    broadcast_to(%x, [5, 2, 3, 4]) -> expand(%x, [5, 2, 3, 4])
    ravel(%x)                      -> flatten(%x)
    multiply(%x, %y)               -> mul(%x, %y)                  # subtract, divide, negative, absolute
    true_divide(%x, %y)            -> div(%x, %y)
    clip(%x, 0)                    -> clamp(%x, 0)

torch.export keeps each of them as an operator of its own.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from sqcompile.passes.ir.graph import aten, value
from sqcompile.passes.ir.operators import named

# Under another name, with the same arguments.
_SAME = named("alias_of")

_TRANSPOSED = {aten.mT.default, aten.mH.default, aten.adjoint.default, aten.matrix_H.default, aten.numpy_T.default}


def rename(node: fx.Node) -> None:
    """Gives a node the one name of what it computes, in place."""
    if node.target in _SAME:
        node.target = _SAME[node.target]
    elif node.target in _TRANSPOSED and not value(node).is_complex():
        if node.target == aten.numpy_T.default and value(node).dim() != 2:
            node.target, node.args = aten.permute.default, (node.args[0], [*reversed(range(value(node).dim()))])
        else:
            node.target, node.args = aten.transpose.int, (node.args[0], -2, -1)
    elif node.target == aten.hstack.default and all(value(a).dim() for a in node.args[0]):  # type: ignore[union-attr, arg-type]
        node.target, node.args = aten.cat.default, (node.args[0], min(value(node).dim() - 1, 1))
    elif node.target == aten.tile.default:
        dims: Any = node.args[1]
        missing = value(node).dim() - len(dims)
        node.target, node.args = aten.repeat.default, (node.args[0], [1] * missing + [*dims])
