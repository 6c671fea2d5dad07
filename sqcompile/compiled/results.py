"""results: what a compiled graph hands out is the caller's, who may write to it, as with the float model."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor, fx

from sqcompile.pytorch.core import DispatchKey, OpOverload, schema


def with_own_results(run: Callable[..., Any], flat: fx.GraphModule, of_model: Collection[str]) -> Callable[..., Any]:
    """Copies the results of a flat graph that lie in tensors which compiling has made of constants, such as ``gain.exp()``.

    ``of_model``: names of tensors that are the model's own. Those it hands out itself, call by call the same.
    """
    outputs = next(iter(reversed(flat.graph.nodes))).args[0]
    made = [i for i, n in enumerate(outputs) if isinstance(n, fx.Node) and _lies_in(n) - {*of_model}]
    return changed(run, made, lambda y: y.clone()) if made else run


def changed(
    run: Callable[..., Any], which: Sequence[int], change: Callable[[Tensor], Tensor]
) -> Callable[..., list[Any]]:
    """A flat graph some of whose results are changed, by their places."""

    def run_changed(*args: Any) -> list[Any]:
        out = list(run(*args))
        for i in which:
            out[i] = change(out[i])
        return out

    return run_changed


def _lies_in(output: fx.Node) -> set[str]:
    """The tensors of the graph whose memory an output may have, by name."""
    found, seen, todo = set[str](), set[fx.Node](), [output]
    while todo:
        n = todo.pop()
        if n.op == "get_attr":
            found.add(str(n.target))
        elif n not in seen and n.op == "call_function" and n.args and _may_share(n.target):
            operands = n.args[0] if isinstance(n.args[0], (list, tuple)) else [n.args[0]]
            todo += [x for x in operands if isinstance(x, fx.Node)]
        seen.add(n)
    return found


def _may_share(target: Any) -> bool:
    """Whether an operator may hand out its first operand's memory: views do, and composite operators may, such as a cast to the
    dtype that is there. All others give memory of their own, by the rules of ATen."""
    if target is operator.getitem:
        return True
    composite = DispatchKey.CompositeImplicitAutograd
    return isinstance(target, OpOverload) and (
        any(r.alias_info is not None for r in schema(target).returns) or target.has_kernel_for_dispatch_key(composite)
    )
