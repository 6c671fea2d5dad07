"""read_scores: what a graph does between QKᵀ and softmax, as a scale, a soft-cap and masks. Analysis only.

    %a = mul(%s, 0.125)
    %b = div(%a, 50)
    %c = tanh(%b)
    %d = mul(%c, 50)
    %e = add(%d, %mask)
->
    Scores(scale=0.125, softcap=50, masks=[Mask(node=%mask)])           # softcap(QKᵀ · scale) + masks
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.kernels.attention_parts import BLOCKED
from sqcompile.kernels.ops import sqcompile_ops
from sqcompile.passes.ir.graph import aten, evaluate, value
from sqcompile.passes.ir.operators import Fact, having
from sqcompile.passes.ir.symbols import statically_known_true
from sqcompile.passes.labels.rules import describe


@dataclass(frozen=True)
class Mask:
    """Something added to scores, or a number put in their place.

    Attributes:
        node: the tensor that is added; or bool, where it is True (``blocked``) or False (not) the scores are replaced.
        factor: of what is added.
        fill: the number put there, None where the tensor is added.
        blocked: which entries of a bool tensor are replaced.
        causal: for `mask_scores`, whether it is causal besides; ``node`` may be None then.
        merged: whether the scores are [B H, Sq, Sk] where this happens.
    """

    node: fx.Node | None
    factor: float = 1.0
    fill: float | None = None
    blocked: bool = False
    causal: bool = False
    merged: bool = False


@dataclass(frozen=True)
class Scores:
    """softcap(QKᵀ · scale) + masks, from the product to the softmax; ``softcap`` is 0 for none."""

    scale: float = 1.0
    softcap: float = 0.0
    masks: tuple[Mask, ...] = ()


# Scores in another shape or dtype, entry by entry the same.
SAME = having(Fact.RESHAPE, Fact.COPY, Fact.CAST, Fact.DROPOUT)


Number = Callable[[Any], float | None]


def numbers(gm: fx.GraphModule, const: set[fx.Node]) -> Number:
    """What reads an operator's argument as a number: one, or a tensor of one that a graph makes, or holds in ``const``."""

    def number(x: Any) -> float | None:
        if isinstance(x, fx.Node) and x.target == aten.full.default and not x.args[0]:
            x = x.args[1]
        elif isinstance(x, fx.Node) and x.target == aten.scalar_tensor.default:
            x = x.args[0]
        elif x in const and isinstance(value(x), Tensor) and value(x).numel() == 1:
            return float(evaluate(gm, x))
        return float(x) if isinstance(x, (int, float)) else None

    return number


def read_scores(path: list[fx.Node], heads: int, number: Number) -> Scores | str:
    """What the nodes from a product (the first) to the scores (the last) do; or, in words, what one of them does else.

    ``heads`` is H where scores are [B, H, Sq, Sk] or [B H, Sq, Sk]: masks are read in these two shapes. ``number`` reads
    the graph's numbers (`numbers`).
    """
    scores, inner = Scores(), None  # inner: the factor in a tanh just passed; softcap · tanh(QKᵀ · inner)
    for before, node in itertools.pairwise(path):
        if node.target in SAME:
            if not value(node).dtype.is_floating_point:
                return f"its scores are cast to {value(node).dtype}"
            continue
        factor = _factor(before, node, number)
        if inner is not None:
            softcap = 1.0 if factor is None else factor
            scores, inner = replace(scores, softcap=softcap, scale=inner * softcap), None
            if softcap <= 0:
                return "its scores are capped by a negative number"
        elif factor is not None:
            if scores.softcap:
                return "its scores are scaled after a soft-cap"
            if any(m.fill is not None or m.causal for m in scores.masks):
                return "its scores are scaled after a mask"
            masks = tuple(replace(m, factor=m.factor * factor) for m in scores.masks)
            scores = replace(scores, scale=scores.scale * factor, masks=masks)
        if factor is None:
            if node.target == aten.tanh.default:
                if scores.masks or scores.softcap:
                    return "its scores pass tanh twice, or after a mask"
                inner = scores.scale
                continue
            mask = _mask(before, node, number)
            if mask is None:
                return f"one of its scores {describe(node)}"
            if not _by_head(path[0], node, heads):
                return "its scores are masked in another shape"
            scores = replace(scores, masks=(*scores.masks, mask))
    if inner is not None:
        scores = replace(scores, softcap=1.0, scale=inner)
    return scores if scores.scale >= 0 else "its scores are scaled by a negative number"


def _by_head(product: fx.Node, node: fx.Node, heads: int) -> bool:
    """Whether a node holds the scores of a product, no more of them, as [B, H, Sq, Sk] or [B H, Sq, Sk]."""
    *batch, queries, keys = value(node).shape
    *whole, sq, sk = value(product).shape
    if len(batch) not in (1, 2) or (len(batch) == 2 and batch[1] != heads):
        return False
    same = (math.prod(batch) == math.prod(whole), queries == sq, keys == sk)
    return all(statically_known_true(x) for x in same)


def _factor(x: fx.Node, node: fx.Node, number: Number) -> float | None:
    """c, where a node is x · c for a number c."""
    if node.target in (aten.mul.Tensor, aten.mul.Scalar):
        other = node.args[1] if node.args[0] is x else node.args[0]
        return number(other)
    if node.target in (aten.div.Tensor, aten.div.Scalar) and node.args[0] is x and not node.kwargs:
        c = number(node.args[1])
        return 1.0 / c if c else None
    return None


def _mask(x: fx.Node, node: fx.Node, number: Number) -> Mask | None:
    """What a node does to the scores x, where it adds a tensor or blocks keys."""
    t, args, merged = node.target, node.args, value(node).dim() == 3
    if t in (aten.add.Tensor, aten.sub.Tensor):
        other = args[1] if args[0] is x else args[0]
        alpha: Any = node.kwargs.get("alpha", 1)
        if not isinstance(other, fx.Node) or other is x or (args[0] is not x and (alpha != 1 or t == aten.sub.Tensor)):
            return None
        if not isinstance(value(other), Tensor) or not value(other).dtype.is_floating_point:
            return None  # a bool mask that is added is none that blocks keys
        return Mask(other, float(alpha) * (-1 if t == aten.sub.Tensor else 1), merged=merged)
    if t == sqcompile_ops.mask_scores.default:
        return Mask(args[1], causal=args[2] is not None)  # type: ignore[arg-type]
    if t in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        keys, fill, blocked = args[1], args[2], True
    elif t in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf):
        keys, blocked = args[0], args[2] is x
        fill = args[1] if blocked else args[2]
    else:
        return None
    filled = number(fill)
    if filled is None or filled > BLOCKED or not isinstance(keys, fx.Node) or value(keys).dtype != torch.bool:
        return None
    return Mask(keys, fill=filled, blocked=blocked, merged=merged)
