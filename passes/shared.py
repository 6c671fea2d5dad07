"""shared: INT8 weights that several graphs of one model hold once. A graph knows a weight by what it is made of.

Two graphs of a model (prefill and decode, or the parts between graph breaks) have the same linears. The first makes
their INT8 weights, the second finds them, and needs no float weight for it: so the float model may be freed between.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from sqcompile.passes.graph import FOLD_CAST, get_tensor


@dataclass(frozen=True, eq=False)
class Merged:
    """The INT8 weight of linears that share an input.

    Attributes:
        w: int8 [N, K], the rows of all linears; packed for the CPU's kernels where it has some. For experts int8
            [E, N, K], or one packed [N, K] each.
        scale: float32 [N], or [E, N].
        row_sum: int32 [N] or [E, N] beside a packed weight, else None.
    """

    w: Tensor | list[Tensor]
    scale: Tensor
    row_sum: Tensor | None = None


@dataclass(frozen=True)
class Lazy:
    """A weight that is not quantized yet.

    Attributes:
        key: says which float tensors it is made of, and how.
        make: gives int8 [N, K] or [E, N, K] and its float32 scales (see `insert_qdq`).
        scale: under which name the graph holds the scales.
    """

    key: Hashable
    make: Callable[[], tuple[Tensor, Tensor]]
    scale: str


class Shared:
    """Weights by what they are made of. An entry lives as long as a graph that holds it (see `held`)."""

    def __init__(self, identity: Callable[[Tensor], Hashable], check: Callable[[Hashable], None]) -> None:
        """``identity`` says which tensor of the model a tensor is, and None for one that a pass made.

        ``check`` raises where a weight of a key can no longer be made.
        """
        self.identity, self.check = identity, check
        self._made: weakref.WeakValueDictionary[Hashable, Merged] = weakref.WeakValueDictionary()

    def get(self, gm: fx.GraphModule, key: Hashable, make: Callable[[], Merged]) -> Merged:
        merged = self._made.get(key)
        if merged is None:
            self.check(key)
            self._made[key] = merged = make()
        held(gm).append(merged)
        return merged

    def key(self, gm: fx.GraphModule, node: fx.Node) -> Hashable:
        """What a constant expression is made of: parameters by identity, what passes added by value."""
        if node.meta.get(FOLD_CAST):
            node = node.args[0]  # type: ignore[assignment]
        if node.op == "get_attr":
            tensor = get_tensor(gm, str(node.target))
            known = self.identity(tensor)
            return known if known is not None else (tuple(tensor.shape), _contents(tensor))
        inputs = tuple(self.key(gm, n) for n in node.all_input_nodes)
        other = fx.node.map_arg((node.args, node.kwargs), lambda n: node.all_input_nodes.index(n))
        return str(node.target), repr(other), inputs


def held(gm: fx.GraphModule) -> list[Merged]:
    """The shared weights a lowered graph holds: keep the list as long as the graph."""
    return gm.meta.setdefault("merged", [])


def _contents(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()
