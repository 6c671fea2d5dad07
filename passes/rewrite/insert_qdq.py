"""insert_qdq: INT8 values, float arithmetic. The reference for everything below it, on any device.

    %q = linear(%x, %wq, %b)
    %k = linear(%x, %wk)
->
    %token_scale = sqcompile.token_scale(%x)                # or tensor_scale(%x)
    %quantize = sqcompile.quantize(%x, %token_scale)        # int8, shared by every linear that reads %x
    %to = to(%quantize, float32)
    %to_1 = to(%wq_int8, float32)
    %linear = linear(%to, %to_1)
    %dequantize = sqcompile.dequantize(%linear, %token_scale, %wq_scale, %b, float32)
    %to_2 = to(%wk_int8, float32)
    %linear_1 = linear(%to, %to_2)
    %dequantize_1 = sqcompile.dequantize(%linear_1, %token_scale, %wk_scale, None, float32)

With a static scale, which rows that are not finite do not change, they come out as NaN by a factor of their own:

    %finite_rows = sqcompile.finite_rows(%x)                # 1, or NaN where the row of %x is not finite
    %quantize = sqcompile.quantize(%x, %wq_input_scale)     # calibrated
    %mul = mul(%wq_scale, %wq_input_scale)
    %dequantize = sqcompile.dequantize(%linear, %finite_rows, %mul, %b, float32)

The scales come out of the product, Y = Δx Δw (X̂ Ŵᵀ), so that %linear is a sum of integers: exact in float32 up to 2^24,
and a kernel that sums in int32 gives the same result to the bit, not one that rounds the next quantization elsewhere.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, fx

from sqcompile.kernels.cpu.rows import quantize as quantize_rows
from sqcompile.kernels.ops import sqcompile_ops
from sqcompile.kernels.qtypes import INT8, QType
from sqcompile.kernels.reference import quantize, weight_scale
from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import (
    Linear,
    add_op,
    add_tensor,
    aten,
    clone,
    effective_weight,
    find_linears,
    finish,
    linear_operands,
    nodes_by_name,
    row_parts,
    set_tensor,
    value,
)
from sqcompile.passes.ir.origin import PLANNED
from sqcompile.passes.ir.record import substitute
from sqcompile.passes.ir.rows import Rows, rows_of
from sqcompile.passes.planning.finite import check_tensor
from sqcompile.passes.rewrite.insert_qdq_attention import quantize_attention
from sqcompile.passes.rewrite.shift import before_cast
from sqcompile.passes.rewrite.weight_store import Lazy, Shared
from sqcompile.plan.entries import LayerPlan
from sqcompile.plan.plan import Plan
from sqcompile.process.memory import release_freed_memory
from sqcompile.process.progress import each

_PART = 2**18  # values of a weight that are quantized at a time: what is made of them stays in a processor's cache


def insert_qdq(gm: fx.GraphModule, plan: Plan, shared: Shared | None = None, lazy: bool = False) -> fx.GraphModule:
    """Quantizes the plan's attentions (`quantize_attention`) and linears.

    Weights are quantized from their float32 folded value, one at a time. The result holds int8 [N, K] and float32
    scales [N] ([1] per tensor) under ``<weight name>_int8`` and ``_scale``, and no float copy of them. Experts have a
    scale per expert and output channel: int8 [E, N, K] and float32 [E, N] ([E, 1] per tensor).

    With ``shared`` or ``lazy``, weights are quantized when somebody asks for them, such as `lower`: until then the graph
    holds tensors without data (on the meta device), and ``About.lazy`` says by their names how they are made.
    """
    folded, gm = gm, clone(gm)
    quantize_attention(gm, plan)
    inserter = _Inserter(gm, plan, folded, shared, lazy)
    layers = {l.name: l for l in plan.layers if l.quantized}
    # Match first: once a weight is quantized, its graph has other linears.
    for linear in each(find_linears(gm), "quantize"):
        if linear.name in layers:
            inserter.linear(linear, layers[linear.name])
            release_freed_memory()
    return finish(gm)


def quantize_weights(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph of lazy weights that is run as it is, without `lower`: its weights are quantized now. In place."""
    for name, lazy in each([*about(gm).lazy.items()], "quantize"):
        for of, tensor in zip((name, *lazy.beside), lazy.make(), strict=True):
            set_tensor(gm, of, tensor)
    about(gm).lazy.clear()
    return gm


