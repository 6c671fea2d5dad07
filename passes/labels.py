"""labels: where does each channel of a tensor go? Found by executing the graph's layout on integer labels.

A producer (a norm's scale, a linear's output) gives its output the labels 0..C-1 along the channel axis. The graph
runs downstream on small fake tensors, and beside each value run the labels of every producer that reaches it. The
invariant, for one producer with a scale ``s > 0`` per label:

    if the producer's output is divided by s[label], then every labelled tensor is divided by s[its labels],
    element by element (label -1: unchanged), and everything else keeps its value.

Layout operations are executed on the labels as they are. Operations that commute with a positive scale pass them on.
A linear whose input columns carry one label each absorbs them: a balance layer. Whatever else a label reaches refuses
*that label*, with a reason, and a refused label keeps s = 1, for which the invariant holds trivially.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from sqcompile.passes.graph import Linear, aten, constants, get_tensor, is_channel_vector, value

RESIDUAL = "joins a residual stream"
OUTPUT = "is an output of the model"
ROTARY = "is mixed with other channels by an addition (rotary position embedding)"
ATTENTION = "feeds QKᵀ"


class Refused(Exception):
    """Raised by a rule: these labels cannot pass, and why."""


@dataclass
class Flow:
    """What became of one producer's labels.

    Attributes:
        producer: name of the producer's node; its output is [..., C].
        kind: "norm" (layer_norm, rms_norm), "scale" (multiplication by a channel vector) or "linear".
        channels: C.
        balance: the linears that absorb labels, with their index map: int64 [K], the label of each input column, or -1.
        adds: additions of a constant on the way, which must be scaled along: (node, argument index, int64 labels shaped
            to broadcast like that constant).
        refused: label -> reason, for the labels that must keep s = 1.
        stops: node -> reason, where labels were refused.
    """

    producer: str
    kind: str
    channels: int
    balance: list[tuple[str, Tensor]] = field(default_factory=list)
    adds: list[tuple[str, int, Tensor]] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)
    stops: dict[str, str] = field(default_factory=dict)

    def refuse(self, labels: Any, reason: str) -> None:
        for part in labels if isinstance(labels, (tuple, list)) else [labels]:
            for label in torch.unique(part).tolist():
                if label >= 0:
                    self.refused.setdefault(int(label), reason)


# Pure layout: executed on the label tensor itself.
LAYOUT = {
    aten.view.default, aten.reshape.default, aten.transpose.int, aten.permute.default, aten.t.default,
    aten.slice.Tensor, aten.select.int, aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.default, aten.squeeze.dims, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default,
    aten.unbind.int, aten.flatten.using_ints, aten.unflatten.int, aten.repeat.default, aten.narrow.default,
    aten.repeat_interleave.self_int, aten.index.Tensor, aten.index_select.default, aten.flip.default,
    aten.movedim.int, aten.swapaxes.default, aten.expand_as.default, aten.view_as.default, aten.roll.default,
    operator.getitem,
}  # fmt: skip

# f(x / s) = f(x) / s for every s > 0, element by element, whatever the other arguments are.
HOMOGENEOUS = {
    aten.relu.default, aten.leaky_relu.default, aten.neg.default, aten.abs.default, aten.dropout.default,
    aten.alias.default, aten.detach.default, aten.clone.default, aten.contiguous.default, aten.mul.Scalar,
    aten.div.Scalar, aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default,
}  # fmt: skip

# The result depends on the operand's shape alone.
SHAPE_ONLY = {
    aten.sym_size.int, aten.zeros_like.default, aten.ones_like.default, aten.empty_like.default, aten.full_like.default,
    aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default,
}  # fmt: skip


def run_labels(gm: fx.GraphModule, linears: list[Linear], symbols: dict[Any, int]) -> dict[str, Flow]:
    """Runs the labels of every producer at one choice of sizes.

    Args:
        gm: a traced graph.
        linears: its linears.
        symbols: a concrete size for each free symbol of the graph's placeholders.

    Returns:
        The flow of each producer, by node name.
    """
    interpreter = _Labels(gm, linears)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad():
        interpreter.mode = mode
        interpreter.run(
            *[_concrete(value(n), symbols) for n in gm.graph.find_nodes(op="placeholder")], enable_io_processing=False
        )
    return interpreter.flows


def free_symbols(gm: fx.GraphModule) -> list[Any]:
    """The symbolic sizes of the graph's inputs, in order of appearance."""
    found: dict[Any, None] = {}
    for n in gm.graph.find_nodes(op="placeholder"):
        v = value(n)
        for size in v.shape if isinstance(v, Tensor) else [v]:
            if isinstance(size, torch.SymInt):
                found.update(dict.fromkeys(sorted(size.node.expr.free_symbols, key=str)))
    return list(found)


