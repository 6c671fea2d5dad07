"""fold: smoothing scales go into the graph; the float function stays the same.

    (X·diag(1/s)) (diag(s)·Wᵀ) = X·Wᵀ

    %n = layer_norm(%x, [4], %g, %b)
    %q = linear(%n, %wq)
    %k = linear(%n, %wk)
->
    %div = div(%g, %smooth_0)                               # s
    %div_1 = div(%b, %smooth_0_bias)
    %n = layer_norm(%x, [4], %div, %div_1)
    %mul = mul(%wq, %smooth_0_columns)
    %q = linear(%n, %mul)
    %mul_1 = mul(%wk, %smooth_0_columns_2)
    %k = linear(%n, %mul_1)

Parameters are not written to: a folded parameter is an expression over the old one, so one that is shared or tied is
changed for the site alone. Where nothing absorbs 1/s, it stands explicitly before the balance layers:

    %y = linear(%x, %w)
->
    %mul = mul(%x, %smooth_0)                               # 1/s
    %mul_1 = mul(%w, %smooth_0_columns)
    %y = linear(%mul, %mul_1)

What a plan takes off inputs goes before (`shift`). A linear's input is rotated where the plan says so, and its weight with
it: H is its own inverse (`kernels.rotation`).

    %y = linear(%x, %w)
->
    %rotate = sqcompile.rotate(%x, 16)
    %rotate_1 = sqcompile.rotate(%w, 16)
    %y = linear(%rotate, %rotate_1)

Scales of attentions' head channels multiply what makes the queries and divide what makes the keys (`head_sites`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.errors import PlanError
from sqcompile.kernels.ops import sqcompile_ops
from sqcompile.passes.attention.head_sites import HeadSite
from sqcompile.passes.ir.graph import (
    Linear,
    add_op,
    add_tensor,
    aten,
    clone,
    constants,
    evaluate,
    find_linears,
    finish,
    first_leaf,
    linear_operands,
    nodes_by_name,
    value,
)
from sqcompile.passes.labels.interpreter import vector_operand
from sqcompile.passes.labels.match import Site
from sqcompile.passes.labels.shiftable import Shiftable
from sqcompile.passes.rewrite.shift import (
    before_cast,
    check_shifts,
    fold_cast,
    give_weight,
    groups_of,
    in_dtype,
    shift_biases,
    shift_inputs,
)
from sqcompile.passes.rewrite.weight_store import Shared
from sqcompile.plan.plan import Plan


def fold(
    gm: fx.GraphModule,
    sites: list[Site],
    plan: Plan,
    heads: Sequence[HeadSite] = (),
    norms: Sequence[Shiftable] = (),
    shared: Shared | None = None,
) -> fx.GraphModule:
    """Applies what a plan takes off linears' inputs (`shift`), its scales and its rotations.

    Args:
        gm: a traced graph.
        sites: what can be scaled in it (`match`, and `input_sites` of the refusals).
        plan: scales by site name.
        heads: what can be scaled in its attentions (`match_heads`).
        norms: what can be shifted in it (`shiftable`).
        shared: what other graphs of the model have made of its weights.

    Raises:
        PlanError: if the plan has a scale for a site that this graph does not have, or of another size, or has none for
            what it says is smoothed, or if a folded vector overflows the model's dtype.
    """
    by_name = {s.name: s for s in sites}
    for name, s in plan.scales.items():
        if name not in by_name or by_name[name].channels != len(s):
            raise PlanError(f"the plan smooths {name!r}, which this model does not have: calibrate this model")
        if not by_name[name].allows(s):
            raise PlanError(
                f"the plan scales channels of {name!r} that this model reads elsewhere: calibrate this model"
            )
    balanced = {l.name for name in plan.scales for l, _ in by_name[name].balance}
    smoothed = {l.name for l in plan.layers if l.quantized and l.smoothing != "none"}
    linears = find_linears(gm)
    for l in linears:
        if l.name in smoothed - balanced:
            raise PlanError(
                f"the plan smooths {l.name!r}, and has no scales for it in this model: calibrate this model"
            )
    head_sites = {s.name: s for s in heads}
    head_scales = {n.removesuffix("/scale"): s for n, s in plan.heads.items() if n.endswith("/scale")}
    for name, s in head_scales.items():
        if name not in head_sites or head_sites[name].classes != len(s):
            raise PlanError(f"the plan smooths the attention {name!r}, which this model lacks: calibrate this model")
    for name in head_sites.keys() - head_scales.keys():
        raise PlanError(f"the plan smooths the attention {name!r}, and has no scales for it: calibrate this model")
    new = clone(gm)
    check_shifts(linears, plan.shifts)
    groups = groups_of(linears, plan.shifts, norms)
    shift_biases(new, groups, plan.shifts, shared)
    folder = _Folder(new)
    quantized = {l.name for l in plan.layers if l.quantized}
    rotations = {l.name: l.rotation for l in plan.layers if l.rotation is not None}
    # in the graph's order and not in the plan's, which is another one when it was read from a file: products are rounded
    for i, place in enumerate(p for p in sites if p.name in plan.scales):
        folder.site(place, plan.scales[place.name], f"smooth_{i}", quantized)
    for i, head in enumerate(h for h in heads if h.name in head_scales):
        s = head_scales[head.name]
        for site, classes in head.queries:
            folder.site(site, pick(s, classes).reciprocal(), f"queries_{i}", quantized)
        for site, classes in head.keys:
            folder.site(site, pick(s, classes), f"keys_{i}", quantized)
    shift_inputs(new, groups, plan.shifts, folder.columns)
    for l in find_linears(new):
        if (block := rotations.get(l.name)) is not None:
            folder.rotate(l, block)
    return finish(new)


class _Folder:
    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.nodes = nodes_by_name(gm)
        self.const = constants(gm)
        self.rotated: dict[tuple[fx.Node, int], fx.Node] = {}
        self.columns: dict[str, Tensor] = {}  # s by linear, where its input is divided by it

    def site(self, site: Site, s: Tensor, name: str, quantized: set[str]) -> None:
        producer = self.nodes[site.producer]
        if site.kind == "input":
            self._multiply(site, s, name, quantized)
            return
        if site.kind == "linear":
            self._linear_rows(producer, s, name)
        elif site.kind == "scale":
            self._change(producer, vector_operand(producer, self.const), aten.div.Tensor, s, name)
        else:
            self._norm(producer, s, name)
        for node, argument, labels in site.adds:
            self._change(self.nodes[node], argument, aten.div.Tensor, pick(s, labels), f"{name}_add")
        for linear, index in site.balance:
            self._columns(linear, pick(s, index), name)

    def rotate(self, linear: Linear, block: int) -> None:
        """Rotates a linear's input and weight; linears that read one tensor share its rotation."""
        node = self.nodes[linear.node]
        x, w, _ = linear_operands(node)
        if (x, block) not in self.rotated:
            after = x.next
            while after.op == "placeholder":
                after = after.next
            with self.gm.graph.inserting_before(after):
                self.rotated[x, block] = self._rotation(x, block)
        with self.gm.graph.inserting_before(node):
            weight = self._rotation(w, block)
        node.update_arg(0, self.rotated[x, block])
        node.update_arg(1, weight)
        self.const.add(weight)

    def _rotation(self, x: fx.Node, block: int) -> fx.Node:
        """A rotated tensor in its own dtype. Its float32 value is what is quantized, of the float32 product x·(1/s) too."""
        new = add_op(self.gm, sqcompile_ops.rotate.default, before_cast(x), block)
        return fold_cast(self.gm, new, value(x).dtype)

    def _change(self, user: fx.Node, argument: int | None, op: Callable[..., Any], by: Tensor, name: str) -> None:
        """Replaces a constant argument by ``op(argument, by)``, in the argument's dtype."""
        assert argument is not None
        old = user.args[argument]
        assert isinstance(old, fx.Node)
        by = by.to(value(old).device)
        if value(old).dim() < 2:  # of a matrix, quantization is from the float32 product
            before, dtype = evaluate(self.gm, old), value(old).dtype  # a shifted one is float32 until it is cast
            if bool((before.isfinite() & ~op(before, by).to(dtype).isfinite()).any()):
                raise PlanError(f"the plan's scales take {first_leaf(old)!r} out of {dtype}: calibrate this model")
        with self.gm.graph.inserting_before(user):
            new = self._scaled(old, op, by, name)
        user.update_arg(argument, new)
        self.const.add(new)

    def _scaled(self, old: fx.Node, op: Callable[..., Any], by: Tensor, name: str) -> fx.Node:
        return in_dtype(self.gm, op, old, add_tensor(self.gm, name, by))

    def _linear_rows(self, node: fx.Node, s: Tensor, name: str) -> None:
        self._change(node, 1, aten.div.Tensor, s[:, None], f"{name}_rows")
        if linear_operands(node)[2] is not None:
            self._change(node, 2, aten.div.Tensor, s, f"{name}_bias")

    def _columns(self, linear: Linear, s: Tensor, name: str) -> None:
        self._change(self.nodes[linear.node], 1, aten.mul.Tensor, s, f"{name}_columns")
        self.columns[linear.name] = s

    def _norm(self, node: fx.Node, s: Tensor, name: str) -> None:
        """Divides a norm's weight and bias; a norm without a weight gets one."""
        give_weight(self.gm, node, name)
        args = node.args
        self._change(node, 2, aten.div.Tensor, s, name)
        if node.target == aten.layer_norm.default and len(args) > 3 and args[3] is not None:
            self._change(node, 3, aten.div.Tensor, s, f"{name}_bias")

    def _multiply(self, site: Site, s: Tensor, name: str, quantized: set[str]) -> None:
        users = [(l, self.nodes[l.node]) for l, _ in site.balance if l.name in quantized]
        x = self.nodes[site.producer]
        with self.gm.graph.inserting_before(min(u for _, u in users)):
            smoothed = self._scaled(x, aten.mul.Tensor, s.reciprocal().to(value(x).device), name)
        for linear, user in users:
            user.update_arg(0, smoothed)
            self._columns(linear, s, name)


def pick(s: Tensor, labels: Tensor) -> Tensor:
    """s by label; 1 where a label is -1."""
    labels = labels.to(s.device)
    return torch.where(labels >= 0, s[labels.clamp_min(0)], 1.0)
