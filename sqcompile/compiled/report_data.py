"""report_data: a report as JSON, as a table of pandas, and as Jupyter shows it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sqcompile.compiled.report_text import counts, legend, lines_of, span
from sqcompile.errors import ReportError
from sqcompile.plan.entries import LayerPlan
from sqcompile.plan.names import PRODUCTS, collapse, linear_labels
from sqcompile.plan.notebook import folded, line, table, titled

if TYPE_CHECKING:
    from sqcompile.compiled.report import Report

FORMAT = 1  # of the JSON: raised where the meaning of a field changes


def as_dict(report: Report) -> dict[str, Any]:
    """What `Report.to_json` writes, as dicts and lists."""
    done = [l for l in report.layers if l.quantized]
    return {
        "format": FORMAT,
        "dtype": report.dtype,
        "summary": {
            "linears": len(report.layers),
            "quantized": len(done),
            "folded": sum(l.smoothing == "folded" for l in done),
            "multiplied": sum(l.smoothing == "multiplied" for l in done),
            "rotated": sum(bool(l.rotation) for l in done),
        },
        "seconds": dict(report.seconds),
        "layers": [_plain(l) for l in report.layers],
        "attention": [_plain(a) for a in report.attention],
        "sites": [_plain(s) for s in report.sites],
        "gemms": [{**_plain(g), "gains": [{"rows": r, "gain": x} for r, x in g.gains.items()]} for g in report.gemms],
        "int8_attention": [
            {
                **_plain(a),
                "gains": [{"batch": b, "queries": q, "keys": k, "gain": x} for (b, q, k), x in a.gains.items()],
            }
            for a in report.int8_attention
        ],
    }


def to_json(report: Report, indent: int | None = None) -> str:
    """A report as JSON, see `Report.to_json`."""
    return json.dumps(as_dict(report), ensure_ascii=False, allow_nan=False, indent=indent)


def to_pandas(report: Report) -> Any:
    """A report's linears as a pandas.DataFrame, see `Report.to_pandas`."""
    try:
        import pandas
    except ImportError as e:
        raise ReportError('report.to_pandas() needs pandas: pip install "pandas>=2.2"') from e
    layers, labels = report.layers, linear_labels(l.name for l in report.layers)
    columns: dict[str, tuple[Sequence[Any], str]] = {
        "name": ([l.name for l in layers], "string"),
        "label": ([labels[l.name] for l in layers], "string"),
        "kind": ([l.kind for l in layers], "category"),
        "runs_in": ([report.dtype if l.quantized else "float" for l in layers], "category"),
        "quantized": ([l.quantized for l in layers], "bool"),
        "smoothing": ([l.smoothing for l in layers], "category"),
        "alpha": ([l.alpha for l in layers], "float64"),
        "rotation": ([l.rotation for l in layers], "Int64"),
        "sqnr_db": ([l.sqnr_db for l in layers], "float64"),
        "loss": ([l.loss for l in layers], "float64"),
        "input_scale": ([l.input_scale for l in layers], "float64"),
        "out_features": ([l.shape[-2] for l in layers], "int64"),
        "in_features": ([l.shape[-1] for l in layers], "int64"),
        "experts": ([l.shape[0] if len(l.shape) == 3 else None for l in layers], "Int64"),
        "reason": ([l.reason for l in layers], "string"),
    }
    return pandas.DataFrame({name: pandas.Series(values, dtype=dtype) for name, (values, dtype) in columns.items()})


def shown(report: Report) -> str:
    """A report as Jupyter shows it: kinds of linears, then attentions and sites, behind a click."""
    headings = ["linear", "runs in", "smoothing", "α", "rotation", "SQNR, dB", "why"]
    rows = [
        (
            l.name,
            report.dtype if l.entries[0].quantized else "float",
            l.entries[0].smoothing,
            span([x.alpha for x in l.entries], ".2f"),
            span([x.rotation for x in l.entries if isinstance(x, LayerPlan)], "d"),
            span([x.sqnr_db for x in l.entries], ".1f"),
            l.reason,
        )
        for l in lines_of(report.layers)
    ]
    parts = [table(headings, rows, right=(3, 4, 5))]
    if report.attention:
        of = [(l.name, PRODUCTS[str(l.entries[0].quantized)], l.reason) for l in lines_of(report.attention)]
        parts.append(folded(f"{len(report.attention)} attentions", table(["attention", "runs in", "why"], of)))
    if report.sites:
        sites = table(["what absorbs 1/s -> linears that absorb s"], [(s,) for s in collapse(map(str, report.sites))])
        parts.append(folded(f"{len(report.sites)} sites", sites))
    words = legend(report.layers, report.attention, report.dtype)
    if words:
        parts.append(folded("words", "".join(map(line, words))))
    return titled(counts(report.layers, report.dtype), *parts)


def _plain(x: Any) -> dict[str, Any]:
    """The fields of a dataclass but for mappings; what is no finite number is null, which is all that JSON has for it."""
    found = {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
    return {name: _finite(value) for name, value in found.items() if not isinstance(value, dict)}


def _finite(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
