"""What each operation does to channel labels; the invariant that every rule keeps stands in `labels`.

A rule sees one producer's labels at an operation's inputs, and gives the labels of its output, or raises `Refused`
with the reason. Which operation has which rule stands in `operators`; one that is not there is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.passes.ir.graph import arguments, aten, value
from sqcompile.passes.ir.operators import named

RESIDUAL = "joins a residual stream"
OUTPUT = "is an output of the model"
ROTARY = "is mixed with other channels by an addition (rotary position embedding)"
ATTENTION = "feeds QKᵀ"
SUMMED = "is added to those of other processes (all-reduce)"


class Refused(Exception):
    """Raised by a rule: these labels cannot pass, and why."""


@dataclass
class Flow:
    """What became of one producer's labels.

    Attributes:
        producer: name of the producer's node; its output is [..., C].
        kind: "norm" (layer_norm, rms_norm), "scale" (multiplication by a channel vector) or "linear".
        channels: C.
        dtype: the narrower one of its output's and its parameter's.
        balance: the linears that absorb labels, with their index map: int64 [K], the label of each input column, or -1.
        adds: additions of a constant on the way, which must be scaled along: (node, argument index, int64 labels shaped
            to broadcast like that constant).
        refused: label -> reason, for the labels that must keep s = 1.
        stops: node -> reason, where labels were refused.
    """

    producer: str
    kind: str
    channels: int
    dtype: torch.dtype = torch.float32
    balance: list[tuple[str, Tensor]] = field(default_factory=list)
    adds: list[tuple[str, int, Tensor]] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)
    stops: dict[str, str] = field(default_factory=dict)

    def refuse(self, labels: Any, reason: str) -> None:
        for part in labels if isinstance(labels, (tuple, list)) else [labels]:
            for label in torch.unique(part).tolist():
                if label >= 0:
                    self.refused.setdefault(int(label), reason)


def narrower(a: torch.dtype, b: torch.dtype) -> bool:
    """Whether a float dtype rounds values, or overflows, that another holds."""
    return torch.finfo(a).eps > torch.finfo(b).eps or torch.finfo(a).max < torch.finfo(b).max


def refuse_rounding(way: Iterable[torch.dtype], *ends: torch.dtype) -> None:
    """Refuses labels on whose way values are narrower than at both ends: s would change what is rounded there.

    So float32 -> bfloat16 -> float32 is refused. Models in half precision, RMSNorm in float32 among them, are not: the
    linears that read a value round it to their own dtype, and folding is as exact as that dtype.
    """
    for dtype in way:
        if dtype.is_floating_point and all(narrower(dtype, end) for end in ends):
            raise Refused(f"is rounded to {str(dtype).removeprefix('torch.')} on its way, which a scale would change")


def behind(node: fx.Node, targets: Set[Any]) -> fx.Node:
    """What a node is made of by operations of one input, such as LAYOUT."""
    while node.op == "call_function" and node.target in targets and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


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


def _mul(ctx: Any, n: fx.Node, out: Tensor, flow: Flow, operands: dict[fx.Node, Any]) -> Any:
    _, labels = _only(operands, n)
    if n.args[0] is n.args[1]:
        raise Refused(describe(n))
    return labels.broadcast_to(out.shape)


def _div(ctx: Any, n: fx.Node, out: Tensor, flow: Flow, operands: dict[fx.Node, Any]) -> Any:
    node, labels = _only(operands, n)
    if n.args[0] is not node or n.args[1] is node or n.kwargs.get("rounding_mode"):
        raise Refused("is a divisor")
    return labels.broadcast_to(out.shape)


def _add(ctx: Any, n: fx.Node, out: Tensor, flow: Flow, operands: dict[fx.Node, Any]) -> Any:
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
    if not isinstance(other, fx.Node) or other not in ctx.const or not value(other).dtype.is_floating_point:
        raise Refused(RESIDUAL if isinstance(other, fx.Node) else "is shifted by a number")
    # the constant's own shape, padded to the result's rank; labels must not vary where it broadcasts
    shape = [1] * (out.dim() - value(other).dim()) + list(value(other).shape)
    narrow = wide[0]
    for d, size in enumerate(shape):
        if size == 1:
            if not uniform(narrow, d):
                raise Refused("is shifted by a constant shared between channels")
            narrow = narrow.narrow(d, 0, 1)
    flow.adds.append((n.name, i, narrow.reshape(value(other).shape).clone()))
    return wide[0]


def _concat(ctx: Any, n: fx.Node, out: Tensor, flow: Flow, operands: dict[fx.Node, Any]) -> Any:
    inputs: Any = n.args[0]
    parts = [operands[a] if a in operands else torch.full(ctx.env[a].shape, -1) for a in inputs]
    return executed(n, parts, *n.args[1:], **n.kwargs)


def executed(n: fx.Node, *args: Any, **kwargs: Any) -> Any:
    """A node's operator on labels; refused where it cannot take them, such as a view of memory that labels have not."""
    try:
        return n.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, IndexError, TypeError, ValueError) as e:
        raise Refused(describe(n)) from e