def _concrete(v: Any, symbols: dict[Any, int]) -> Any:
    def size(s: Any) -> int:
        return int(s.node.expr.xreplace(symbols)) if isinstance(s, torch.SymInt) else s

    if isinstance(v, Tensor):
        return torch.empty([size(s) for s in v.shape], dtype=v.dtype, device=v.device)
    return size(v)


class _Labels(fx.Interpreter):
    """Executes values on fake tensors and labels on real ones; a label lives as long as its value."""

    mode: FakeTensorMode

    def __init__(self, gm: fx.GraphModule, linears: list[Linear]) -> None:
        super().__init__(gm)
        self.linears = {l.node: l for l in linears}
        self.const = constants(gm)
        self.flows: dict[str, Flow] = {}
        self.labels: dict[fx.Node, dict[str, Any]] = {}

    def run_node(self, n: fx.Node) -> Any:
        out = self._compute(n)
        if n not in self.const:
            with torch.utils._python_dispatch._disable_current_modes():
                mine = self._propagate(n, out)
                self._start(n, out, mine)
            if mine:
                self.labels[n] = mine
        for dead in self.user_to_last_uses.get(n, []):
            self.labels.pop(dead, None)
        return out

    def _compute(self, n: fx.Node) -> Any:
        if n.op == "get_attr":
            return self.mode.from_tensor(get_tensor(self.module, str(n.target)), static_shapes=True)
        return super().run_node(n)

    def _start(self, n: fx.Node, out: Any, mine: dict[str, Any]) -> None:
        kind = producer_kind(n, n.name in self.linears, self.const)
        if kind and isinstance(out, Tensor) and out.dtype.is_floating_point and out.dim() >= 2 and out.shape[-1] > 1:
            self.flows[n.name] = Flow(n.name, kind, out.shape[-1])
            mine[n.name] = torch.arange(out.shape[-1]).expand(out.shape)

    def _propagate(self, n: fx.Node, out: Any) -> dict[str, Any]:
        seen: dict[str, list[tuple[fx.Node, Any]]] = {}
        for a in n.all_input_nodes:
            for producer, labels in self.labels.get(a, {}).items():
                seen.setdefault(producer, []).append((a, labels))
        result: dict[str, Any] = {}
        if n.target in SHAPE_ONLY or not seen:
            return result
        for producer, operands in seen.items():
            flow = self.flows[producer]
            try:
                labels = self._rule(n, out, flow, operands)
                if labels is not None:
                    result[producer] = labels
            except Refused as e:
                flow.stops[n.name] = str(e)
                for _, labels in operands:
                    flow.refuse(labels, str(e))
        return result

    def _rule(self, n: fx.Node, out: Any, flow: Flow, operands: list[tuple[fx.Node, Any]]) -> Any:
        if n.op == "output":
            raise Refused(OUTPUT)
        node, labels = operands[0]
        if n.name in self.linears:
            columns = labels.reshape(-1, labels.shape[-1])
            if not bool((columns == columns[:1]).all()):
                raise Refused("is not one column of the linear it reaches")
            flow.balance.append((n.name, columns[0].clone()))
            return None
        t = n.target
        if t in HOMOGENEOUS:
            if not out.dtype.is_floating_point:
                raise Refused(f"is cast to {out.dtype}")
            return labels
        if t in LAYOUT:
            return self._layout(n, node, labels, len(operands))
        rule = RULES.get(t)
        if rule is None:
            raise Refused(describe(n))
        return rule(self, n, out, flow, dict(operands))

    def _layout(self, n: fx.Node, node: fx.Node, labels: Any, count: int) -> Any:
        if n.args[0] is not node or count != 1:
            raise Refused(describe(n))
        args, kwargs = fx.node.map_arg((n.args[1:], n.kwargs), self._real)
        if n.target is operator.getitem:
            return labels[args[0]]
        target: Callable[..., Any] = aten.reshape.default if n.target is aten.view.default else n.target  # type: ignore[assignment]
        return target(labels, *args, **kwargs)

    def _real(self, a: fx.Node) -> Any:
        """An argument of a layout op as data: a size, or a constant index tensor."""
        v = self.env[a]
        if not isinstance(v, Tensor):
            return v
        if a.op == "get_attr":
            return get_tensor(self.module, str(a.target))
        if a.target in (aten.expand_as.default, aten.view_as.default):
            return torch.empty(v.shape, device="meta")
        raise Refused("is selected by an index that depends on the input")


