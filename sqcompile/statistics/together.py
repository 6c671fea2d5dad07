"""together: several calls of a graph, run operation by operation, so that each of its weights is there once, and for a short time.

%w = get_attr w_int8             made, or read
%wf = to(%w, float32)            once
%y = linear(%x, %wf)             for each call; then %wf and %w are gone
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import constants
from sqcompile.passes.ir.lazy import Weights
from sqcompile.passes.ir.operators import MEETINGS
from sqcompile.process.interrupts import checkpoint
from sqcompile.process.progress import each

See = Callable[[int, fx.Node, Any], None]


def run_together(gm: fx.GraphModule, calls: Sequence[Sequence[Any]], see: See) -> None:
    """Runs a graph. Its lazy weights (``About.lazy``) are made as they are reached.

    Args:
        gm: a graph of operators.
        calls: an argument for each placeholder, of each call.
        see: is given each value: of which call, of which node.
    """
    const, last, parallel = constants(gm), _last_uses(gm), about(gm).parallel
    common: dict[fx.Node, Any] = {}
    own: list[dict[fx.Node, Any]] = [{} for _ in calls]
    given, weights = [iter(arguments) for arguments in calls], Weights(gm)
    for n in each([*gm.graph.nodes], "compare"):
        checkpoint()
        if n.op == "output":
            break
        if n in const:
            common[n] = weights.get(str(n.target)) if n.op == "get_attr" else _value(n, common, {})
        for i, env in enumerate(own):
            if n.target in MEETINGS:
                parallel.meet(n.name)
            if n not in const:
                env[n] = next(given[i]) if n.op == "placeholder" else _value(n, common, env)
            see(i, n, common[n] if n in const else env[n])
        for old in last.get(n, ()):
            for env in (common, *own):
                env.pop(old, None)


def _value(n: fx.Node, common: dict[fx.Node, Any], own: dict[fx.Node, Any]) -> Any:
    args: Any
    kwargs: Any
    args, kwargs = fx.node.map_arg((n.args, n.kwargs), lambda a: common[a] if a in common else own[a])
    return n.target(*args, **kwargs)  # type: ignore[operator]


def _last_uses(gm: fx.GraphModule) -> dict[fx.Node, list[fx.Node]]:
    """By node, what no later one reads; what nobody reads is its own."""
    last = {n: n for n in gm.graph.nodes}
    for n in gm.graph.nodes:
        if n.op != "output":
            last.update(dict.fromkeys(n.all_input_nodes, n))
    found: dict[fx.Node, list[fx.Node]] = {}
    for old, n in last.items():
        found.setdefault(n, []).append(old)
    return found
