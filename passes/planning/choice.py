"""choice: what may be done with a site, and what is known of the sites of a graph while one is chosen for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from sqcompile.passes.planning.products import column_absmax
from sqcompile.plan.entries import Smoothing


@dataclass(frozen=True, eq=False)
class Choice:
    """What is done with a site.

    Attributes:
        scales: float32 [3, C], s, and what either half of the tokens would have chosen; None without smoothing.
        alpha: the migration strength that they come from.
        block: the size of the blocks in which the inputs are rotated; None without rotation.
        dynamic: whether the inputs of a static recipe have scales of their tokens after all.
    """

    scales: Tensor | None = None
    alpha: float | None = None
    block: int | None = None
    dynamic: bool = False


# By α, block and dynamic, what the candidates of a site cost, and whether that is what the outputs lose.
Costs = tuple[bool, dict[tuple[float | None, int | None, bool], float]]


@dataclass(frozen=True, eq=False)
class Known:
    """What is the same however often the sites of a graph are looked at, with the same statistics, recipe and gradients.

    Attributes:
        costs: of a site, its linears, whether by loss, and a candidate.
        column_absmax: max|W_:j| of a linear, float32 [K].
        errors: of a linear, under the sum of its s, a rotation, and whether its input is dynamic: its own error.
    """

    costs: dict[tuple[str, tuple[str, ...], bool, float | None, int | None, bool], float] = field(default_factory=dict)
    column_absmax: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[tuple[str, float | None, int | None, bool], float] = field(default_factory=dict)

    def largest_of(self, name: str, weight: Callable[[], Tensor]) -> Tensor:
        """max|W_:j| of a linear, float32 [K], of all experts; the weight is made if that is not known yet."""
        if name not in self.column_absmax:
            self.column_absmax[name] = column_absmax(weight())
        return self.column_absmax[name]


Note = tuple[Smoothing, str, float | None]  # what was done with a linear's input, why, and the site's alpha
