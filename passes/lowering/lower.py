"""lower: linears that share a quantized input become one INT8 linear. Reads only the graph.

    %qf = to(%q, float32)
    %w1f = to(%w1_int8, float32)
    %acc1 = linear(%qf, %w1f)
    %y1 = sqcompile.dequantize(%acc1, %s, %w1_scale, %b1, float32)
    %w2f = to(%w2_int8, float32)
    %acc2 = linear(%qf, %w2f)
    %y2 = sqcompile.dequantize(%acc2, %s, %w2_scale, %b2, float32)
->                                                                          # any device
    %int8_linear = sqcompile.int8_linear(%q, %s, %w1_merged, %w1_columns, %w1_bias, float32)
    %slice = slice(%int8_linear, -1, 0, 6)                                  # y1
    %slice_1 = slice(%int8_linear, -1, 6, 8)                                # y2
->                                                                          # CUDA; `fuse` makes %getitem, too
    %int8_gemm = sqcompile.int8_gemm(%getitem, %getitem_1, %w1_merged, %w1_columns, %w1_bias, float32, none, None, None)
->                                                                          # x86 with VNNI
    %quantize = sqcompile.quantize(%x, %s, 128)                             # uint8
    %int8_linear_packed = sqcompile.int8_linear_packed(%quantize, %s, %w1_packed, %w1_columns, %w1_sum, %w1_bias,
        float32)

Each output channel has a scale of its own, so merging q, k, v or gate, up changes no value.
"""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sqcompile.kernels.ops import sqcompile_ops
from sqcompile.kernels.qtypes import BY_DTYPE, FP8, INT8, QType
from sqcompile.kernels.targets import Operands, Target, target_of
from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import (
    add_op,
    add_tensor,
    aten,
    clone,
    constants,
    evaluate,
    finish,
    get_tensor,
    value,
)
from sqcompile.passes.ir.operators import LAYOUT
from sqcompile.passes.ir.origin import STANDS_FOR, replace
from sqcompile.passes.lowering.all_reduces import lower_all_reduces
from sqcompile.passes.lowering.float_attention import lower_attention
from sqcompile.passes.lowering.fuse import fuse
from sqcompile.passes.lowering.fuse_rows import fuse_rows
from sqcompile.passes.lowering.id_ranges import check_ids
from sqcompile.passes.lowering.int8_attention import lower_int8_attention
from sqcompile.passes.lowering.merged import made_later, merged, stand_in
from sqcompile.passes.lowering.rotated import fuse_rotations
from sqcompile.passes.rewrite.weight_store import Lazy, Merged, Shared
from sqcompile.process.memory import release_freed_memory
from sqcompile.process.progress import each

_warned: set[str] = set()


@dataclass(frozen=True)
class _Quantized:
    """One linear of int8 operands: the node of its result, and what it is made of."""

    out: fx.Node
    q: fx.Node
    weight: fx.Node
    scale: fx.Node
    weight_scale: fx.Node
    bias: fx.Node | None
    dtype: torch.dtype
    offsets: fx.Node | None = None
    static: fx.Node | None = None  # Δx, by which the weight's scale is multiplied

    @property
    def key(self) -> tuple[object, ...]:
        """Linears of one key become one."""
        alone = self.out if self.offsets else None  # experts are not merged: each is a product of its own anyway
        return self.q, self.scale, self.static, self.dtype, self.bias is None, alone


