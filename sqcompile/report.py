"""Report: what was done with every linear, and why."""

from __future__ import annotations

from dataclasses import dataclass

from sqcompile.names import SiteLabel, collapse, site_labels
from sqcompile.plan import LayerPlan, Plan


@dataclass(frozen=True)
class Report:
    """One entry per linear, in graph order; ``print(report)`` gives one line each, then the sites.

    Attributes:
        layers: name, kind, quantized, smoothing, reason, alpha, sqnr_db (see LayerPlan).
        sites: the smoothed sites as a person would write them; ``key`` is the name in the plan.
    """

    layers: tuple[LayerPlan, ...]
    sites: tuple[SiteLabel, ...]

    @staticmethod
    def of(plan: Plan) -> Report:
        return Report(plan.layers, site_labels(plan.scales, [l.name for l in plan.layers]))

    def __str__(self) -> str:
        width = max((len(l.name) for l in self.layers), default=0)
        lines = []
        for l in self.layers:
            alpha = f"α {l.alpha:.2f}" if l.alpha is not None else ""
            sqnr = f"{l.sqnr_db:5.1f} dB" if l.sqnr_db is not None else ""
            kind = "int8" if l.quantized else "float"
            lines.append(f"{l.name:{width}}  {kind:5}  {l.smoothing:10}  {alpha:6}  {sqnr:8}  {l.reason}".rstrip())
        if self.sites:
            lines += ["sites:", *(f"  {line}" for line in collapse(map(str, self.sites)))]
        done = sum(l.quantized for l in self.layers)
        folded = sum(l.smoothing == "folded" for l in self.layers)
        lines.append(f"{done} of {len(self.layers)} linears in INT8, {folded} with smoothing folded into parameters")
        return "\n".join(lines)
