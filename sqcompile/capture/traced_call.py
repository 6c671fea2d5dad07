"""traced_call: what a model is captured with, and its graph without arguments that the model takes and does not read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx, nn

from sqcompile.capture.batches import TARGETS
from sqcompile.capture.captured import unread
from sqcompile.capture.inputs import Call, Forward, Reader
from sqcompile.capture.trace import trace


def example_call(model: nn.Module, example: Any) -> Call | None:
    """The call of a batch that a user gives to capture a model with, labels included; None without one."""
    return None if example is None else Reader(model, TARGETS).call(example)


def traced_call(model: nn.Module, call: Call, dynamic_shapes: Any, forward: Forward) -> tuple[fx.GraphModule, Call]:
    """The traced graph, and the call that it serves.

    Args:
        model, call, dynamic_shapes: as for `trace`.
        forward: how the model is called.

    Raises:
        CaptureError: as `trace`.
    """
    traced = trace(model, call, dynamic_shapes)
    if idle := unread(traced, forward):
        left = {n: v for n, v in call.kwargs.items() if n not in idle}
        call = replace(call, kwargs=left, ignored=tuple(sorted(idle)))
        traced = trace(model, call, dynamic_shapes)
    return traced, call
