"""labels: where does each channel of a tensor go? Found by executing the graph's layout on integer labels.

A producer (a norm's scale, a linear's output) gives its output the labels 0..C-1 along the channel axis. The graph
runs downstream on small fake tensors, and beside each value run the labels of every producer that reaches it. The
invariant, for one producer with a scale ``s > 0`` per label:

    if the producer's output is divided by s[label], then every labelled tensor is divided by s[its labels],
    element by element (label -1: unchanged), and everything else keeps its value.

Layout operations are executed on the labels as they are. Operations that commute with a positive scale pass them on.
A linear whose input columns carry one label each absorbs them: a balance layer. Whatever else a label reaches refuses
*that label*, with a reason, and a refused label keeps s = 1, for which the invariant holds trivially.

    %y = linear(%x, %wy)
    %t = flip(%y, [-1])
    %r = relu(%t)
    %z = linear(%r, %wz)
    %c = slice(%r, -1, 0, 1)
    %g = gelu(%c)
->                                                                              # of the producer %y
    label of each column of %z: [3 2 1 0]
    label 3 refused: passes gelu, which does not commute with a scale
    stopped at %g: passes gelu, which does not commute with a scale

The invariant is one of real numbers; float32 keeps it to a few roundings. A cast to half precision on the way of a label
between two ends in float32 would not, and refuses it (`rules.refuse_rounding`).
"""

from __future__ import annotations

import operator
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from sqcompile.errors import InternalError, SQCompileError, first_line
from sqcompile.passes.ir.graph import Linear, aten, constants, evaluate, is_channel_vector, leaves, value
from sqcompile.passes.ir.operators import HOMOGENEOUS, LAYOUT, LIKE_SECOND, SHAPE_ONLY
from sqcompile.passes.labels.rules import (
    OUTPUT,
    RULES,
    Flow,
    Refused,
    describe,
    executed,
    narrower,
    refuse_rounding,
    uniform,
)
from sqcompile.passes.labels.values import values_at
from sqcompile.process.interrupts import checkpoint
from sqcompile.pytorch.core import disable_current_modes

_Interpreter = TypeVar("_Interpreter", bound="LabelInterpreter")


def run_labels(gm: fx.GraphModule, linears: list[Linear], symbols: dict[Any, int]) -> dict[str, Flow]:
    """Runs the labels of every producer at one choice of sizes.

    Args:
        gm: a traced graph.
        linears: its linears.
        symbols: a concrete size for each free symbol of the graph's placeholders.

    Returns:
        The flow of each producer, by node name.
    """
    return execute(LabelInterpreter(gm, linears), symbols).flows


def execute(interpreter: _Interpreter, symbols: dict[Any, int]) -> _Interpreter:
    """Runs an interpreter of labels at one choice of sizes."""
    gm = interpreter.module
    assert isinstance(gm, fx.GraphModule)
    interpreter.values = values_at(gm, symbols)
    with disable_current_modes(), torch.no_grad():  # labels are real tensors
        interpreter.run(enable_io_processing=False)
    return interpreter