def producer_kind(n: fx.Node, is_linear: bool, const: set[fx.Node]) -> str | None:
    """How 1/s can be absorbed at this node's output, if it can."""
    if is_linear:
        return "linear"
    if n.target in (aten.layer_norm.default, aten.rms_norm.default) and len(n.args[1]) == 1:  # type: ignore[arg-type]
        return "norm"
    if n.target == aten.mul.Tensor and vector_operand(n, const) is not None:
        return "scale"
    return None


def vector_operand(n: fx.Node, const: set[fx.Node]) -> int | None:
    """Which argument of a multiplication is a constant channel vector, the other being data."""
    for i, j in ((0, 1), (1, 0)):
        a, b = n.args[i], n.args[j]
        if (
            isinstance(a, fx.Node)
            and isinstance(b, fx.Node)
            and a in const
            and b not in const
            and is_channel_vector(a, value(n))
        ):
            return i
    return None


def describe(n: fx.Node) -> str:
    """Why an operation without a rule stops a label, in words."""
    name = getattr(n.target, "__name__", str(n.target)).split(".")[0]
    packet = getattr(n.target, "overloadpacket", None)
    name = packet.__name__ if packet is not None else name
    if name in ("silu", "gelu", "tanh", "sigmoid", "softmax", "_softmax", "exp", "pow", "relu6", "hardtanh"):
        return f"passes {name}, which does not commute with a scale"
    if name in ("layer_norm", "rms_norm", "mean", "var", "group_norm"):
        return f"is normalized by {name}"
    if name == "mul" and n.args[0] is n.args[1]:
        return "is squared"
    return f"reaches {name}, which scales cannot pass"


def _only(operands: dict[fx.Node, Any], n: fx.Node) -> tuple[fx.Node, Any]:
    if len(operands) != 1:
        raise Refused(f"meets itself in {describe(n).split()[1].rstrip(',')}")
    return next(iter(operands.items()))


def _mul(ctx: _Labels, n: fx.Node, out: Tensor, flow: Flow, operands: dict[fx.Node, Any]) -> Any:
    _, labels = _only(operands, n)
    if n.args[0] is n.args[1]:
        raise Refused(describe(n))
    return labels.broadcast_to(out.shape)


def _div(ctx: _Labels, n: fx.Node, out: Tensor, flow: Flow, operands: dict[fx.Node, Any]) -> Any:
    node, labels = _only(operands, n)
    if n.args[0] is not node or n.args[1] is node or n.kwargs.get("rounding_mode"):
        raise Refused("is a divisor")
    return labels.broadcast_to(out.shape)


def _add(ctx: _Labels, n: fx.Node, out: Tensor, flow: Flow, operands: dict[fx.Node, Any]) -> Any:
    """(x + y) / s = x / s + y / s: y carries the same labels, or is a constant that can be divided too."""
    wide = [l.broadcast_to(out.shape) for l in operands.values()]
    if len(wide) == 2:
        if not torch.equal(wide[0], wide[1]):
            raise Refused(ROTARY if set(wide[0].unique().tolist()) == set(wide[1].unique().tolist()) else RESIDUAL)
        return wide[0]
    if n.args[0] is n.args[1]:
        return wide[0]
    i = 1 if n.args[0] in operands else 0
    other = n.args[i]
    if not isinstance(other, fx.Node) or other not in ctx.const:
        raise Refused(RESIDUAL if isinstance(other, fx.Node) else "is shifted by a number")
    # the constant's own shape, padded to the result's rank; labels must not vary where it broadcasts
    shape = [1] * (out.dim() - value(other).dim()) + list(value(other).shape)
    narrow = wide[0]
    for d, size in enumerate(shape):
        if size == 1:
            if not bool((narrow == narrow.narrow(d, 0, 1)).all()):
                raise Refused("is shifted by a constant shared between channels")
            narrow = narrow.narrow(d, 0, 1)
    flow.adds.append((n.name, i, narrow.reshape(value(other).shape).clone()))
    return wide[0]


