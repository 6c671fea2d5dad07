"""lower_int8_attention: an attention of quantized operands becomes one operator. Reads only the graph; in place.

    %s = sqcompile.int8_scores(%qi, %qs, %ki, %ks, float32)
    %t = mul(%s, 0.25)                                          # scale, soft-cap, masks
    %u = add(%t, %mask)
    %p = sqcompile.attention_weights(%u, float32)               # or int8_attend(%u, %vi, %vs, float32) for these two
    %y = sqcompile.attend(%p, %v)
->                                                              # mask, its blocks, diagonal, scale, soft-cap
    %int8_attention = sqcompile.int8_attention(%qi, %qs, %ki, %ks, %v, None, %mask, None, None, 0.25, 0, float32)

The quantize nodes stay, for the compiler to fuse with what makes q and k (on GPUs `fuse` gives those of q to the
kernel). Masks are made into one, once for all layers that share them; on GPUs a list of their blocks saves reading
those that hold nothing. Scores that anything else happens to stay as they are: correct, in plain operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sqcompile.kernels.ops import sqcompile_ops
from sqcompile.kernels.targets import TargetOf
from sqcompile.passes.attention.scores import SAME, Mask, Scores, numbers, read_scores
from sqcompile.passes.ir.graph import add_op, additive, aten, constants, value
from sqcompile.passes.ir.origin import replace
from sqcompile.passes.lowering.float_attention import listed_mask

_ENDS = {sqcompile_ops.attention_weights.default, sqcompile_ops.int8_attend.default}


def lower_int8_attention(gm: fx.GraphModule, target_of: TargetOf) -> None:
    """Rewrites the attentions that `int8_attention` can do."""
    found: list[tuple[fx.Node, fx.Node, Scores]] = []
    masks: dict[Any, fx.Node] = {}
    listed: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    number = numbers(gm, constants(gm))
    for product in gm.graph.find_nodes(op="call_function", target=sqcompile_ops.int8_scores.default):
        path = _forward(product, _ENDS)
        scores = None if path is None else read_scores(path[:-1], value(product).shape[1], number)
        if path is None or not isinstance(scores, Scores):
            continue
        end = path[-1]
        if end.target != sqcompile_ops.int8_attend.default:
            weights = _forward(end, {sqcompile_ops.attend.default})
            if weights is None:
                continue
            end = weights[-1]
        found.append((end, product, scores))
    # what they share is made before the first of them, and products need not be in the order of what they become
    for end, product, scores in sorted(found, key=lambda f: f[0]):
        q, q_scale, k, k_scale, _ = product.args
        assert isinstance(q, fx.Node)
        v, v_scale = end.args[1:3] if end.target == sqcompile_ops.int8_attend.default else (end.args[1], None)
        diagonal = 0 if any(m.causal for m in scores.masks) else None
        with gm.graph.inserting_before(end):
            mask = _one_mask(gm, scores.masks, value(q).shape[1], masks)
            blocks = None
            if mask is not None and target_of(value(q).device).attention == "triton":
                listed[mask] = listed.get(mask) or listed_mask(gm, mask)
                mask, blocks = listed[mask]
            new = add_op(
                gm, sqcompile_ops.int8_attention.default,
                q, q_scale, k, k_scale, v, v_scale, mask, blocks, diagonal, scores.scale, scores.softcap, value(end).dtype,
            )  # fmt: skip
        replace(gm, end, new)
        gm.graph.erase_node(end)
    gm.graph.eliminate_dead_code()


def _forward(node: fx.Node, ends: set[Any]) -> list[fx.Node] | None:
    """The nodes from one to the first of some targets, each read by the next alone; None if there is no such way."""
    path = [node]
    while len(path[-1].users) == 1:
        path.append(next(iter(path[-1].users)))
        if path[-1].target in ends:
            return path if path[-1].args[0] is path[-2] else None
        if path[0].target in _ENDS and path[-1].target not in SAME:
            return None
    return None


def _one_mask(gm: fx.GraphModule, parts: tuple[Mask, ...], heads: int, made: dict[Any, fx.Node]) -> fx.Node | None:
    """Masks as one that broadcasts to [B, H, Sq, Sk]: bool where it only blocks, else their sum."""
    real = tuple(m for m in parts if m.node is not None)
    if not real:
        return None
    key = tuple((m.node, m.factor, m.fill is None, m.blocked, m.merged) for m in real), heads
    if key not in made:
        total = _as_keep(gm, real[0], heads) if len(real) == 1 else None
        if total is None:
            total = _as_bias(gm, real[0], heads)
            for m in real[1:]:
                total = add_op(gm, aten.add.Tensor, total, _as_bias(gm, m, heads))
        made[key] = total
    return made[key]


def _as_keep(gm: fx.GraphModule, m: Mask, heads: int) -> fx.Node | None:
    """A bool mask that is False where a key is blocked; None for one that is added."""
    node = _apart(gm, m, heads)
    if value(node).dtype != torch.bool:
        return None
    return add_op(gm, aten.logical_not.default, node) if m.blocked else node


def _as_bias(gm: fx.GraphModule, m: Mask, heads: int) -> fx.Node:
    keep = _as_keep(gm, m, heads)
    if keep is not None:
        return additive(gm, keep, torch.float32)
    node = _apart(gm, m, heads)
    return node if m.factor == 1 else add_op(gm, aten.mul.Tensor, node, m.factor)


def _apart(gm: fx.GraphModule, m: Mask, heads: int) -> fx.Node:
    """A mask of scores [B H, Sq, Sk] as one of [B, H, Sq, Sk]."""
    node = m.node
    assert node is not None
    if not m.merged or value(node).dim() < 3:
        return node
    if value(node).shape[0] == 1:
        return add_op(gm, aten.unsqueeze.default, node, 0)
    return add_op(gm, aten.unflatten.int, node, 0, [-1, heads])