class LabelInterpreter(fx.Interpreter):
    """Executes labels beside the values there are (`values_at`); a label lives as long as its value."""

    values: dict[fx.Node, Any]

    def __init__(self, gm: fx.GraphModule, linears: list[Linear]) -> None:
        super().__init__(gm)
        self.extra_traceback = False
        self.linears = {l.node: l for l in linears}
        self.const = constants(gm)
        self.flows: dict[str, Flow] = {}
        self.labels: dict[fx.Node, dict[str, Any]] = {}
        self.ways: dict[fx.Node, dict[str, set[torch.dtype]]] = {}  # the dtypes that each label has passed

    def run_node(self, n: fx.Node) -> Any:
        checkpoint()
        out = self.values[n]
        if n not in self.const:
            mine = self._propagate(n, out)
            self._start(n, out, mine)
            if mine:
                self.labels[n] = mine
        for dead in self.user_to_last_uses.get(n, []):
            self.labels.pop(dead, None)
            self.ways.pop(dead, None)
        return out

    def _start(self, n: fx.Node, out: Any, mine: dict[str, Any]) -> None:
        kind = producer_kind(n, n.name in self.linears, self.const)
        if kind and isinstance(out, Tensor) and out.dtype.is_floating_point and out.dim() >= 2 and out.shape[-1] > 1:
            parameters = [value(a).dtype for c in n.all_input_nodes if c in self.const for a in leaves(c)]
            dtype = next((d for d in parameters if d.is_floating_point and narrower(d, out.dtype)), out.dtype)
            self.flows[n.name] = Flow(n.name, kind, out.shape[-1], dtype)
            self.ways.setdefault(n, {})[n.name] = set()
            mine[n.name] = torch.arange(out.shape[-1]).expand(out.shape)

    def _propagate(self, n: fx.Node, out: Any) -> dict[str, Any]:
        seen: dict[str, list[tuple[fx.Node, Any]]] = {}
        inputs = n.all_input_nodes[:1] if n.target in LIKE_SECOND else n.all_input_nodes
        for a in inputs:
            for producer, labels in self.labels.get(a, {}).items():
                seen.setdefault(producer, []).append((a, labels))
        result: dict[str, Any] = {}
        if n.target in SHAPE_ONLY or not seen:
            return result
        for producer, operands in seen.items():
            flow = self.flows[producer]
            way = set().union(*(self.ways[a][producer] for a, _ in operands), _dtypes(out))
            self.ways.setdefault(n, {})[producer] = way
            try:
                labels = self._rule(n, out, flow, operands)
                if labels is not None:
                    result[producer] = labels
            except Refused as e:
                flow.stops[n.name] = reason = str(e)
                for _, labels in operands:
                    flow.refuse(labels, reason)
            except Exception as e:  # of a rule: the values were computed before
                raise rule_failed(n, e) from e
        return result

    def _rule(self, n: fx.Node, out: Any, flow: Flow, operands: list[tuple[fx.Node, Any]]) -> Any:
        if n.op == "output":
            raise Refused(OUTPUT)
        node, labels = operands[0]
        if n.name in self.linears:
            if node is not n.args[0] or len(operands) != 1:
                raise Refused(describe(n))
            columns = labels.reshape(-1, labels.shape[-1])
            if not len(columns) or not bool((columns == columns[:1]).all()):
                raise Refused("is not one column of the linear it reaches")
            refuse_rounding(self.ways[node][flow.producer], flow.dtype, self.env[node].dtype)
            flow.balance.append((n.name, columns[0].clone()))
            return None
        t = n.target
        if t in HOMOGENEOUS:
            if node is not n.args[0]:
                raise Refused(describe(n))
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
        args, kwargs = fx.node.map_arg((n.args[1:], n.kwargs), lambda a: self._argument(n, a, labels))
        if n.target is operator.getitem:
            return labels[args[0]]
        return executed(n, labels, *args, **kwargs)

    def _argument(self, n: fx.Node, a: fx.Node, labels: Any) -> Any:
        """An argument of a layout op as data: a size, or an index tensor."""
        v = self.env[a]
        if not isinstance(v, Tensor):
            return v
        if a in self.const:
            return evaluate(self.module, a).cpu()  # type: ignore[arg-type]  # as labels are
        if n.target in LIKE_SECOND:
            return torch.empty(v.shape, device="meta")
        # rows picked by data (a router's tokens, the last token): fine if every row has the same labels
        dims: Any = []
        if n.target == aten.index.Tensor:
            dims = [d for d, index in enumerate(n.args[1]) if index is a]  # type: ignore[arg-type]
        elif n.target == aten.index_select.default:
            dims = [n.args[1]]
        if dims and not v.dtype.is_floating_point and v.dtype != torch.bool and all(uniform(labels, d) for d in dims):
            return torch.zeros(v.shape, dtype=torch.int64)
        raise Refused("is selected by an index that depends on the input")


def rule_failed(n: fx.Node, error: Exception) -> Exception:
    """What to raise for an error in a rule: never a refusal, which would hide it."""
    if isinstance(error, SQCompileError):
        return error
    what = f"{type(error).__name__}: {first_line(error)}"
    return InternalError(
        f"the rule of {n.target} failed at {n.name}: {what}. This is a fault of sqcompile: please report it, with the shapes "
        "and arguments of that operation"
    )


def _dtypes(out: Any) -> set[torch.dtype]:
    return {x.dtype for x in (out if isinstance(out, (list, tuple)) else (out,)) if isinstance(x, Tensor)}


def producer_kind(n: fx.Node, is_linear: bool, const: set[fx.Node]) -> str | None:
    """How 1/s can be absorbed at this node's output, if it can."""
    if is_linear:
        return "linear"
    if n.target in (aten.layer_norm.default, aten.rms_norm.default) and len(n.args[1]) == 1:  # type: ignore[arg-type]
        return "norm" if all(a in const for a in n.args[2:4] if isinstance(a, fx.Node)) else None
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
