"""aliases: operations that PyTorch knows under several names, under one. Part of `canonicalize`.

    concat(%xs, d), concatenate(%xs, d), hstack(%xs)        -> cat(%xs, d)
    mT(%x), adjoint(%x), swapdims(%x, a, b), numpy_T(%x)    -> transpose(%x, a, b)
    moveaxis(%x, a, b)                                      -> movedim(%x, a, b)
    tile(%x, dims)                                          -> repeat(%x, dims)
    broadcast_to(%x, size)                                  -> expand(%x, size)
    ravel(%x)                                               -> flatten(%x)
    multiply(%x, %y), true_divide(%x, %y), clip(%x, 0)      -> mul(%x, %y), div(%x, %y), clamp(%x, 0)

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
