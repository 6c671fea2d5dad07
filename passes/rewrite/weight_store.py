"""weight_store: INT8 weights shared by a model's graphs, keyed by the expression that each was computed from.

Two graphs of a model (prefill and decode, or the parts between graph breaks) have the same linears. The first makes
their INT8 weights, the second finds them, and needs no float weight for it: so the float model may be freed between.
"""

from __future__ import annotations

import hashlib
import logging
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import FOLD_CAST, get_tensor

log = logging.getLogger("sqcompile")


@dataclass(frozen=True, eq=False)
class Merged:
    """The INT8 weight of linears that share an input.

    Attributes:
        w: int8 [N, K], the rows of all linears; packed where the target's kernels want it. For experts int8
            [E, N, K], or one packed [N, K] each.
        scale: float32 [N], or [E, N].
        beside: what a target's kernels read beside a packed weight, such as sums of its rows int32 [N] or [E, N]; else None.
    """

    w: Tensor | list[Tensor]
    scale: Tensor
    beside: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Product:
    """W c of a linear whose input is shifted (`shift`), [N] in float32 or wider."""

    values: Tensor


_Made = TypeVar("_Made", Merged, Product)


@dataclass(frozen=True)
class Lazy:
    """A weight that is not quantized, or in a lowered graph not packed, yet.

    Attributes:
        key: says which float tensors it is made of, and how; None where nobody shares it.
        make: gives int8 [N, K] or [E, N, K] and its float32 scales (see `insert_qdq`); for a lowered graph, what its operator
            reads (see `lower`).
        beside: under which names the graph holds what is made with the weight.
    """

    key: Hashable
    make: Callable[[], tuple[Tensor, ...]]
    beside: tuple[str, ...]


class Shared:
    """Weights by what they are made of. An entry lives as long as a graph that holds it (see `held`)."""

    def __init__(self, identity: Callable[[Tensor], Hashable], check: Callable[[Hashable], None]) -> None:
        """``identity`` says which tensor of the model a tensor is, and None for one that a pass made.

        ``check`` raises where a weight of a key can no longer be made.
        """
        self.identity, self.check = identity, check
        self._made: weakref.WeakValueDictionary[Hashable, Any] = weakref.WeakValueDictionary()

    def get(self, gm: fx.GraphModule, key: Hashable, make: Callable[[], _Made]) -> _Made:
        made: _Made | None = self._made.get(key)
        if made is None:
            self.check(key)
            self._made[key] = made = make()
        else:
            log.debug("what is made of a weight was taken from another graph of the model")
        held(gm).append(made)
        return made

    def product_key(self, gm: fx.GraphModule, weight: fx.Node, c: Tensor) -> Hashable:
        """As `key`, of the product of a weight and c."""
        return "product", self.key(gm, weight), _contents(c)

    def key(self, gm: fx.GraphModule, node: fx.Node) -> Hashable:
        """What a constant expression computes: equal for two nodes only if they give the same value.

        The expression as a program, a line for each step: an operator and its arguments, or a tensor, which is the model's
        own (known by identity) or one that a pass made (by value).
        """
        lines: dict[Hashable, int] = {}
        known: dict[fx.Node, int] = {}

        def step(n: fx.Node) -> int:
            if n not in known:
                if n.meta.get(FOLD_CAST):
                    known[n] = step(n.args[0])  # type: ignore[arg-type]
                else:
                    line = self._tensor(get_tensor(gm, str(n.target))) if n.op == "get_attr" else call(n)
                    known[n] = lines.setdefault(line, len(lines))
            return known[n]

        def call(n: fx.Node) -> Hashable:
            return "call", n.target, _literal(n.args, step), _literal(n.kwargs, step)

        return "weight", step(node), tuple(lines)

    def _tensor(self, tensor: Tensor) -> Hashable:
        like = tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride()
        source = self.identity(tensor)
        return ("value", *like, _contents(tensor)) if source is None else ("source", *like, source)


def _literal(a: Any, step: Callable[[fx.Node], int]) -> Hashable:
    """An argument with its type: 1, 1.0, True and the result of step 1 are four things."""
    if isinstance(a, fx.Node):
        return "step", step(a)
    if isinstance(a, (list, tuple)):
        return "list", *(_literal(x, step) for x in a)
    if isinstance(a, dict):
        return "dict", *((k, _literal(x, step)) for k, x in sorted(a.items()))
    if isinstance(a, slice):
        return "slice", *(_literal(x, step) for x in (a.start, a.stop, a.step))
    return type(a), repr(a)  # -0.0 is not 0.0, and nan is nan


def held(gm: fx.GraphModule) -> list[Any]:
    """The shared weights a lowered graph holds: keep the list as long as the graph."""
    return about(gm).merged


def _contents(tensor: Tensor) -> bytes:
    """A digest of the values: a tensor that the model's code makes may be large."""
    values = tensor.detach().contiguous().cpu().flatten().view(torch.uint8)
    return hashlib.sha256(values.numpy().data).digest()
