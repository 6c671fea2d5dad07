"""dynamic: sizes of inputs are dynamic from the first call, so that prefill and decode are one compilation each.

By default Dynamo takes every size for fixed until it changes: a prompt of another length, or the second decoded token,
would compile again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.pytorch.dynamo import (
    TensorifyScalarRestartAnalysis,
    UnspecializeRestartAnalysis,
    config,
    has_static_address,
    marked_dynamic,
    maybe_mark_dynamic,
)


class _TraceAgain(TensorifyScalarRestartAnalysis, UnspecializeRestartAnalysis):
    """The first may come from a backend; the second makes Dynamo forget which graph breaks it foresaw, by position.

    With symbolic sizes it takes another way: even unpacking ``x.shape`` does, once the graph has a size as an input.
    """


def make_dynamic(
    gm: fx.GraphModule, examples: Sequence[Any], is_constant: Callable[[Tensor], bool], keep_fixed: bool
) -> None:
    """Marks the sizes of a graph's inputs, and has Dynamo trace it again where it took one for fixed.

    Nothing is done where torch.compile was told ``dynamic=True`` or ``False``. Sizes of 0 and 1 stay what they are, and
    with ``keep_fixed`` (for CUDA graphs) so do those of inputs of a fixed address, such as a static cache.

    Raises:
        TensorifyScalarRestartAnalysis: for Dynamo, which then traces again: the one restart that a backend may ask for.
    """
    if not config.assume_static_by_default or not config.automatic_dynamic_shapes:
        return
    new = False
    for node, x in zip(gm.graph.find_nodes(op="placeholder"), examples, strict=True):
        if not isinstance(x, Tensor) or isinstance(x, torch.nn.Parameter) or is_constant(x):
            continue
        if keep_fixed and has_static_address(x):
            continue
        fake = node.meta["example_value"]
        marked = marked_dynamic(x)
        for d, size in enumerate(fake.shape):
            if isinstance(size, int) and size > 1 and d not in marked:
                maybe_mark_dynamic(x, d)
                new = True
    if new:
        raise _TraceAgain(restart_reason="smoothquant: sizes of inputs are dynamic")