class _Inserter:
    def __init__(
        self, gm: fx.GraphModule, plan: Plan, folded: fx.GraphModule, shared: Shared | None, lazy: bool
    ) -> None:
        self.gm, self.plan, self.folded, self.shared, self.lazy = gm, plan, folded, shared, lazy
        self.nodes, self.folded_nodes = nodes_by_name(gm), nodes_by_name(folded)
        self.qtype = plan.recipe.qtype
        self.inputs: dict[tuple[str, str, float | None], tuple[fx.Node, fx.Node, fx.Node | None]] = {}

    def linear(self, linear: Linear, layer: LayerPlan) -> None:
        node = self.nodes[linear.node]
        x, _, bias = linear_operands(node)
        x_float, x_scale, static = self._input(x, layer)
        name = linear.name.replace("#", "_use")
        per_channel = (layer.weight or self.plan.recipe.weight) == "per_channel"
        with self.gm.graph.inserting_before(node):
            w_int8, w_scale = self._operands(linear, name, per_channel)
            bias = None if bias is None else before_cast(bias)  # a shifted one is added in float32
            if static is not None:
                w_scale = add_op(self.gm, aten.mul.Tensor, w_scale, static)
            w_float = add_op(self.gm, aten.to.dtype, w_int8, torch.float32)
            if linear.experts:
                offsets, dequantize = node.args[2], sqcompile_ops.grouped_dequantize.default
                acc = add_op(self.gm, sqcompile_ops.grouped_linear.default, x_float, w_float, offsets)
                y = add_op(self.gm, dequantize, acc, x_scale, w_scale, offsets, value(node).dtype)
            else:
                acc = add_op(self.gm, aten.linear.default, x_float, w_float)
                y = add_op(self.gm, sqcompile_ops.dequantize.default, acc, x_scale, w_scale, bias, value(node).dtype)
        y.meta[PLANNED] = linear.name
        substitute(self.gm, node, y)
        self.gm.graph.erase_node(node)

    def _operands(self, linear: Linear, name: str, per_channel: bool) -> tuple[fx.Node, fx.Node]:
        whole = self._whole(linear, per_channel)
        make = partial(quantized_weight, self.folded, linear, self.folded_nodes, per_channel, self.qtype, whole)
        if self.shared is None and not self.lazy:
            q, scale = make()
            return add_tensor(self.gm, f"{name}_{self.qtype.name}", q), add_tensor(self.gm, f"{name}_scale", scale)
        weight = self.nodes[linear.weight]
        rows = (*linear.shape[:-2], linear.out_features if per_channel else 1)
        w_int8 = _stand_in(self.gm, f"{name}_{self.qtype.name}", linear.shape, self.qtype.dtype, value(weight).device)
        w_scale = _stand_in(self.gm, f"{name}_scale", rows, torch.float32, value(weight).device)
        key = None if self.shared is None else (self.qtype.name, per_channel, self.shared.key(self.gm, weight))
        about(self.gm).lazy[str(w_int8.target)] = Lazy(key, make, (str(w_scale.target),))
        return w_int8, w_scale

    def _whole(self, linear: Linear, per_channel: bool) -> Tensor | None:
        """The scales of the whole weight of which a shard has a part of each row; None where its own are those.

        Now, and not when the weight is made: then another process may have no need of it.
        """
        parallel, known = about(self.folded).parallel, about(self.folded).whole
        dim = parallel.dim(linear.name)
        if dim is None or (dim == 0 and per_channel):
            return None
        if known is not None and linear.name in known:
            return known[linear.name]
        rows = rows_of(self.folded, self.folded_nodes[linear.weight])
        parts = row_parts(torch.empty(linear.shape, device="meta"))
        scales = parallel.largest(_scales(rows, parts, per_channel, self.qtype))
        if known is not None:
            known[linear.name] = scales
        return scales

    def _input(self, x: fx.Node, layer: LayerPlan) -> tuple[fx.Node, fx.Node, fx.Node | None]:
        """The quantized input as float32 integers, the factor of its rows, and Δ where it is static; made once for each."""
        x = before_cast(x)  # quantize the float32 product x·(1/s), not its rounding to the model's dtype
        activation = layer.activation or self.plan.recipe.activation
        key = (x.name, activation, layer.input_scale)
        if key not in self.inputs:
            after = x.next
            while after.op == "placeholder":
                after = after.next
            with self.gm.graph.inserting_before(after):
                # what the operators take for granted is not said
                q_max, dtype = ((), ()) if self.qtype is INT8 else ((self.qtype.q_max,), (0, self.qtype.dtype))
                static = None
                if layer.input_scale is not None:
                    constant = torch.tensor(layer.input_scale, dtype=torch.float32, device=value(x).device)
                    static = add_tensor(self.gm, f"{layer.name}_input_scale", constant)
                    scale = add_op(self.gm, sqcompile_ops.finite_rows.default, x)
                elif activation == "per_token":
                    scale = add_op(self.gm, sqcompile_ops.token_scale.default, x, *q_max)
                else:
                    scale = add_op(self.gm, sqcompile_ops.tensor_scale.default, x, *q_max)
                q = add_op(self.gm, sqcompile_ops.quantize.default, x, scale if static is None else static, *dtype)
                self.inputs[key] = add_op(self.gm, aten.to.dtype, q, torch.float32), scale, static
        return self.inputs[key]


