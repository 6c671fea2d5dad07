"""summary: where smoothing can go in a traced graph, and where not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from sqcompile.passes.ir.graph import find_linears
from sqcompile.passes.labels.match import match
from sqcompile.plan.names import collapse, refusal_lines, site_labels


@dataclass(frozen=True)
class Summary:
    """The sites that `match` finds in a graph, and what it refuses; ``str`` of it is for people.

    Attributes:
        linears: how many linears there are.
        sites: the sites, as a person would write them, those of repeated layers in one.
        count: how many sites.
        refused: the linears at none, which run in INT8 with an explicit x·(1/s), and why no parameter can absorb it.
        refusals: how many linears.
    """

    linears: int
    sites: tuple[str, ...]
    count: int
    refused: tuple[str, ...]
    refusals: int

    @staticmethod
    def of(traced: fx.GraphModule) -> Summary:
        """The summary of a traced graph."""
        sites, refusals = match(traced)
        names = [l.name for l in find_linears(traced)]
        found = collapse(map(str, site_labels([s.name for s in sites], names)))
        refused = refusal_lines([(r.linear.name, r.reason) for r in refusals], names)
        return Summary(len(names), tuple(map(str, found)), len(sites), tuple(map(str, refused)), len(refusals))

    def as_dict(self) -> dict[str, Any]:
        """The same for machines."""
        return {"linears": self.linears, "sites": [*self.sites], "refused": [*self.refused]}

    def __str__(self) -> str:
        lines = [
            f"{self.linears} linears, {self.linears - self.refusals} of them at {self.count} sites where a parameter absorbs "
            "1/s",
            *(f"  {line}" for line in self.sites),
        ]
        if self.refused:
            lines.append(
                f"{self.refusals} of them at none: INT8 runs there all the same, with x·(1/s) multiplied explicitly, as no "
                "parameter can absorb 1/s:"
            )
            lines += [f"  {line}" for line in self.refused]
        return "\n".join(lines)
