"""functionalize: in-place operations on tensors of a graph's own become operations that write to nothing. Part of `trace`.

    %t = mul(%x, 2)
    %row = select(%t, 1, 3)                                             # views of %t
    %part = slice(%row, 1, 0, 3)
    %w = copy_(%part, %y)
    %z = sum(%t)
->
    %t = mul(%x, 2)
    %row = select(%t, 1, 3)
    %slice_scatter = slice_scatter(%row, %y, 1, 0, 3)                   # the new %row
    %select_scatter = select_scatter(%t, %slice_scatter, 1, 3)          # the new %t
    %z = sum(%select_scatter)

A write to a view is a new value of what it is a view of, and every later reader of the two, or of another view, reads the
new value. Which tensors lie in the same memory is what export recorded: views have their operand's storage.

PyTorch has this, too (`ExportedProgram.run_decompositions`), and it knows more operators; but it runs the whole program
again, twice, with symbolic sizes, which takes minutes where a model writes in a loop. It is asked for what is refused here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.passes.canonical.canonicalize import drops
from sqcompile.passes.ir.graph import add_op, aten, is_mutable, value
from sqcompile.passes.ir.operators import DROPOUTS, named
from sqcompile.passes.ir.record import layout, record
from sqcompile.passes.ir.symbols import statically_known_true
from sqcompile.pytorch.core import overload_name, schema, storage_id


def _inverse(dims: Any) -> list[int]:
    n = len(dims)
    order = [d % n for d in dims]
    return [order.index(d) for d in range(n)]


# What a write to a view makes of its operand: (gm, the view's node, operand, new value of the view) -> new operand.
_Put = Callable[[fx.GraphModule, fx.Node, fx.Node, fx.Node], fx.Node]
_NAMED: dict[str, _Put] = {
    "select": lambda gm, n, x, y: add_op(gm, aten.select_scatter.default, x, y, *n.args[1:], **n.kwargs),
    "slice": lambda gm, n, x, y: add_op(gm, aten.slice_scatter.default, x, y, *n.args[1:], **n.kwargs),
    "squeezed": lambda gm, n, x, y: add_op(gm, aten.squeeze.dim, y, n.args[1]),
    "transposed": lambda gm, n, x, y: add_op(gm, aten.transpose.int, y, *n.args[1:]),
    "turned": lambda gm, n, x, y: add_op(gm, aten.t.default, y),
    "permuted": lambda gm, n, x, y: add_op(gm, aten.permute.default, y, _inverse(n.args[1])),
    "shaped": lambda gm, n, x, y: add_op(gm, aten.reshape_as.default, y, x),
    "itself": lambda gm, n, x, y: y,
}
_PUT: dict[Any, _Put] = {target: _NAMED[put] for target, put in named("put").items()}


def functionalize(gm: fx.GraphModule) -> bool:
    """Rewrites a graph in place; False, and nothing written anew, where it has a write that is not understood.

    Args:
        gm: with a record (`About`), and with values as export recorded them.
    """
    writes = [n for n in gm.graph.nodes if is_mutable(n.target)]
    if not all(isinstance(n.args[0], fx.Node) for n in writes):
        return False
    memory, same = {}, dict[Any, Any]()
    for n in gm.graph.nodes:
        memory[n] = mine = {same.get(s, s) for s in _storages(value(n))}
        if n.target in DROPOUTS and not drops(n):  # gives its operand as it is, which no recorded value says
            memory[n] = memory[n.args[0]]
            same |= dict.fromkeys(mine - memory[n], next(iter(memory[n])))
            n.replace_all_uses_with(n.args[0])
    written = {s for n in writes for s in memory[n.args[0]]}
    shared = {n: m & written for n, m in memory.items() if m & written}
    owners: dict[Any, fx.Node] = {}
    parents: dict[fx.Node, fx.Node] = {}
    for n, mine in shared.items():
        known = [a for a in n.all_input_nodes if shared.get(a, set()) & mine]
        if n.op != "call_function":
            return False  # an input or a parameter, which is not the graph's own
        if is_mutable(n.target) or (known and known == [n.args[0]]):
            parents[n] = n.args[0]
        elif known or len(mine) > 1:
            return False  # several operands in one memory
        elif owners.setdefault(next(iter(mine)), n) is not n:
            return False
    if not all(n in parents and _understood(n, parents) for n in writes):
        return False
    _Rewriter(gm, parents).run(writes)
    return True


def _storages(v: Any) -> set[Any]:
    parts = v if isinstance(v, (list, tuple)) else [v]
    return {storage_id(p) for p in parts if isinstance(p, Tensor)}


def _understood(n: fx.Node, parents: dict[fx.Node, fx.Node]) -> bool:
    """Whether a write is of one tensor, in place, and through views that `_PUT` has."""
    form, tags = schema(n.target), n.target.tags  # type: ignore[union-attr]
    written = [a.alias_info is not None and a.alias_info.is_write for a in form.arguments]
    if not written[0] or any(written[1:]) or len(form.returns) != 1 or len(n.all_input_nodes) < len(_tensors(n)):
        return False
    if torch.Tag.inplace_view in tags or torch.Tag.nondeterministic_seeded in tags or _functional(n.target) is None:
        return False
    if n.target == aten.copy_.default and value(n.args[0]).device != value(n.args[1]).device:  # type: ignore[arg-type]
        return False
    node = parents[n]
    while node in parents:
        if node.target not in _PUT and not is_mutable(node.target):
            return False
        node = parents[node]
    return True


def _tensors(n: fx.Node) -> list[Any]:
    return [a for a in n.args if isinstance(a, fx.Node)]


def _functional(target: Any) -> Any:
    """The operator without the write: aten.add.Tensor of aten.add_.Tensor."""
    if target == aten.copy_.default:
        return target
    packet = getattr(aten, schema(target).name.partition("::")[2].removesuffix("_"), None)
    return getattr(packet, overload_name(target), None)


class _Rewriter:
    """Goes through the graph once and knows at each node what the tensors written so far are by now."""

    def __init__(self, gm: fx.GraphModule, parents: dict[fx.Node, fx.Node]) -> None:
        self.gm, self.parents = gm, parents
        self.writes: dict[fx.Node, int] = {}  # to each owner so far
        self.now: dict[fx.Node, tuple[int, fx.Node]] = {}  # of an owner or a view: after how many writes, and its value

    def run(self, writes: list[fx.Node]) -> None:
        written, moved = set(writes), set[fx.Node]()  # moved: whose strides are others than before
        for n in list(self.gm.graph.nodes):
            with self.gm.graph.inserting_before(n):
                if n in written:
                    self._write(n)
                    continue
                before = n.args, n.kwargs
                n.args, n.kwargs = fx.node.map_arg(before, self.latest)
                if n.op == "call_function" and ((n.args, n.kwargs) != before or moved & set(n.all_input_nodes)):
                    old = layout(value(n))
                    record(self.gm, n)
                    if layout(value(n)) != old:
                        moved.add(n)
            if n in self.parents:
                self.now[n] = self._count(n), n
        for n in reversed(writes):
            self.gm.graph.erase_node(n)

    def owner(self, n: fx.Node) -> fx.Node:
        while n in self.parents:
            n = self.parents[n]
        return n

    def _count(self, n: fx.Node) -> int:
        return self.writes.get(self.owner(n), 0)

    def latest(self, n: fx.Node) -> fx.Node:
        """What n holds by now. Call inside ``graph.inserting_before``."""
        count, node = self.now.get(n, (0, n))
        if count == self._count(n):
            return node
        operand = self.latest(self.parents[n])  # an owner is written by `_write` alone, and up to date
        if is_mutable(n.target) or n.target == aten.detach_.default:  # the result is what was written to
            return operand
        rest = fx.node.map_arg((n.args[1:], n.kwargs), self.latest)
        node = add_op(self.gm, n.target, operand, *rest[0], **rest[1])  # type: ignore[arg-type]
        self.now[n] = self._count(n), node
        return node

    def _write(self, n: fx.Node) -> None:
        target = self.parents[n]
        old = self.latest(target)
        args, kwargs = fx.node.map_arg((n.args[1:], n.kwargs), self.latest)
        new: Any
        if n.target == aten.copy_.default:
            new = args[0]
        else:
            new = add_op(self.gm, _functional(n.target), old, *args, **kwargs)
        if value(new).dtype != value(old).dtype:
            new = add_op(self.gm, aten.to.dtype, new, value(old).dtype)
        sizes = zip(value(new).shape, value(old).shape, strict=False)
        if value(new).dim() != value(old).dim() or not all(statically_known_true(a == b) for a, b in sizes):
            new = add_op(self.gm, aten.expand_as.default, new, old)
        changed = [(target, new)]
        node = target
        while node in self.parents:
            operand = self.parents[node]
            if not is_mutable(node.target):  # the result of an earlier write is what was written to
                new = _PUT[node.target](self.gm, node, self.latest(operand), new)
            changed.append((operand, new))
            node = operand
        self.writes[node] = self.writes.get(node, 0) + 1
        for view, v in [*changed, (n, changed[0][1])]:
            self.now[view] = self.writes[node], v