def lower(
    gm: fx.GraphModule, shared: Shared | None = None, target: Target | None = None, lazy: bool = False
) -> fx.GraphModule:
    """Lowers every quantized linear, and computes what depends on parameters alone.

    With ``shared`` (the same as of `insert_qdq`), a weight that another graph has made is taken from it. ``target`` is
    what is lowered for; None for the devices of the graph's tensors.

    For a target without kernels, the plain reference runs, with a warning once per device type. Weights are packed one
    group at a time and the plain int8 copy is dropped, so no two copies of the model exist.

    With ``lazy``, of a graph whose weights are lazy, they are packed when somebody asks for them: until then the result
    holds tensors without data (on the meta device), and its ``About.lazy`` says how what an operator reads is made.
    """
    gm = clone(gm)
    of = target_of(target)
    groups: dict[tuple[object, ...], list[_Quantized]] = {}
    for node in gm.graph.nodes:
        grouped = node.target == sqcompile_ops.grouped_dequantize.default
        if grouped or node.target == sqcompile_ops.dequantize.default:
            acc, scale, weight_scale, more, dtype = node.args
            q, weight = (cast.args[0] for cast in acc.args[:2])
            weight_scale, static = weight_scale.args if weight_scale.target == aten.mul.Tensor else (weight_scale, None)
            bias, offsets = (None, more) if grouped else (more, None)
            found = _Quantized(node, q, weight, scale, weight_scale, bias, dtype, offsets, static)
            groups.setdefault(found.key, []).append(found)
    fuses, later = set(), dict[str, Lazy]()
    for group in each([*groups.values()], "pack"):
        device = value(group[0].weight).device
        on = of(device)
        on.check(device)
        qtype = BY_DTYPE[value(group[0].weight).dtype]
        on.check_format(qtype.name)
        if qtype is FP8:
            on = on.for_fp8()
        if not on.has_kernels:
            _warn_reference(on.device, qtype)
        fuses.add(on.fuses)
        if group[0].offsets:
            later |= _lower_experts(gm, group[0], shared, on, lazy)
        else:
            later |= _lower_group(gm, group, shared, on, lazy)
        release_freed_memory()
    about(gm).lazy = later  # what was there holds the float weights
    _materialize(gm)
    lower_int8_attention(gm, of)
    lower_attention(gm, of)
    if "triton" in fuses:
        fuse(gm)
        lower_all_reduces(gm)
    if "cpu" in fuses:
        fuse_rows(gm)
    fuse_rotations(gm)
    check_ids(gm)
    about(gm).target = target
    return finish(gm)


def _weights(gm: fx.GraphModule, group: list[_Quantized], shared: Shared | None, target: Target, lazy: bool) -> Merged:
    experts = group[0].offsets is not None
    if lazy:
        return stand_in([g.weight for g in group], experts, target)
    return merged(gm, [(g.weight, g.weight_scale) for g in group], experts, shared, target)


def _later(gm: fx.GraphModule, group: list[_Quantized], target: Target, nodes: list[fx.Node | None]) -> dict[str, Lazy]:
    """How what the nodes hold is made. Nobody reads the sums of a target that needs none."""
    first = group[0]
    static = None if first.static is None else get_tensor(gm, str(first.static.target))
    held = [str(n.target) for n in nodes if n is not None and n.users]
    return made_later(gm, [g.weight for g in group], first.offsets is not None, target, static, held)


def _name(g: _Quantized) -> str:
    """Of a linear's weight, before it was quantized."""
    return str(g.weight.target).removesuffix(f"_{BY_DTYPE[value(g.weight).dtype].name}")


def _columns(gm: fx.GraphModule, g: _Quantized, weights: Merged) -> torch.Tensor:
    """The factors of output channels, float32 [N] or [E, N]: Δw, times Δx where it is static."""
    done = g.static is None or weights.scale.is_meta
    return weights.scale if done else weights.scale * get_tensor(gm, str(g.static.target))  # type: ignore[union-attr]


def _lower_group(
    gm: fx.GraphModule, group: list[_Quantized], shared: Shared | None, target: Target, lazy: bool
) -> dict[str, Lazy]:
    first = group[0]
    sizes, device = [value(g.weight).shape[0] for g in group], value(first.weight).device
    weights = _weights(gm, group, shared, target, lazy)
    assert isinstance(weights.w, torch.Tensor)
    bias = None if first.bias is None else torch.cat([evaluate(gm, g.bias) for g in group if g.bias is not None])
    name = _name(first)
    with gm.graph.inserting_before(first.out):
        w_scale = add_tensor(gm, f"{name}_columns", _columns(gm, first, weights), device)
        b = None if bias is None else add_tensor(gm, f"{name}_bias", bias)
        w = add_tensor(gm, f"{name}_packed" if target.pack else f"{name}_merged", weights.w, device)
        beside = None if weights.beside is None else add_tensor(gm, f"{name}_sum", weights.beside, device)
        q = _shifted(gm, first.q, target.zero_point)
        new = gm.graph.call_function(*target.linear(Operands(q, first.scale, w, w_scale, beside, b, first.dtype)))
        like = value(first.out)
        new.meta["val"] = like.new_empty((*like.shape[:-1], sum(sizes)))
        parts = [new]
        if len(group) > 1:
            ends = list(itertools.accumulate(sizes))
            parts = [add_op(gm, aten.slice.Tensor, new, -1, e - n, e) for e, n in zip(ends, sizes, strict=True)]
            parts = [
                add_op(gm, aten.contiguous.default, p) if _shows_strides(g.out) else p
                for g, p in zip(group, parts, strict=True)
            ]
    later = _later(gm, group, target, [w, w_scale, beside]) if lazy else {}
    for g, part in zip(group, parts, strict=True):
        _replace(gm, g, part)
    return later


