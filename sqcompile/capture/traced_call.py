"""traced_call: the traced graph of a call of a model, without arguments that the model takes and does not read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx, nn

from sqcompile.capture.captured import unread
from sqcompile.capture.inputs import Call, Forward
from sqcompile.capture.trace import trace


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
