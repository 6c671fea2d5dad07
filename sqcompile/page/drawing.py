"""drawing: the graph of a compiled model, as an HTML page for a frame of the report."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from sqcompile.draw import document
from sqcompile.plan.plan import Plan


def drawing(stages: Mapping[str, fx.GraphModule], plan: Plan) -> str:
    """A page of its own with the traced graph, which other stages differ from in single operations.

    Raises:
        StageError: if the float model is gone, from which stages are rebuilt, or its parameters changed.
    """
    return document({"traced": stages["traced"]}, plan, "graph")