def _concat(ctx: _Labels, n: fx.Node, out: Tensor, flow: Flow, operands: dict[fx.Node, Any]) -> Any:
    inputs: Any = n.args[0]
    parts = [operands[a] if a in operands else torch.full(ctx.env[a].shape, -1) for a in inputs]
    return n.target(parts, *n.args[1:], **n.kwargs)  # type: ignore[operator]


def _flat(labels: Tensor, dim: int) -> Tensor:
    """One slice of the labels along a dim that is summed away; they must not vary along it."""
    first = labels.narrow(dim, 0, 1)
    if not bool((labels == first).all()):
        raise Refused("is summed with other channels")
    return first


def _matmul(ctx: _Labels, n: fx.Node, out: Tensor, flow: Flow, operands: dict[fx.Node, Any]) -> Any:
    """P·V with V's channels scaled: labels pass if they are constant along the contracted dim."""
    node, labels = _only(operands, n)
    if n.args[0] is n.args[1]:
        raise Refused("meets itself in matmul")
    if labels.dim() < 2 or out.dim() < 2:
        raise Refused(describe(n))
    try:
        return _flat(labels, -2 if node is n.args[1] else -1).broadcast_to(out.shape)
    except Refused:
        raise Refused(
            ATTENTION if all(a not in ctx.const for a in n.args[:2]) else "is contracted by a matmul"
        ) from None


def _attention(ctx: _Labels, n: fx.Node, out: Tensor, flow: Flow, operands: dict[fx.Node, Any]) -> Any:
    v = n.args[2]
    for node, labels in operands.items():  # a fused QKV projection: its q and k channels are refused, v's pass
        if node is not v or node in (n.args[0], n.args[1]):
            flow.refuse(labels, ATTENTION)
    if v not in operands:
        return None
    row = _flat(operands[v], -2)  # type: ignore[index]
    if row.dim() >= 3 and row.shape[-3] != out.shape[-3]:  # enable_gqa: each value head serves a group of query heads
        row = row.repeat_interleave(out.shape[-3] // row.shape[-3], dim=-3)
    return row.broadcast_to(out.shape)


def _reduce(ctx: _Labels, n: fx.Node, out: Tensor, flow: Flow, operands: dict[fx.Node, Any]) -> Any:
    _, labels = _only(operands, n)
    dims: Any = n.args[1] if len(n.args) > 1 else None
    if not isinstance(dims, (list, tuple)) or not dims:
        raise Refused(describe(n))
    keep = bool(n.args[2]) if len(n.args) > 2 else bool(n.kwargs.get("keepdim", False))
    try:
        for d in dims:
            labels = _flat(labels, int(d))
    except Refused:
        raise Refused(describe(n)) from None
    return labels if keep else labels.squeeze([int(d) for d in dims])


def _masked_fill(ctx: _Labels, n: fx.Node, out: Tensor, flow: Flow, operands: dict[fx.Node, Any]) -> Any:
    node, labels = _only(operands, n)
    if node is not n.args[0] or n.args[2] != 0:
        raise Refused("is filled with a number")
    return labels.broadcast_to(out.shape)


def _clamp(ctx: _Labels, n: fx.Node, out: Tensor, flow: Flow, operands: dict[fx.Node, Any]) -> Any:
    low = n.args[1] if len(n.args) > 1 else n.kwargs.get("min")
    high = n.args[2] if len(n.args) > 2 else n.kwargs.get("max")
    if low not in (None, 0) or high not in (None, 0):
        raise Refused("is clamped to a number")
    return _only(operands, n)[1]


RULES: dict[Any, Callable[..., Any]] = {
    aten.mul.Tensor: _mul,
    aten.div.Tensor: _div,
    aten.add.Tensor: _add,
    aten.sub.Tensor: _add,
    aten.cat.default: _concat,
    aten.stack.default: _concat,
    aten.matmul.default: _matmul,
    aten.bmm.default: _matmul,
    aten.mm.default: _matmul,
    aten.scaled_dot_product_attention.default: _attention,
    aten.mean.dim: _reduce,
    aten.sum.dim_IntList: _reduce,
    aten.masked_fill.Scalar: _masked_fill,
    aten.clamp.default: _clamp,
    aten.clamp_min.default: _clamp,
}
