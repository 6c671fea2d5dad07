"""drawing: the graph of a compiled model, as an HTML page for a frame of the report."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from sqcompile.draw import fold_repeats, roles_of
from sqcompile.draw.condense import condense
from sqcompile.draw.svg import page, render
from sqcompile.plan.plan import Plan


def drawing(stages: Mapping[str, fx.GraphModule], plan: Plan) -> str:
    """A page of its own with the traced graph; of equal blocks in a row, one is drawn.

    Raises:
        StageError: if the float model is gone, from which stages are rebuilt, or its parameters changed.
    """
    traced = stages["traced"]
    roles = roles_of(traced, plan)
    return page(render(fold_repeats(condense(traced, roles)), roles.reasons), "graph")
