"""report_text: the lines that `print(report)` gives. Equal decisions of repeated blocks are one line.

Before:  layers.0.q_proj.weight  int8   folded      α 0.50  31.2 dB  folded into norm     (and so for each layer)
After:   layers.{0..29}.q_proj.weight  int8   folded      α 0.40..0.60  28.8..31.2 dB  folded into norm
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqcompile.plan.entries import AttentionPlan, LayerPlan
from sqcompile.plan.names import PRODUCTS, abbreviated, collapse, grouped
from sqcompile.plan.said import attentions_in, linears_in

if TYPE_CHECKING:
    from sqcompile.compiled.report import Report

_NAMES = 60  # columns that names are given; a longer one moves the rest of its own line alone

# A number in a reason: an index of a block in a name, or an amount, which may have a point and an exponent.
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")

# What the words of a line mean, for those who meet them first; docs/glossary.md has more.
WORDS = {
    "folded": "folded: the parameter before the linear absorbs 1/s",
    "multiplied": "multiplied: x·(1/s) is computed before quantization, as no parameter can absorb 1/s",
    "H": "H 32: the input is rotated in blocks of 32 channels",
    "dB": "dB: how far the output's signal is above the noise of {dtype}, on the calibration sample; higher is better",
}


@dataclass(frozen=True)
class Line:
    """What several linears, or attentions, have in common.

    Attributes:
        name: their names, with ranges of indices, of which many are said as their number.
        entries: those that it stands for.
        reason: why, with ranges of the numbers in which their reasons differ.
    """

    name: str
    entries: tuple[LayerPlan | AttentionPlan, ...]
    reason: str


def text(report: Report, full: bool = False) -> str:
    """What is printed of a report; with ``full`` there is a line for each linear, attention and site."""
    lines = text_of(lines_of(report.layers, full), lambda x: report.dtype if x.quantized else "float")
    if report.attention:
        found = text_of(lines_of(report.attention, full), lambda x: PRODUCTS[str(x.quantized)])
        lines += ["attention:", *(f"  {line}" for line in found)]
    if report.sites:
        sites = map(str, report.sites)
        lines += [
            "sites (what absorbs 1/s -> linears that absorb s):",
            *(f"  {line}" for line in (sites if full else collapse(sites))),
        ]
    if any(g.gains for g in report.gemms):
        of = " and ".join(dict.fromkeys(g.against for g in report.gemms))
        lines += [f"INT8 GEMMs, expected speed against {of}:", *(f"  {gemm}" for gemm in report.gemms)]
    if any(a.gains or a.without_kernel for a in report.int8_attention):
        lines += ["INT8 attention, expected speed against bf16:", *(f"  {a}" for a in report.int8_attention)]
    words = legend(report.layers, report.attention, report.dtype)
    lines += ["words:", *(f"  {line}" for line in words)] if words else []
    if report.seconds:
        lines.append(took(report.seconds))
    lines.append(counts(report.layers, report.dtype))
    if report.attention:
        lines.append(attentions_in(report.attention))
    return "\n".join(lines)


def lines_of(entries: Sequence[LayerPlan | AttentionPlan], full: bool = False) -> list[Line]:
    """The lines of a report's linears or attentions, in the order of their first ones; with ``full`` one for each."""
    if full:
        return [Line(x.name, (x,), x.reason) for x in entries]
    kinds: dict[tuple[object, ...], list[int]] = {}
    for i, x in enumerate(entries):
        turned = isinstance(x, LayerPlan) and bool(x.rotation)
        alike = x.quantized, x.smoothing, turned, _NUMBER.sub("#", x.reason)
        kinds.setdefault((re.sub(r"\d+", "#", x.name), *alike), []).append(i)
    found: list[tuple[int, Line]] = []
    for members in kinds.values():
        for name, positions in grouped(entries[i].name for i in members):
            mine = [entries[members[p]] for p in positions]
            found.append(
                (members[positions[0]], Line(abbreviated(name), tuple(mine), _reason([x.reason for x in mine])))
            )
    return [line for _, line in sorted(found, key=lambda f: f[0])]