def uniform(labels: Tensor, dim: int) -> bool:
    """Whether labels do not vary along a dim; of one without entries nothing is known."""
    return labels.shape[dim] > 0 and bool((labels == labels.narrow(dim, 0, 1)).all())


def _flat(labels: Tensor, dim: int) -> Tensor:
    """One slice of the labels along a dim that is summed away; they must not vary along it."""
    if not uniform(labels, dim):
        raise Refused("is summed with other channels")
    return labels.narrow(dim, 0, 1)


def _matmul(ctx: Any, n: fx.Node, out: Tensor, flow: Flow, operands: dict[fx.Node, Any]) -> Any:
    """P·V with V's channels scaled: labels pass if they are constant along the contracted dim."""
    node, labels = _only(operands, n)
    if n.args[0] is n.args[1]:
        raise Refused("meets itself in matmul")
    if labels.dim() < 2:
        raise Refused(describe(n))
    other: Any = n.args[0] if node is n.args[1] else n.args[1]
    dim = -2 if node is n.args[1] else -1
    try:
        row = _flat(labels, dim)
        return row.squeeze(dim) if value(other).dim() == 1 else row.broadcast_to(out.shape)
    except Refused:
        raise Refused(
            ATTENTION if all(a not in ctx.const for a in n.args[:2]) else "is contracted by a matmul"
        ) from None


def _attention(ctx: Any, n: fx.Node, out: Tensor, flow: Flow, operands: dict[fx.Node, Any]) -> Any:
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


def _reduce(ctx: Any, n: fx.Node, out: Tensor, flow: Flow, operands: dict[fx.Node, Any]) -> Any:
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


def _masked_fill(ctx: Any, n: fx.Node, out: Tensor, flow: Flow, operands: dict[fx.Node, Any]) -> Any:
    node, labels = _only(operands, n)
    if node is not n.args[0] or n.args[2] != 0:
        raise Refused("is filled with a number")
    return labels.broadcast_to(out.shape)


def _pad(ctx: Any, n: fx.Node, out: Tensor, flow: Flow, operands: dict[fx.Node, Any]) -> Any:
    """0 / s = 0 for every s: zeros take the labels beside them where those do not vary, and need none elsewhere."""
    _, labels = _only(operands, n)
    args = arguments(n)
    if args.get("mode", "constant") != "constant":
        raise Refused(describe(n))
    if args["value"] not in (None, 0):
        raise Refused("is padded with a number")
    sizes: Any = list(fx.node.map_arg(args["pad"], lambda a: ctx.env[a]))
    for i in range(len(sizes) // 2):
        if uniform(labels, -1 - i):
            labels, sizes[2 * i : 2 * i + 2] = labels.narrow(-1 - i, 0, 1), [0, 0]
    return aten.constant_pad_nd.default(labels, sizes, -1).broadcast_to(out.shape)


def _clamp(ctx: Any, n: fx.Node, out: Tensor, flow: Flow, operands: dict[fx.Node, Any]) -> Any:
    low = n.args[1] if len(n.args) > 1 else n.kwargs.get("min")
    high = n.args[2] if len(n.args) > 2 else n.kwargs.get("max")
    if low not in (None, 0) or high not in (None, 0):
        raise Refused("is clamped to a number")
    return _only(operands, n)[1]


def _all_reduce(ctx: Any, n: fx.Node, out: Tensor, flow: Flow, operands: dict[fx.Node, Any]) -> Any:
    """A sum of what each process has, whose scales are its own: a scale would have to be the same for all of them."""
    raise Refused(SUMMED)


_NAMED: dict[str, Callable[..., Any]] = {
    "mul": _mul, "div": _div, "add": _add, "join": _concat, "matmul": _matmul, "attention": _attention, "reduce": _reduce,
    "masked_fill": _masked_fill, "pad": _pad, "clamp": _clamp, "all_reduce": _all_reduce,
}  # fmt: skip
RULES: dict[Any, Callable[..., Any]] = {target: _NAMED[rule] for target, rule in named("rule").items()}
