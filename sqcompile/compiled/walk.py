"""walk: a stage's graph is run node by node, and each value looked at as it is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.process.interrupts import checkpoint


def values(
    gm: fx.GraphModule, arguments: Sequence[Any], instead: Callable[[fx.Node, Any], Any] = lambda n, v: v
) -> Iterator[tuple[fx.Node, Any]]:
    """Runs a graph, and gives each node with its value as it is computed; values live as long as they are read.

    Args:
        arguments: one for each placeholder.
        instead: takes a node and its value, and gives the value that readers of the node get.
    """
    run = fx.Interpreter(gm)
    run.extra_traceback = False
    run.args_iter = iter(arguments)
    for n in gm.graph.nodes:
        checkpoint()
        run.env[n] = value = instead(n, run.run_node(n))
        yield n, value
        del value
        for dead in run.user_to_last_uses.get(n, []):
            del run.env[dead]


@contextlib.contextmanager
def without_autocast(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Without a user's autocast on the devices of some tensors: INT8 values need float32."""
    with contextlib.ExitStack() as stack:
        for kind in {"cpu", *(t.device.type for t in tensors)}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield
