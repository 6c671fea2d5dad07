"""result: what `bisect` found, as data; ``str`` of it is what it prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SiteError:
    """What folding changes in the model's outputs, of one site or of several.

    Attributes:
        name: the site's name in ``plan.scales``, or of an attention, whose scales ``plan.heads`` has.
        label: the same as a person would write it.
        error: ``|folded - traced| / |traced|`` of the worst output; infinite where it cannot be computed.
        tolerance: what rounding may cost, in the dtype the graphs were run in.
        drawn: whether the scales are drawn at random, as the plan smooths nothing there.
        failure: the exception that folding or running raised, in words; None if none.
    """

    name: str
    label: str
    error: float
    tolerance: float
    drawn: bool = False
    failure: str | None = None

    @property
    def wrong(self) -> bool:
        return not self.error <= self.tolerance


@dataclass(frozen=True)
class NodeError:
    """How far a lowered operator's result is from the quantized stage's, both of the quantized stage's own inputs.

    Attributes:
        name: the linear's or attention's name in the plan; of any other node, the node's own.
        label: the same as a person would write it.
        operator: what computes the result in the lowered stage.
        error: ``|lowered - quantized| / |quantized|``; infinite for another shape, dtype, or NaN in other places.
        tolerance: what rounding may cost in the result's dtype.
    """

    name: str
    label: str
    operator: str
    error: float
    tolerance: float

    @property
    def wrong(self) -> bool:
        return not self.error <= self.tolerance


@dataclass(frozen=True, repr=False)
class Bisection:
    """Errors of folding, site by site, and of lowering, node by node. ``str`` of it is a table of both.

    Attributes:
        folds: one for each site, in graph order.
        together: of all sites at once.
        wrong_together: a smallest set of sites that is wrong, where each of them alone is right; else empty.
        lowering: one for each INT8 linear and attention, and for what else is wrong, in graph order.
        dtype: that the traced and folded graphs were run in: float64, or where that cannot be float32 or the model's own.
    """

    folds: tuple[SiteError, ...]
    together: SiteError
    wrong_together: tuple[SiteError, ...]
    lowering: tuple[NodeError, ...]
    dtype: torch.dtype

    @property
    def first_wrong_fold(self) -> SiteError | None:
        """The first site, in graph order, whose fold alone changes the function."""
        return next((s for s in self.folds if s.wrong), None)

    @property
    def first_wrong_node(self) -> NodeError | None:
        """The first lowered node, in graph order, that is not what it stands for."""
        return next((n for n in self.lowering if n.wrong), None)

    @property
    def right(self) -> bool:
        """Whether nothing is wrong."""
        return not self.together.wrong and self.first_wrong_fold is None and self.first_wrong_node is None

    def __repr__(self) -> str:
        names = (x and x.name for x in (self.first_wrong_fold, self.first_wrong_node))
        return "Bisection(first_wrong_fold={!r}, first_wrong_node={!r})".format(*names)

    def __str__(self) -> str:
        return "\n".join([*self._of_folds(), "", *self._of_lowering()])

    def _of_folds(self) -> list[str]:
        dtype = str(self.dtype).removeprefix("torch.")
        lines = [f"folds: relative error of the outputs with one site folded, in {dtype}"]
        if not self.folds:
            return [*lines, "  no site can be folded"]
        more = [s.failure or ("drawn scales" if s.drawn else "") for s in self.folds]
        lines += _table(self.folds, more)
        lines += _table([self.together], [self.together.failure or ""], max(len(s.label) for s in self.folds))
        first, tolerance = self.first_wrong_fold, f"{self.together.tolerance:.1e}"
        if first is not None:
            return [*lines, f"first wrong fold: {first.label} (rounding may cost {tolerance})"]
        if self.wrong_together:
            return [*lines, f"right alone, wrong together: {'; '.join(s.label for s in self.wrong_together)}"]
        return [*lines, f"every fold is right, to {tolerance}"]

    def _of_lowering(self) -> list[str]:
        lines = ["lowering: relative error of each INT8 result, computed from the quantized stage's values"]
        if self.together.failure:
            return [*lines, "  not compared, as folding fails"]
        if not self.lowering:
            return [*lines, "  nothing is in INT8"]
        lines += _table(self.lowering, [n.operator for n in self.lowering])
        first = self.first_wrong_node
        if first is not None:
            return [*lines, f"first wrong node: {first.label} (rounding may cost {first.tolerance:.1e})"]
        return [*lines, f"every lowered node is right, to {max(n.tolerance for n in self.lowering):.1e}"]


def _table(errors: Sequence[SiteError | NodeError], more: Sequence[str], width: int = 0) -> list[str]:
    """A line for each: label, error, what else there is to say, whether it is wrong, and of several the worst."""
    width = max(width, *(len(e.label) for e in errors))
    worst = max((e.error for e in errors if len(errors) > 1), default=None)
    lines = []
    for e, rest in zip(errors, more, strict=True):
        marks = ["wrong"] * e.wrong + ["worst"] * (e.error == worst and e.error > 0)
        mark = f"<- {', '.join(marks)}" if marks else ""
        lines.append("  ".join(part for part in (f"  {e.label:{width}}", f"{e.error:7.1e}", rest, mark) if part))
    return lines
