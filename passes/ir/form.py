"""form: what an analysis of a graph depends on, and analyses that are made once for a graph.

    %x: f32[s0, 4] = input
    %r = relu(%x)
->
    [(["s0", "4"], torch.float32, cpu), (relu, (node 0,), {})]
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, fx

from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import get_tensor, state, value

_Found = TypeVar("_Found")


def form(gm: fx.GraphModule) -> list[Any]:
    """All that the values of a graph's nodes depend on, nodes by their position. 1, 1.0 and True are not the same."""
    position = {n: i for i, n in enumerate(gm.graph.nodes)}

    def leaf(x: Any) -> Any:
        return (fx.Node, position[x]) if isinstance(x, fx.Node) else (type(x), x)

    parts: list[Any] = []
    for n in gm.graph.nodes:
        if n.op == "get_attr":
            t = get_tensor(gm, str(n.target))
            parts.append((t.shape, t.stride(), t.dtype, t.device))
        elif n.op == "placeholder":
            v = value(n)
            sizes = v.shape if isinstance(v, Tensor) else [v]
            dtype, device = (v.dtype, v.device) if isinstance(v, Tensor) else (None, None)
            parts.append(([str(s) for s in sizes], dtype, device))
        else:
            parts.append((n.target, *fx.node.map_aggregate((n.args, n.kwargs), leaf)))
    return parts


def once(analysis: Callable[[fx.GraphModule], _Found]) -> Callable[[fx.GraphModule], _Found]:
    """An analysis whose answer the graph keeps, until its form, a name or a tensor is another. The answer is not changed.

    Tensors made in inference mode have no version that would tell of a write: with one, nothing is kept.
    """

    @functools.wraps(analysis)
    def answer(gm: fx.GraphModule) -> _Found:
        tensors = [get_tensor(gm, str(n.target)) for n in gm.graph.find_nodes(op="get_attr")]
        if any(t.is_inference() for t in tensors):
            return analysis(gm)
        names = [(n.name, n.target if n.op == "get_attr" else None) for n in gm.graph.nodes]
        now = form(gm), names, [state(t) for t in tensors]
        found = about(gm).found
        if analysis in found:
            before, held, result = found[analysis]
            if now == before and all(r() is t for r, t in zip(held, tensors, strict=True)):
                return result
        result = analysis(gm)
        found[analysis] = now, [weakref.ref(t) for t in tensors], result
        return result

    return answer
