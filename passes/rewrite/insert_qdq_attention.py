"""quantize_attention: QKᵀ and PV of INT8 values, float arithmetic; the part of insert_qdq for attentions. In place.

    %kt = transpose(%k, -2, -1)
    %s = matmul(%q, %kt)
    %t = mul(%s, 0.25)                                      # scale, masks: the graph's own nodes
    %p = softmax(%t, -1)
    %y = matmul(%p, %v)
->                                                          # "qk_pv"
    %token_scale = sqcompile.token_scale(%q)                # or per head, or per tensor
    %quantize = sqcompile.quantize(%q, %token_scale)
    %token_scale_1 = sqcompile.token_scale(%k)              # of k less its mean, where that helps
    %quantize_1 = sqcompile.quantize(%k, %token_scale_1)
    %int8_scores = sqcompile.int8_scores(%quantize, %token_scale, %quantize_1, %token_scale_1, float32)
    %t = mul(%int8_scores, 0.25)
    %scale_over = sqcompile.scale_over(%v, [-2])
    %quantize_2 = sqcompile.quantize(%v, %scale_over)
    %int8_attend = sqcompile.int8_attend(%t, %quantize_2, %scale_over, float32)
->                                                          # "qk": PV as it was
    %attention_weights = sqcompile.attention_weights(%t, float32)
    %attend = sqcompile.attend(%attention_weights, %v)
->                                                          # with calibrated scales
    %quantize = sqcompile.quantize(%q, %p.query_scale)
    %finite_rows = sqcompile.finite_rows(%q)                # finite_heads of k and v
    %mul = mul(%finite_rows, %p.query_scale)

Where the plan multiplies s explicitly, %q and %k are multiplied first; the product is not rounded to their dtype.
scaled_dot_product_attention is spelled out first, in float32. Key heads are not repeated, and a row that sees no key
gives zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sqcompile.kernels.ops import sqcompile_ops
from sqcompile.passes.attention.chains import Attention, find_attentions
from sqcompile.passes.ir.graph import add_op, add_tensor, arguments, aten, nodes_by_name, value
from sqcompile.passes.ir.origin import PLANNED
from sqcompile.passes.ir.record import substitute
from sqcompile.passes.ir.symbols import statically_known_true
from sqcompile.plan.entries import AttentionPlan
from sqcompile.plan.plan import Plan


def quantize_attention(gm: fx.GraphModule, plan: Plan) -> None:
    """Quantizes the plan's attentions."""
    plans = {p.name: p for p in plan.attention if p.quantized != "none"}
    attentions, nodes = find_attentions(gm) if plans else [], nodes_by_name(gm)
    for a in attentions:
        if a.name in plans:
            _Inserter(gm, plan, a, plans[a.name], nodes).run()


