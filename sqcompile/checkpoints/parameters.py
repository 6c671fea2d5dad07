"""parameters: what a folded graph makes of each parameter, as a new value for it.

    %div = div(%g, %smooth_0)
    %n = layer_norm(%x, [4], %div, %b)
    %mul = mul(transpose(%w, 0, 1), %smooth_0_columns)
    %q = linear(%n, %mul)
->
    g: %div,  w: transpose(%mul, 0, 1)

`fold` wraps a parameter in arithmetic where it is read, and leaves it as it is. A checkpoint has one value for each
parameter, so that a new one exists only if all who read the parameter want the same, and if what stands between the
parameter and its reader can be undone: E(p') = E(p) · s for an expression E that moves elements, casts them, or adds a
number. What has no new value says which scales are in the way, and why.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.errors import ArtifactError
from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import aten, constants, evaluate, get_tensor, leaves, nodes_by_name, value
from sqcompile.passes.ir.operators import Fact, having

_SAME = having(Fact.COPY, Fact.CAST, Fact.MOVE)  # values, whatever their dtype and place

# The tensors that `fold` adds: for the i-th site, attention or shifted group of linears.
_ADDED = re.compile(r"(smooth|queries|keys|shift)_(\d+)")
_KINDS = {"smooth": "smooth", "shift": "shift", "queries": "heads", "keys": "heads"}

Undo = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Change:
    """A place where the folded graph reads something else than the traced one.

    Attributes:
        leaf: the parameter, by the name that the graph has for it; None where there is none.
        after: the node that is read instead.
        undo: what makes of its value one of the parameter; None where nothing does.
        scales: what of the plan is in it: ("smooth", i) is the i-th site's scale, ("heads", i) the i-th attention's, and
            ("shift", i) what is taken off the inputs of the i-th group of linears.
        why: why there is no ``leaf`` or no ``undo``, in words; else "".
    """

    leaf: str | None
    after: fx.Node
    undo: Undo | None
    scales: frozenset[tuple[str, int]]
    why: str = ""


@dataclass(frozen=True)
class Parameters:
    """The changed parameters of a folded graph.

    Attributes:
        folded: the graph.
        changes: by parameter, all reads of it that want the same new value.
        failed: (scales, reason) for each that no new value of a parameter is the same as.
    """

    folded: fx.GraphModule
    changes: dict[str, Change] = field(default_factory=dict)
    failed: list[tuple[frozenset[tuple[str, int]], str]] = field(default_factory=list)

    def new(self, leaf: str) -> Tensor:
        """The new value of a changed parameter, in its own shape and dtype.

        Raises:
            ArtifactError: if the parameter is finite, and its new value is not.
        """
        return _value(self.folded, self.changes[leaf], get_tensor(self.folded, leaf))


def find_parameters(traced: fx.GraphModule, folded: fx.GraphModule, saved: set[str]) -> Parameters:
    """The new values of a graph's parameters.

    Args:
        traced: the graph before `fold`.
        folded: and after.
        saved: the names of what a checkpoint of the model holds.
    """
    found = Parameters(folded)
    changed: dict[str, list[Change]] = {}
    kept: dict[str, str] = {}  # by parameter, who reads it as it was
    names = about(traced).aliases
    const, before, after = constants(traced), nodes_by_name(traced), constants(folded)
    for node in folded.graph.nodes:
        if node in after:
            continue
        old = before.get(node.name)
        for a in node.all_input_nodes:
            if a not in after:
                continue
            new = frozenset(s for n in leaves(a) if n.name not in before for s in _scales(n))
            if not new:
                kept.update((str(n.target), node.name) for n in leaves(a))
                continue
            change = _change(old, node.args.index(a), a, new, const)
            if change.leaf is not None and not any(n in saved for n in names.get(change.leaf, ())):
                change = Change(None, a, None, new, f"{change.leaf} is no parameter that a checkpoint holds")
            if change.leaf is None or change.undo is None:
                found.failed.append((new, change.why))
            else:
                changed.setdefault(change.leaf, []).append(change)
    for leaf, changes in changed.items():
        every = frozenset().union(*(c.scales for c in changes))
        if leaf in kept:
            found.failed.append(
                (every, f"{_said(names, leaf)} is read by {kept[leaf]}, too, and would need two values")
            )
        elif not _agree(folded, leaf, changes):
            found.failed.append(
                (every, f"{_said(names, leaf)} is read {len(changes)} times, and would need two values")
            )
        else:
            found.changes[leaf] = changes[0]
    return found


def undo_layout(node: fx.Node) -> tuple[str, Undo] | None:
    """The parameter that a constant expression only transposes, and what undoes that for [..., N, K] and [..., N, 1]."""
    steps = _steps(node, layout_alone=True)
    return None if isinstance(steps, str) else (str(steps[0].target), steps[1])


def _change(
    old: fx.Node | None, argument: int, a: fx.Node, new: frozenset[tuple[str, int]], const: set[fx.Node]
) -> Change:
    was = old.args[argument] if old is not None and argument < len(old.args) else None
    if not isinstance(was, fx.Node) or was not in const:
        return Change(None, a, None, new, "there is no parameter for it")
    steps = _steps(was)
    if isinstance(steps, str):
        return Change(None, a, None, new, steps)
    return Change(str(steps[0].target), a, steps[1], new)


def _steps(node: fx.Node, layout_alone: bool = False) -> tuple[fx.Node, Undo] | str:
    """The parameter that an expression is made of, and what undoes the expression; or why there is none, in words."""
    undo: list[Undo] = []
    while node.op != "get_attr":
        inputs = node.all_input_nodes
        step = _inverse(node, layout_alone) if len(inputs) == 1 and node.args and node.args[0] is inputs[0] else None
        if step is None:
            return (
                f"a weight there is computed by {getattr(node.target, '__name__', node.target)}, which cannot be undone"
            )
        undo.append(step)
        node = inputs[0]

    def run(x: Tensor) -> Tensor:
        for f in undo:
            x = f(x)
        return x

    return node, run


def _inverse(node: fx.Node, layout_alone: bool) -> Undo | None:
    """What undoes one operator; the dtype is not looked at, as a new value gets its parameter's in the end."""
    t, args = node.target, node.args
    if t in _SAME:
        return lambda x: x
    if t == aten.t.default:
        return lambda x: x.t()
    if t == aten.transpose.int:
        return lambda x: x.transpose(args[1], args[2])  # type: ignore[arg-type]
    if t == aten.permute.default:
        order: Any = args[1]
        dims = [d % len(order) for d in order]
        return lambda x: x.permute([dims.index(i) for i in range(len(dims))])
    if layout_alone:
        return None
    if t in (
        aten.view.default,
        aten.reshape.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.flatten.using_ints,
    ):
        shape = tuple(int(n) for n in value(args[0]).shape)  # type: ignore[arg-type]
        return lambda x: x.reshape(shape)
    if t == aten.add.Tensor and isinstance(args[1], (int, float)) and not node.kwargs:
        return lambda x: x - args[1]  # type: ignore[operator]
    return None


def _scales(n: fx.Node) -> list[tuple[str, int]]:
    found = _ADDED.match(str(n.target))
    return [] if found is None else [(_KINDS[found[1]], int(found[2]))]


def _agree(folded: fx.GraphModule, leaf: str, changes: list[Change]) -> bool:
    like = get_tensor(folded, leaf)
    first, *others = changes
    return all(torch.equal(_value(folded, first, like), _value(folded, other, like)) for other in others)


def _value(folded: fx.GraphModule, change: Change, like: Tensor) -> Tensor:
    assert change.undo is not None
    new = change.undo(evaluate(folded, change.after)).to(like.dtype)
    if not bool(new.isfinite().all()) and bool(like.isfinite().all()):
        raise ArtifactError(
            f"{change.leaf} does not fit {like.dtype} once it is smoothed: load the model in bfloat16 or float32, or "
            "calibrate it with a smaller alpha"
        )
    return new


def _said(names: dict[str, tuple[str, ...]], leaf: str) -> str:
    return " = ".join(names.get(leaf, (leaf,)))
