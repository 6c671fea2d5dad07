"""lower_attention: attention that reads its mask and its shared heads once. Reads only the graph.

    %k5 = unsqueeze(%k, 2)                                      # each key head repeated twice
    %kw = expand(%k5, [2, 2, 2, 5, 16])
    %k4 = reshape(%kw, [2, 4, 5, 16])
    %y = scaled_dot_product_attention(%q, %k4, %v4, %mask)
->                                                              # on a CPU
    %where = where(%mask, %scalar_tensor, %scalar_tensor_1)     # 0 or -inf
    %stored = sqcompile.stored(%where)                          # once for all layers
    %mask_kind = sqcompile.mask_kind(%stored)
    %attention = sqcompile.attention(%q, %k, %v, %stored, %mask_kind, False, None)
->                                                              # on a GPU, in half precision
    %aligned_mask = sqcompile.aligned_mask(%mask)               # once for all layers
    %mask_blocks = sqcompile.mask_blocks(%aligned_mask)
    %attention = sqcompile.attention(%q, %k, %v, %aligned_mask, %mask_blocks, False, None)

On a CPU, the angles of a rotary embedding and the mask are read by every head of every layer; Inductor would fuse their
computation into each of those readers and repeat it. They are stored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sqcompile.kernels.ops import sqcompile_ops
from sqcompile.kernels.targets import Target, TargetOf
from sqcompile.passes.attention.heads import head_count, same_batch, unrepeated_pair
from sqcompile.passes.ir.graph import add_op, additive, arguments, aten, value
from sqcompile.passes.ir.origin import replace
from sqcompile.passes.ir.symbols import statically_known_true

WIDEST = 256  # head size of the kernel for GPUs


def lower_attention(gm: fx.GraphModule, target_of: TargetOf) -> None:
    """Rewrites attentions, and for CPUs rotary angles, in place."""
    masks: dict[tuple[fx.Node, torch.dtype], tuple[fx.Node, fx.Node]] = {}
    for node in gm.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        if value(node).dim() == 4:
            _lower_one(gm, node, masks, target_of(value(node).device))
    for target in (aten.cos.default, aten.sin.default):
        for node in gm.graph.find_nodes(op="call_function", target=target):
            if target_of(value(node).device).device == "cpu":
                with gm.graph.inserting_after(node):
                    stored = add_op(gm, sqcompile_ops.stored.default, node)
                node.replace_all_uses_with(stored, delete_user_cb=lambda user, stored=stored: user is not stored)


def _lower_one(
    gm: fx.GraphModule,
    node: fx.Node,
    masks: dict[tuple[fx.Node, torch.dtype], tuple[fx.Node, fx.Node]],
    target: Target,
) -> None:
    args = arguments(node)
    q, k, v, mask = args["query"], args["key"], args["value"], args["attn_mask"]
    gpu = target.attention == "triton"
    if args["dropout_p"] or target.attention is None or (gpu and not _fits_gpu(args)):
        return
    if head_count(k) != head_count(q) and not args["enable_gqa"]:
        return  # heads broadcast: left to torch
    once = unrepeated_pair(k, v)
    if gpu and mask is None and (once == (k, v) or not _flash_fits(args)):
        return
    k, v = once
    heads = [head_count(x) for x in (q, k, v)]
    if None in heads or heads[1] != heads[2] or not same_batch(q, k, v):
        return
    about = None
    if mask is not None:
        key = mask, value(q).dtype
        if key not in masks:
            with gm.graph.inserting_before(node):  # the first attention in graph order
                masks[key] = listed_mask(gm, mask) if gpu else _stored_mask(gm, mask, value(q).dtype)
        mask, about = masks[key]
    with gm.graph.inserting_before(node):
        if gpu and mask is None:
            rest = {"is_causal": args["is_causal"], "scale": args["scale"], "enable_gqa": True}
            new = add_op(gm, aten.scaled_dot_product_attention.default, q, k, v, **rest)
        else:
            new = add_op(gm, sqcompile_ops.attention.default, q, k, v, mask, about, args["is_causal"], args["scale"])
    replace(gm, node, new)
    gm.graph.erase_node(node)


def _fits_gpu(args: dict[str, Any]) -> bool:
    """Whether our kernel takes an attention: operands of one half precision, heads of up to 256."""
    q, k, v = (value(args[name]) for name in ("query", "key", "value"))
    half = q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16)
    small = all(isinstance(x.shape[3], int) and x.shape[3] <= WIDEST for x in (q, v))
    return half and small and (args["scale"] is None or args["scale"] >= 0)


def _flash_fits(args: dict[str, Any]) -> bool:
    """Whether PyTorch's flash attention, which reads shared heads as they are, takes one without a mask."""
    q, k, v = (value(args[name]) for name in ("query", "key", "value"))
    square = not args["is_causal"] or statically_known_true(q.shape[2] == k.shape[2])
    return square and k.shape[3] == v.shape[3] and k.shape[3] % 8 == 0


def listed_mask(gm: fx.GraphModule, mask: fx.Node) -> tuple[fx.Node, fx.Node]:
    """A mask as the kernel for GPUs reads it, and the list of its blocks."""
    mask = add_op(gm, sqcompile_ops.aligned_mask.default, mask)
    return mask, add_op(gm, sqcompile_ops.mask_blocks.default, mask)


def _stored_mask(gm: fx.GraphModule, mask: fx.Node, dtype: torch.dtype) -> tuple[fx.Node, fx.Node]:
    """The mask as an additive one, and its kind."""
    if value(mask).dtype == torch.bool:
        mask = additive(gm, mask, dtype)
    bias = add_op(gm, sqcompile_ops.stored.default, mask)
    return bias, add_op(gm, sqcompile_ops.mask_kind.default, bias)