class _Inserter:
    def __init__(
        self, gm: fx.GraphModule, plan: Plan, a: Attention, how: AttentionPlan, nodes: dict[str, fx.Node]
    ) -> None:
        self.gm, self.plan, self.a, self.how, self.nodes = gm, plan, a, how, nodes

    def run(self) -> None:
        a, product, output = self.a, self.nodes[self.a.product], self.nodes[self.a.output]
        whole = product is output
        with self.gm.graph.inserting_before(product):
            q, k = self._four(a.q), self._four(a.k)
            if self._cached(k) is None:  # INT8 keys of a cache are what they are
                if self.how.smoothing == "multiplied":
                    q = self._with_constant(aten.mul.Tensor, q, "query_by")
                    k = self._with_constant(aten.mul.Tensor, k, "key_by")
                k = self._with_constant(aten.sub.Tensor, k, "key_mean")
            q, q_scale = self._quantize(q, self.how.q_scale, "query_scale", sqcompile_ops.finite_rows.default)
            k, k_scale = self._quantize(k, self.how.k_scale, "key_scale", sqcompile_ops.finite_heads.default)
            dtype = torch.float32 if whole else value(product).dtype
            scores = add_op(self.gm, sqcompile_ops.int8_scores.default, q, q_scale, k, k_scale, dtype)
            if whole:
                scores = self._scaled_and_masked(scores, product)
            elif value(product).dim() == 3:
                scores = add_op(self.gm, aten.flatten.using_ints, scores, 0, 1)
        if whole:
            with self.gm.graph.inserting_before(output):
                self._replace(output, self._attend(scores, None, output))
            return
        substitute(self.gm, product, scores)
        softmax = self.nodes[a.softmax]
        masked = softmax.args[0]
        assert isinstance(masked, fx.Node)
        with self.gm.graph.inserting_before(softmax):
            weights = add_op(self.gm, sqcompile_ops.attention_weights.default, masked, value(softmax).dtype)
        substitute(self.gm, softmax, weights)
        with self.gm.graph.inserting_before(output):
            p = output.args[0]
            assert isinstance(p, fx.Node)
            self._replace(output, self._attend(masked, p, output))
        for node in (softmax, product):
            if not node.users:
                self.gm.graph.erase_node(node)

    def _four(self, name: str) -> fx.Node:
        """An operand as [B, H, S, D]."""
        x = self.nodes[name]
        if name == self.a.k and self.a.transposed:
            x = add_op(self.gm, aten.transpose.int, x, -1, -2)
        return self._apart(x)

    def _with_constant(self, operator: Any, x: fx.Node, name: str) -> fx.Node:
        """x [B, H, S, D] times or less a tensor [H, D] of the plan, if it has one."""
        tensor = self.plan.heads.get(f"{self.a.name}/{name}")
        if tensor is None:
            return x
        constant = add_tensor(self.gm, f"{self.a.name}.{name}", tensor[:, None].to(value(x).device))
        return add_op(self.gm, operator, x, constant)

    def _quantize(self, x: fx.Node, static: float | None, name: str, finite: Any) -> tuple[fx.Node, fx.Node]:
        """int8 x and its scale; a static one is NaN where ``finite`` says so."""
        granularity = self.plan.recipe.granularity
        if static is None and (cached := self._cached(x)):
            return cached
        if static is not None:
            constant = torch.tensor(static, dtype=torch.float32, device=value(x).device)
            return self._static(x, add_tensor(self.gm, f"{self.a.name}.{name}", constant), finite)
        if granularity == "per_token":
            scale = add_op(self.gm, sqcompile_ops.token_scale.default, x)
        elif granularity == "per_head":
            scale = add_op(self.gm, sqcompile_ops.scale_over.default, x, [-2, -1])
        else:
            scale = add_op(self.gm, sqcompile_ops.tensor_scale.default, x)
        return add_op(self.gm, sqcompile_ops.quantize.default, x, scale), scale

    def _static(self, x: fx.Node, scale: fx.Node, finite: Any) -> tuple[fx.Node, fx.Node]:
        q = add_op(self.gm, sqcompile_ops.quantize.default, x, scale)
        return q, add_op(self.gm, aten.mul.Tensor, add_op(self.gm, finite, x), scale)

    def _cached(self, x: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """Values and scales of x where it comes from a cache in INT8 (`sqcompile.capture.kv_cache`) that can be read as it is."""
        if self.plan.recipe.granularity != "per_token":
            return None
        if x.target == sqcompile_ops.dequantize_tokens.default:
            return x.args[0], x.args[1]  # type: ignore[return-value]
        if x.target != aten.slice.Tensor or arguments(x)["dim"] in (-1, value(x).dim() - 1):
            return None
        whole = self._cached(x.args[0])  # type: ignore[arg-type]
        if whole is None:
            return None
        q, scale = (add_op(self.gm, aten.slice.Tensor, part, *x.args[1:]) for part in whole)
        return q, scale

    def _scaled_and_masked(self, scores: fx.Node, node: fx.Node) -> fx.Node:
        """What scaled_dot_product_attention does before its softmax."""
        args = arguments(node)
        scale = self.a.width**-0.5 if args["scale"] is None else args["scale"]
        scores = add_op(self.gm, aten.mul.Tensor, scores, scale)
        mask = args["attn_mask"]
        if mask is None and not args["is_causal"]:
            return scores
        if mask is not None and value(mask).dim() == 3:
            shared = value(node).dim() == 4 or statically_known_true(value(mask).shape[0] == 1)
            mask = add_op(self.gm, aten.unsqueeze.default, mask, 0) if shared else self._apart(mask)
        return add_op(self.gm, sqcompile_ops.mask_scores.default, scores, mask, 0 if args["is_causal"] else None)

    def _attend(self, masked: fx.Node, p: fx.Node | None, output: fx.Node) -> fx.Node:
        """P V in float, or of INT8 values; ``p`` are the graph's own weights, None where it spells none out."""
        v, dtype = self._four(self.a.v), value(output).dtype
        if self.how.quantized == "qk":
            if p is None:
                p = add_op(self.gm, sqcompile_ops.attention_weights.default, masked, torch.float32)
                p = p if dtype == torch.float32 else add_op(self.gm, aten.to.dtype, p, dtype)
            y = add_op(self.gm, sqcompile_ops.attend.default, self._apart(p), v)
        else:
            static = self.plan.heads.get(f"{self.a.name}/value_scale")
            if static is None:
                scale = add_op(self.gm, sqcompile_ops.scale_over.default, v, [-2])
                quantized = add_op(self.gm, sqcompile_ops.quantize.default, v, scale)
            else:
                scale = add_tensor(self.gm, f"{self.a.name}.value_scale", static[:, None].to(value(v).device))
                quantized, scale = self._static(v, scale, sqcompile_ops.finite_heads.default)
            y = add_op(self.gm, sqcompile_ops.int8_attend.default, self._apart(masked), quantized, scale, dtype)
        y.meta[PLANNED] = self.a.name
        return add_op(self.gm, aten.flatten.using_ints, y, 0, 1) if value(output).dim() == 3 else y

    def _apart(self, x: fx.Node) -> fx.Node:
        """[B H, ., .] as [B, H, ., .]."""
        return add_op(self.gm, aten.unflatten.int, x, 0, [-1, self.a.heads]) if value(x).dim() == 3 else x

    def _replace(self, old: fx.Node, new: fx.Node) -> None:
        substitute(self.gm, old, new)
        self.gm.graph.erase_node(old)
        self.nodes[old.name] = new  # another attention may read it
