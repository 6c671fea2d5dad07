"""compare: two reports of one model, side by side: what one recipe does with each linear, and what the other."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqcompile.compiled.report import Report
from sqcompile.compiled.report_text import span
from sqcompile.errors import PlanError
from sqcompile.plan.entries import LayerPlan
from sqcompile.plan.names import abbreviated, grouped
from sqcompile.plan.notebook import line, table, titled
from sqcompile.plan.recipe import Recipe

_FEELS = 0.05  # dB of SQNR that are printed


@dataclass(frozen=True)
class Difference:
    """One linear with which two recipes do different things, or not equally well.

    Attributes:
        name: the weight's qualified name.
        a: its entry in the first report.
        b: its entry in the second one.
    """

    name: str
    a: LayerPlan
    b: LayerPlan

    @property
    def gain_db(self) -> float | None:
        """By how much the second SQNR is higher, in dB; None where one of them is not known."""
        if self.a.sqnr_db is None or self.b.sqnr_db is None:
            return None
        return 0.0 if self.a.sqnr_db == self.b.sqnr_db else self.b.sqnr_db - self.a.sqnr_db  # both may be infinite


@dataclass(frozen=True)
class Comparison:
    """What differs between two reports of one model; ``print`` it for a table, in which repeated blocks are one line.

    Attributes:
        names: what the two are called: "a" and "b".
        linears: how many the model has.
        differences: the linears that differ in number format, smoothing, α, rotation, scales of input or weight, or in SQNR
            by 0.05 dB or more, in graph order.
        quantized: how many linears run in INT8 (or FP8), of each.
        mean_sqnr_db: of the linears whose SQNR both know and which neither computes exactly, of each; None where there is
            none.
        dtypes: the number format of quantized linears, of each.
        recipes: what was asked for, of each; None of a report alone, which does not say it.
    """

    names: tuple[str, str]
    linears: int
    differences: tuple[Difference, ...]
    quantized: tuple[int, int]
    mean_sqnr_db: tuple[float, float] | None
    dtypes: tuple[str, str] = ("int8", "int8")
    recipes: tuple[Recipe | None, Recipe | None] = (None, None)

    def __str__(self) -> str:
        rows = [("", *self.names, "SQNR"), *self._rows()] if self.differences else []
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
        cells = [[*(f"{c:{w}}" for c, w in zip(row, widths, strict=False)), row[3]] for row in rows]
        return "\n".join([*("  ".join(row).rstrip() for row in cells), *self._summary()])

    def __repr__(self) -> str:
        return f"Comparison({self._summary()[0]})"

    def _repr_html_(self) -> str:
        first, *more = self._summary()
        rows = table(["linear", *self.names, "SQNR"], self._rows(), right=(3,)) if self.differences else ""
        return titled(first, rows, *map(line, more))

    def _rows(self) -> list[tuple[str, str, str, str]]:
        kinds: dict[tuple[object, ...], list[Difference]] = {}
        for d in self.differences:
            kinds.setdefault((*_decided(d.a), None, *_decided(d.b)), []).append(d)
        found = []
        for mine in kinds.values():
            for name, members in grouped(d.name for d in mine):
                of = [mine[i] for i in members]
                a, b = ([getattr(d, side) for d in of] for side in ("a", "b"))
                gains = [d.gain_db for d in of if d.gain_db is not None and math.isfinite(d.gain_db)]
                gain = span(gains, "+.1f", "", " dB")
                row = (abbreviated(name), _said(a, self.dtypes[0]), _said(b, self.dtypes[1]), gain)
                found.append((self.differences.index(of[0]), row))
        return [row for _, row in sorted(found)]

    def _summary(self) -> list[str]:
        every = self.differences
        both = [d for d in every if d.a.quantized and d.b.quantized]
        of: dict[str, Callable[[LayerPlan], object]] = {
            "smoothing": lambda l: l.smoothing,
            "α": lambda l: l.alpha,
            "rotation": lambda l: l.rotation,
            "the scales of input or weight": lambda l: (l.activation, l.weight, l.input_scale is None),
        }
        counts = {"number format": len(every) - len(both)}
        counts |= {what: sum(f(d.a) != f(d.b) for d in both) for what, f in of.items()}
        if self.dtypes[0] != self.dtypes[1]:
            counts["number format"] = len(every)
        said = [f"{n} in {what}" for what, n in counts.items() if n]
        only = f"{len(every)} of {self.linears} linears differ"
        if not every:
            lines = [f"none of {self.linears} linears differs"]
        else:
            lines = [f"{only}: {', '.join(said)}" if said else f"{only}, in SQNR alone"]
        for name, done, dtype, recipe in zip(self.names, self.quantized, self.dtypes, self.recipes, strict=True):
            lines.append(f"{name}: {done} linears in {dtype.upper()}{'' if recipe is None else f', by {recipe!r}'}")
        if self.mean_sqnr_db is not None:
            means = (f"{name} {mean:.1f} dB" for name, mean in zip(self.names, self.mean_sqnr_db, strict=True))
            lines.append(f"mean SQNR of the linears that are quantized by both: {', '.join(means)}")
        return lines


def compared(a: Report, b: Report, recipes: tuple[Recipe | None, Recipe | None] = (None, None)) -> Comparison:
    """Compares two reports.

    Raises:
        PlanError: if they are of different models: other linears, or weights of other shapes.
    """
    _check_same(a.layers, b.layers)
    other = {l.name: l for l in b.layers}
    pairs = [(l, other[l.name]) for l in a.layers]
    known = [(x.sqnr_db, y.sqnr_db) for x, y in pairs if x.sqnr_db is not None and y.sqnr_db is not None]
    known = [(x, y) for x, y in known if math.isfinite(x) and math.isfinite(y)]
    formats = a.dtype != b.dtype
    found = [Difference(x.name, x, y) for x, y in pairs if _differ(x, y) or (formats and x.quantized and y.quantized)]
    means = (statistics.fmean(x for x, _ in known), statistics.fmean(y for _, y in known)) if known else None
    done = sum(l.quantized for l in a.layers), sum(l.quantized for l in b.layers)
    return Comparison(("a", "b"), len(pairs), tuple(found), done, means, (a.dtype, b.dtype), recipes)


def _check_same(a: Sequence[LayerPlan], b: Sequence[LayerPlan]) -> None:
    first, second = ({l.name: l.shape for l in layers} for layers in (a, b))
    for mine, others, whose in ((first, second, "first"), (second, first, "second")):
        alone = [n for n in mine if n not in others]
        if alone:
            raise PlanError(
                f"the reports are of different models: only the {whose} one has {alone[0]!r}. Compare two recipes of one model"
            )
    changed = next((n for n in first if first[n] != second[n]), None)
    if changed is not None:
        shapes = (" x ".join(map(str, shapes[changed])) for shapes in (first, second))
        raise PlanError(
            f"the reports are of different models: {changed!r} is {' and '.join(shapes)}. Compare two recipes of one model"
        )


def _decided(l: LayerPlan) -> tuple[object, ...]:
    """What two linears have in common that are said in one line."""
    return l.quantized, l.smoothing, bool(l.rotation), l.activation, l.weight, l.input_scale is None


def _differ(a: LayerPlan, b: LayerPlan) -> bool:
    if (*_decided(a), a.alpha, a.rotation) != (*_decided(b), b.alpha, b.rotation):
        return True
    if (a.sqnr_db is None) != (b.sqnr_db is None):
        return True
    return (
        a.sqnr_db is not None
        and b.sqnr_db is not None
        and a.sqnr_db != b.sqnr_db
        and abs(a.sqnr_db - b.sqnr_db) >= _FEELS
    )


def _said(layers: Sequence[LayerPlan], dtype: str) -> str:
    """What is done with linears that are alike: "int8 folded α 0.50 H 64 41.9..42.3 dB"."""
    if not layers[0].quantized:
        return "float"
    parts = [
        dtype,
        "unsmoothed" if layers[0].smoothing == "none" else layers[0].smoothing,
        span([l.alpha for l in layers], ".2f", "α "),
        span([l.rotation for l in layers], "d", "H "),
        "static" if layers[0].input_scale is not None else "",
        layers[0].activation or "",
        f"{layers[0].weight} weight" if layers[0].weight else "",
        span([l.sqnr_db for l in layers], ".1f", "", " dB"),
    ]
    return " ".join(p for p in parts if p)
