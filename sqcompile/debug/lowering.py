"""lowering: the quantized stage against the lowered one, node by node, on the quantized stage's own values.

Both graphs run side by side. Where a lowered node stands for one of the quantized stage (`passes.ir.origin`), or is still
that node, the two values are compared, and readers of the lowered one get the quantized stage's: so an error is that of
the node alone, and does not grow from layer to layer as roundings fall to other sides.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.compiled.walk import values
from sqcompile.debug.result import NodeError
from sqcompile.debug.run import FP8_NODE, NODE, relative_error
from sqcompile.kernels.reference import UINT8_ZERO_POINT
from sqcompile.passes.ir.graph import aten, nodes_by_name
from sqcompile.passes.ir.operators import LAYOUT
from sqcompile.passes.ir.origin import PLANNED, STANDS_FOR
from sqcompile.passes.labels.rules import behind
from sqcompile.pytorch.core import pytree

_UNSET = {
    aten.empty_like.default, aten.new_empty.default, aten.empty.memory_format, aten.empty_strided.default,
    aten.new_empty_strided.default,
}  # fmt: skip

# What they compute with stays in float32, where the quantized stage rounds each value to the model's dtype: their integers
# and scales differ by that much.
_UNROUNDED = ("linear_norm_quantize", "linear_act_quantize")


def compare_lowering(
    quantized: fx.GraphModule, lowered: fx.GraphModule, arguments: Sequence[Any], labels: Mapping[str, str]
) -> tuple[NodeError, ...]:
    """The error of each INT8 linear and attention, and of any other node that is wrong, in graph order.

    Args:
        quantized, lowered: the two stages; neither is changed.
        arguments: one for each placeholder.
        labels: by the plan's names of linears and attentions.
    """
    stage = _Values(quantized, lowered, arguments)
    found: dict[str, NodeError] = {}

    def instead(n: fx.Node, value: Any) -> Any:
        if n not in stage.asked:
            return value
        want = stage.take(n)
        if STANDS_FOR not in n.meta and _differs(n):
            return want
        shifted = _is_shifted(value, want)
        error, tolerance = _compared(
            (value.to(torch.int16) - UINT8_ZERO_POINT).to(torch.int8) if shifted else value, want
        )
        name, operator = n.meta.get(PLANNED, n.name), _operator(n)
        if operator == "fp8_linear":
            tolerance = max(tolerance, FP8_NODE)
        if operator in _UNROUNDED:
            tolerance = max(tolerance, NODE[_source(n).args[0].meta["val"].dtype])
        node = NodeError(name, labels.get(name, name), operator, error, tolerance)
        if PLANNED in n.meta or node.wrong:  # an operator may give several results that show a linear's
            found[name] = max(found.get(name, node), node, key=lambda e: (e.wrong, e.error))
        return (want.to(torch.int16) + UINT8_ZERO_POINT).to(torch.uint8) if shifted else want

    for _ in values(lowered, arguments, instead):
        pass
    return tuple(found.values())


class _Values:
    """What the quantized stage's nodes hold. It runs as far as it is asked for, and keeps what will be asked for."""

    def __init__(self, quantized: fx.GraphModule, lowered: fx.GraphModule, arguments: Sequence[Any]) -> None:
        known = nodes_by_name(quantized).keys()
        named = {n: n.meta.get(STANDS_FOR, n.name) for n in lowered.graph.nodes if n.op in ("call_function", "output")}
        self.asked = {n: name for n, name in named.items() if name in known}
        self._left = Counter(self.asked.values())
        self._run = values(quantized, arguments)
        self._kept: dict[str, Any] = {}

    def take(self, n: fx.Node) -> Any:
        name = self.asked[n]
        while name not in self._kept:
            node, value = next(self._run)
            if self._left[node.name]:
                self._kept[node.name] = value
        self._left[name] -= 1
        return self._kept[name] if self._left[name] else self._kept.pop(name)


def _is_shifted(value: Any, want: Any) -> bool:
    """Whether a node has the quantized stage's int8 as uint8: with the zero point of oneDNN's kernels."""
    return [getattr(x, "dtype", None) for x in (value, want)] == [torch.uint8, torch.int8]


def _compared(value: Any, want: Any) -> tuple[float, float]:
    """The relative error and its tolerance; of several tensors, those of the worst."""
    got, due = pytree.tree_leaves(value), pytree.tree_leaves(want)
    if len(got) != len(due):
        return math.inf, 0.0
    pairs = [
        (relative_error(y, x), NODE.get(x.dtype, 0.0) if isinstance(x, Tensor) else 0.0)
        for y, x in zip(got, due, strict=True)
    ]
    return max(pairs, key=lambda pair: (pair[0] > pair[1], pair[0]), default=(0.0, 0.0))


def _differs(n: fx.Node) -> bool:
    """Whether two runs of an operator give other values by right: random numbers, or memory that nothing was written to."""
    return n.target in _UNSET or torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())


def _source(n: fx.Node) -> Any:
    """The call that computes a node's value, behind the slices of linears that were merged."""
    return behind(n, LAYOUT | {aten.contiguous.default})


def _operator(n: fx.Node) -> str:
    source = _source(n)
    packet = getattr(source.target, "overloadpacket", None)
    return getattr(packet or source.target, "__name__", str(source.target))