def text_of(lines: Sequence[Line], kind: Callable[[Any], str]) -> list[str]:
    """Lines in aligned columns: name, number format, smoothing, α, rotation, SQNR, reason. Empty columns are left out."""
    names = min(max((len(l.name) for l in lines), default=0), max(_NAMES, min((len(l.name) for l in lines), default=0)))
    rows = [
        (
            f"{l.name:{names}}",
            f"{kind(l.entries[0]):5}",
            f"{l.entries[0].smoothing:10}",
            span([x.alpha for x in l.entries], ".2f", "α "),
            span([x.rotation for x in l.entries if isinstance(x, LayerPlan)], "d", "H "),
            span([x.sqnr_db for x in l.entries], ".1f", "", " dB"),
            l.reason,
        )
        for l in lines
    ]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3, 6)]
    out = []
    for row in rows:
        cells = [
            f"{c:>{w}}" if i == 2 else f"{c:{w}}" for i, (c, w) in enumerate(zip(row[3:6], widths, strict=True)) if w
        ]
        out.append("  ".join([*row[:3], *cells, row[6]]).rstrip())
    return out


def span(values: Sequence[float | None], form: str, before: str = "", after: str = "") -> str:
    """The least and the largest of some numbers: "α 0.40..0.60"; one number where they read alike, "" where there are none.

    An infinite one is an SQNR without noise: "28.8 dB..exact".
    """
    known = sorted(v for v in values if v is not None)
    finite = [format(v, form) for v in known if v != math.inf]
    said = [before + "..".join(dict.fromkeys((finite[0], finite[-1]))) + after] if finite else []
    return "..".join([*said, "exact"] if len(finite) < len(known) else said)


def legend(layers: Sequence[LayerPlan], attention: Sequence[AttentionPlan], dtype: str) -> list[str]:
    """What the words in the lines mean, of those that are there; ``dtype`` is the number format."""
    every: list[LayerPlan | AttentionPlan] = [*layers, *attention]
    there = {
        "folded": any(x.smoothing == "folded" for x in every),
        "multiplied": any(x.smoothing == "multiplied" for x in every),
        "H": any(l.rotation for l in layers),
        "dB": any(x.sqnr_db is not None for x in every),
    }
    return [WORDS[word].format(dtype=dtype.upper()) for word, used in there.items() if used]


def counts(layers: Sequence[LayerPlan], dtype: str) -> str:
    """How many linears run in INT8, and how they are smoothed, in one line."""
    done = [l for l in layers if l.quantized]
    parts = [linears_in(layers, dtype)]
    folded, explicit = (sum(l.smoothing == how for l in done) for how in ("folded", "multiplied"))
    parts.append(f"{folded} with smoothing folded into parameters")
    if explicit:
        parts.append(f"{explicit} with smoothing multiplied explicitly")
    if plain := len(done) - folded - explicit:
        parts.append(f"{plain} without smoothing")
    if turned := sum(bool(l.rotation) for l in layers):
        parts.append(f"{turned} with rotated inputs")
    return ", ".join(parts)


def took(seconds: Mapping[str, float]) -> str:
    """The seconds of each stage in one line, with those of its parts that took a tenth of all.

    {"trace": 2.0, "plan: choose": 5.0, "plan: compare": 0.1, "plan": 5.2} -> "7.2 s: trace 2.0, plan 5.2 (choose 5.0)"
    """
    stages = {name: s for name, s in seconds.items() if ":" not in name}
    total = sum(stages.values())
    said = []
    for stage, s in stages.items():
        parts = {n.partition(": ")[2]: t for n, t in seconds.items() if n.startswith(f"{stage}: ") and t >= total / 10}
        inner = f" ({', '.join(f'{n} {t:.1f}' for n, t in parts.items())})" if parts else ""
        said.append(f"{stage} {s:.1f}{inner}")
    return f"compiled in {total:.1f} s: {', '.join(said)}"


def _reason(reasons: Sequence[str]) -> str:
    """Reasons that differ in numbers alone as one: "costs 0.010 % of ..." and "costs 0.020 %" -> "costs 0.010..0.020 %"."""
    if len(set(reasons)) == 1:
        return reasons[0]
    numbers = [_NUMBER.findall(r) for r in reasons]
    if len({len(n) for n in numbers}) > 1:  # never so: they are alike but for numbers
        return reasons[0]
    columns = iter(zip(*numbers, strict=True))
    return _NUMBER.sub(lambda m: _ends(next(columns), in_name=m.string[: m.start()].endswith(".")), reasons[0])


def _ends(column: Sequence[str], in_name: bool) -> str:
    ends = [*dict.fromkeys((min(column, key=float), max(column, key=float)))]
    return f"{{{'..'.join(ends)}}}" if in_name and len(ends) > 1 else "..".join(ends)