def _lower_experts(
    gm: fx.GraphModule, g: _Quantized, shared: Shared | None, target: Target, lazy: bool
) -> dict[str, Lazy]:
    weights = _weights(gm, [g], shared, target, lazy)
    name, device = _name(g), value(g.weight).device
    with gm.graph.inserting_before(g.out):
        w_scale = add_tensor(gm, f"{name}_columns", _columns(gm, g, weights), device)
        if isinstance(weights.w, torch.Tensor):
            w: Any = add_tensor(gm, f"{name}_all", weights.w, device)
        else:
            w = [add_tensor(gm, f"{name}_packed_{e}", p, device) for e, p in enumerate(weights.w)]
        beside = None if weights.beside is None else add_tensor(gm, f"{name}_sum", weights.beside, device)
        q = _shifted(gm, g.q, target.zero_point if target.packs_experts else 0)
        new = gm.graph.call_function(*target.experts(Operands(q, g.scale, w, w_scale, beside, g.offsets, g.dtype)))
        new.meta["val"] = value(g.out)
    later = _later(gm, [g], target, [*(w if isinstance(w, list) else [w]), w_scale, beside]) if lazy else {}
    _replace(gm, g, new)
    return later


def _shows_strides(node: fx.Node) -> bool:
    """Whether the caller, or an operation that looks at memory, sees a tensor through layout operations alone."""
    return any(
        u.op == "output"
        or u.target in (aten.as_strided.default, aten.view_as_complex.default)
        or (u.target in LAYOUT and _shows_strides(u))
        for u in node.users
    )


def _replace(gm: fx.GraphModule, old: _Quantized, new: fx.Node) -> None:
    """Puts the new node in place of a linear, and drops the linear and its plain int8 weight at once."""
    replace(gm, old.out, new)
    acc = old.out.args[0]
    assert isinstance(acc, fx.Node)
    weight_cast = acc.args[1]
    for node in (old.out, acc, weight_cast):
        gm.graph.erase_node(node)  # type: ignore[arg-type]
    if not old.weight.users:
        path, _, leaf = str(old.weight.target).rpartition(".")
        gm.graph.erase_node(old.weight)
        delattr(gm.get_submodule(path), leaf)


def _shifted(gm: fx.GraphModule, q: fx.Node, zero_point: int) -> fx.Node:
    """The twin of a quantize node with a zero point, made once."""
    if not zero_point:
        return q
    x, scale = q.args
    for user in x.users:  # type: ignore[union-attr]
        if user.target == sqcompile_ops.quantize.default and user.args == (x, scale, zero_point):
            return user
    with gm.graph.inserting_before(q):
        new = add_op(gm, sqcompile_ops.quantize.default, x, scale, zero_point)
    new.meta[STANDS_FOR] = q.name
    return new


def _warn_reference(device: str, qtype: QType) -> None:
    kind = device if qtype is INT8 else f"{device}, {qtype.name}"
    if kind not in _warned:
        _warned.add(kind)
        without = " without AVX2" if device == "cpu" and qtype is INT8 else ""
        warnings.warn(
            f"sqcompile has no {qtype.name.upper()} kernels for {device}{without}: the compiled model runs the plain-PyTorch "
            f"{'integer ' if qtype is INT8 else ''}reference, correct but slow. The page Devices of the documentation says where there are kernels",
            stacklevel=2,
        )


def _materialize(gm: fx.GraphModule) -> None:
    """Constant expressions that data meets (a norm's weight / s) become tensors."""
    const = constants(gm)
    for node in [n for n in gm.graph.nodes if n in const and n.op == "call_function"]:
        if any(u not in const for u in node.users):
            tensor = evaluate(gm, node)
            if isinstance(tensor, torch.Tensor):
                with gm.graph.inserting_before(node):
                    new = add_tensor(gm, f"constant_{node.name}", tensor.to(value(node).dtype).clone())
                node.replace_all_uses_with(new)
                gm.graph.erase_node(node)