def _stand_in(
    gm: fx.GraphModule, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> fx.Node:
    """A get_attr node for a tensor that is not there yet. Call inside ``graph.inserting_before``."""
    return add_tensor(gm, name, torch.empty(shape, dtype=dtype, device="meta"), device)


def quantized_weight(
    folded: fx.GraphModule,
    linear: Linear,
    nodes: dict[str, fx.Node],
    per_channel: bool,
    qtype: QType,
    whole: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """int8 [N, K] and float32 [N], or [1] per tensor; for experts, each a tensor of its own, with a leading [E].

    Args:
        folded: the graph before quantization; ``nodes`` are its nodes by name.
        linear: one of its linears.
        per_channel: whether each row has a scale of its own.
        qtype: the number format.
        whole: the scales, float32 [N, 1] or [1, 1], where those of this weight alone would not do: it is a shard.

    Raises:
        WeightError: for a weight that is not finite.
    """
    rows = rows_of(folded, nodes[linear.weight])
    device = value(nodes[linear.weight]).device
    q = torch.empty(linear.shape, dtype=qtype.dtype, device=device)
    if not linear.experts:
        scale = _quantize_weight(rows, q, per_channel, qtype, whole)
    else:
        scales = []
        for e, out in enumerate(q):
            matrix = rows(slice(e, e + 1))[0]
            scales.append(_quantize_weight(partial(torch.Tensor.__getitem__, matrix), out, per_channel, qtype))
        scale = torch.stack(scales)
    if not bool(scale.isfinite().all()):
        check_tensor(effective_weight(folded, linear, nodes), linear.name.partition("#")[0])
    return q, scale


def _quantize_weight(rows: Rows, out: Tensor, per_channel: bool, qtype: QType, whole: Tensor | None = None) -> Tensor:
    """Fills ``out`` [N, K] with the values of rows of a weight, and gives the scales, float32 [N] or [1]; ``whole``: [N, 1]."""
    parts = row_parts(out, _PART)  # no float copy of the weight
    if per_channel and whole is None:
        scales = []
        for p in parts:
            w = rows(p)
            if qtype is INT8 and (found := quantize_rows(w)) is not None:  # in one pass over memory
                out[p], scale = found
            else:
                scale = weight_scale(w.float(), True, qtype.q_max)
                _round_into(out[p], w, scale, qtype)
            scales.append(scale)
        return torch.cat(scales).flatten()
    scale = _scales(rows, parts, per_channel, qtype) if whole is None else whole
    for p in parts:
        _round_into(out[p], rows(p), scale[p] if per_channel else scale, qtype)
    return scale.flatten()


def _scales(rows: Rows, parts: list[slice], per_channel: bool, qtype: QType) -> Tensor:
    """The scales of a weight: float32 [N, 1], or [1, 1] per tensor."""
    scales = torch.cat([weight_scale(rows(p).float(), True, qtype.q_max) for p in parts])
    return scales if per_channel else scales.amax(dim=0, keepdim=True)


def _round_into(out: Tensor, w: Tensor, scale: Tensor, qtype: QType) -> None:
    """`quantize` of some rows w, written to ``out``. Where a scale is not finite, so that the weight is refused, any value."""
    if qtype is INT8:  # with half the passes over memory
        out.copy_(w.float().mul(scale.reciprocal()).round_().clamp_(-qtype.q_max, qtype.q_max))
    else:
        out.copy_(quantize(w, scale, dtype=qtype.dtype))
