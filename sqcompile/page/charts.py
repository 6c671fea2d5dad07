"""charts: one vega-lite specification for each kind of plot, made by altair. The page fills in rows and colours.

A specification reads the data set "rows"; "@before" and the like stand for the colours of the page's theme.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

HEAT_DEPTH, HEAT_SHEAR = 0.55, 0.22  # of a 3-D view: how far back the last token stands, in heights and in widths

_WHEN = {"domain": ["before", "after"], "range": ["@before", "@after"]}
_KINDS = {"domain": ["@dtype", "float"], "range": ["@after", "@float"]}
_ROTATIONS = {
    "domain": ["none", "16", "32", "64", "128"],
    "range": ["@rot0", "@rot1", "@rot2", "@rot3", "@rot4"],
}


def specs(alt: ModuleType) -> dict[str, dict[str, Any]]:
    """The specifications, by kind. ``alt`` is altair."""
    kinds: dict[str, Callable[[Any], Any]] = {
        "channels": _channels, "heat": _heat, "curve": _curve, "codes": _codes, "sqnr": _sqnr, "ranking": _ranking,
    }  # fmt: skip
    return {kind: _compact(make(alt).to_dict()) for kind, make in kinds.items()}


def _compact(spec: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in spec.items() if k not in ("config", "$schema")}


def _base(alt: Any) -> Any:
    return alt.Chart(alt.NamedData(name="rows"))


def _channels(alt: Any) -> Any:
    """rows: kind ("line", "outlier", "dead"), when, channel, value."""
    x = alt.X("channel:Q", title="channel", scale=alt.Scale(nice=False), axis=alt.Axis(grid=False, format="d"))
    y = alt.Y(
        "value:Q",
        title="largest absolute value",
        scale=alt.Scale(type="log", nice=False, padding=10),
        axis=alt.Axis(tickCount=5, format="~g"),
    )
    color = alt.Color("when:N", title=None, scale=alt.Scale(**_WHEN), legend=alt.Legend(orient="top", offset=2))
    lines = (
        _base(alt)
        .transform_filter("datum.kind == 'line'")
        .mark_line(interpolate="step-after", strokeWidth=1.2, clip=True)
        .encode(x=x, y=y, color=color)
    )
    told = [alt.Tooltip("channel:Q"), alt.Tooltip("value:Q", format=".3g"), alt.Tooltip("when:N", title="when")]
    outliers = (
        _base(alt)
        .transform_filter("datum.kind == 'outlier'")
        .mark_point(filled=True, shape="triangle-up", size=45, opacity=0.95)
        .encode(x=x, y=y, color=color, tooltip=told)
    )
    dead = (
        _base(alt)
        .transform_filter("datum.kind == 'dead'")
        .mark_point(shape="cross", filled=True, size=45, color="@bad", angle=45)
        .encode(x=x, y=alt.value(193), tooltip=[alt.Tooltip("label:N", title="dead")])
    )
    return (lines + outliers + dead).properties(width="container", height=200)


def _heat(alt: Any) -> Any:
    """rows: x, base, top (screen coordinates of a 3-D view, the last token first), value, channel, token."""
    return (
        _base(alt)
        .mark_rule(strokeWidth=2.2, strokeCap="butt")
        .encode(
            x=alt.X(
                "x:Q", title="channel", scale=alt.Scale(nice=False),
                axis=alt.Axis(grid=False, ticks=False, labelExpr="datum.value <= @channels ? datum.label : ''", format="d"),
            ),
            y=alt.Y("base:Q", axis=None, scale=alt.Scale(domain=[0, 1 + HEAT_DEPTH], nice=False)),
            y2="top:Q",
            color=alt.Color(
                "value:Q",
                scale=alt.Scale(type="sqrt", nice=False, range=["@heat0", "@heat1", "@heat2", "@heat3"], clamp=True),
                legend=alt.Legend(title="|x|", labelExpr="format(datum.value, '.2~r')", tickCount=4, gradientLength=130, orient="right"),
            ),
            tooltip=[
                alt.Tooltip("token:Q", title="sampled token"), alt.Tooltip("channel:Q", title="channel, from"),
                alt.Tooltip("value:Q", title="largest |x|", format=".3g"),
            ],
        )
        .properties(width="container", height=230)
    )  # fmt: skip


def _curve(alt: Any) -> Any:
    """rows: alpha (-0.1 for none), rotation, cost, chosen, how."""
    said = "datum.value < 0 ? 'none' : format(datum.value, '.1f')"
    values = [-0.1, *(i / 10 for i in range(0, 11, 2))]
    x = alt.X(
        "alpha:Q", title="migration strength α", scale=alt.Scale(domain=[-0.15, 1.02], nice=False),
        axis=alt.Axis(values=values, labelExpr=said, grid=False),
    )  # fmt: skip
    y = alt.Y(
        "cost:Q",
        title="@unit",
        scale=alt.Scale(type="log", nice=False, padding=12),
        axis=alt.Axis(tickCount=4, format=".1e"),
    )
    legend = alt.Legend(orient="top", offset=2, titleOrient="left")
    color = alt.Color("rotation:N", title="rotation", scale=alt.Scale(**_ROTATIONS), legend=legend)
    shape = alt.Shape("rotation:N", title="rotation", scale=alt.Scale(domain=_ROTATIONS["domain"]), legend=legend)
    told = ["how:N", alt.Tooltip("cost:Q", format=".3g")]
    lines = _base(alt).transform_filter("datum.alpha >= 0").mark_line(strokeWidth=1.3).encode(x=x, y=y, color=color)
    points = (
        _base(alt).mark_point(size=36, filled=True, opacity=1).encode(x=x, y=y, color=color, shape=shape, tooltip=told)
    )
    chosen = (
        _base(alt)
        .transform_filter("datum.chosen")
        .mark_point(size=240, filled=False, strokeWidth=2.4, color="@ink", shape="circle")
        .encode(x=x, y=y, tooltip=told)
    )
    return (lines + points + chosen).properties(width="container", height=200)


def _codes(alt: Any) -> Any:
    """rows: what ("activations", "weights"), code (middle of a bin), first, last, share in percent."""
    domain = {"domain": ["activations", "weights"], "range": ["@after", "@weights"]}
    return (
        _base(alt)
        .mark_line(interpolate="step", strokeWidth=1.8)
        .encode(
            x=alt.X("code:Q", title="@codes", scale=alt.Scale(domain=[-130, 130], nice=False), axis=alt.Axis(values=[-127, -100, -50, 0, 50, 100, 127], grid=False)),
            y=alt.Y("share:Q", title="share of values, %", axis=alt.Axis(tickCount=5, labelExpr="format(datum.value, '~g')")),
            color=alt.Color("what:N", title=None, scale=alt.Scale(**domain), legend=alt.Legend(orient="top", offset=2)),
            strokeDash=alt.StrokeDash("what:N", title=None, legend=alt.Legend(orient="top", offset=2), scale=alt.Scale(domain=domain["domain"], range=[[1, 0], [5, 3]])),
            tooltip=["what:N", alt.Tooltip("span:N", title="codes"), alt.Tooltip("share:Q", title="share, %", format=".3g")],
        )
        .properties(width="container", height=200)
    )  # fmt: skip


def _sqnr(alt: Any) -> Any:
    """rows: place, db, kind, name, site (index), note."""
    return (
        _base(alt)
        .mark_bar(binSpacing=0)
        .encode(
            x=alt.X("place:Q", title="linear, in the order of the model", scale=alt.Scale(nice=False), axis=alt.Axis(grid=False, format="d")),
            x2="end:Q",
            y2=alt.datum(0),
            y=alt.Y("db:Q", title="SQNR, dB", scale=alt.Scale(zero=True), axis=alt.Axis(tickCount=6)),
            color=alt.Color("kind:N", title=None, scale=alt.Scale(**_KINDS), legend=alt.Legend(orient="top", offset=2)),
            tooltip=["name:N", alt.Tooltip("note:N", title="SQNR")],
        )
        .properties(width="container", height=220)
    )  # fmt: skip


def _ranking(alt: Any) -> Any:
    """rows: name, cost, kind, share, site (index). The page says how high it is."""
    return (
        _base(alt)
        .mark_bar(height={"band": 0.72})
        .encode(
            x=alt.X("cost:Q", title="@unit", axis=alt.Axis(tickCount=6, labelExpr="datum.value ? format(datum.value, '.1e') : '0'")),
            y=alt.Y("name:N", title=None, sort=None, axis=alt.Axis(labelLimit=330, ticks=False, domain=False)),
            color=alt.Color("kind:N", title=None, scale=alt.Scale(**_KINDS), legend=alt.Legend(orient="top", offset=2)),
            tooltip=["name:N", alt.Tooltip("cost:Q", format=".3g"), alt.Tooltip("share:N", title="share of all")],
        )
        .properties(width="container")
    )  # fmt: skip
