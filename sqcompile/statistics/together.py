"""together: several calls of a graph, run operation by operation, so that each of its weights is there once, and for a short time.

%w = get_attr w_int8             made, or read
%wf = to(%w, float32)            once
%y = linear(%x, %wf)             for each call; then %wf and %w are gone
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import constants, get_tensor
from sqcompile.process.interrupts import checkpoint

See = Callable[[int, fx.Node, Any], None]


def run_together(gm: fx.GraphModule, calls: Sequence[Sequence[Any]], see: See) -> None:
    """Runs a graph. Its lazy weights (``About.lazy``) are made as they are reached.

    Args:
        gm: a graph of operators.
        calls: an argument for each placeholder, of each call.
        see: is given each value: of which call, of which node.
    """
    const, last = constants(gm), _last_uses(gm)
    common: dict[fx.Node, Any] = {}
    own: list[dict[fx.Node, Any]] = [{} for _ in calls]
    given, weights = [iter(arguments) for arguments in calls], _Weights(gm)
    for n in gm.graph.nodes:
        checkpoint()
        if n.op == "output":
            break
        if n in const:
            common[n] = weights.get(str(n.target)) if n.op == "get_attr" else _value(n, common, {})
        for i, env in enumerate(own):
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


class _Weights:
    """A graph's tensors; of a lazy weight, its scale is made with it and kept until it is asked for, or the other way."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm, self.lazy = gm, about(gm).lazy
        self.of_scale = {lazy.scale: name for name, lazy in self.lazy.items()}
        self.made: dict[str, Tensor] = {}

    def get(self, name: str) -> Tensor:
        weight = self.of_scale.get(name, name)
        if weight not in self.lazy:
            return get_tensor(self.gm, name)
        if name not in self.made:
            lazy = self.lazy[weight]
            self.made[weight], self.made[lazy.scale] = lazy.make()
        return self.made.pop(name)
