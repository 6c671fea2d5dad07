"""svg: a condensed graph as SVG. Nothing in it refers to anything outside of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from html import escape
from importlib import resources
from typing import Any

import networkx as nx

from sqcompile.draw.frames import frames, overlap
from sqcompile.draw.layout import MARGIN, Layout, layout
from sqcompile.draw.legend import CHIP_WORDS, CHIPS, classes, legend, sqnr_legend
from sqcompile.draw.roles import Reason, by_done
from sqcompile.plan.said import decibels

_REASONS, _REASON_LENGTH = 8, 120
_NO_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # a name may have any character


def render(graph: nx.DiGraph, reasons: Sequence[Reason] = (), by_sqnr: bool = False) -> str:
    """The drawing as an SVG document, with its legend.

    Args:
        graph: from `condense`.
        reasons: for the legend: why linears have no parameter that absorbs 1/s, or stay in float.
        by_sqnr: colours boxes by SQNR.
    """
    g, place, parts = _drawn(graph, interactive=False)
    above, legend_width, top = _legend(g, reasons, by_sqnr)
    width, height = max(place.size[0], legend_width), top + place.size[1]
    left = (width - place.size[0]) / 2
    text = "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" class="sqd{" sqd-db" if by_sqnr else ""}" width="{width:.0f}" '
            f'height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}">',
            f"<style>{asset('drawing.css')}</style>",
            f'<rect class="page" width="{width:.0f}" height="{height:.0f}"/>',
            *above,
            f'<g transform="translate({left:.1f} {top:.1f})">',
            *parts,
            "</g>",
            "</svg>",
        ]
    )
    return _NO_XML.sub("\ufffd", text)


def interactive(graph: nx.DiGraph, label: str) -> str:
    """The drawing alone, for the script of a page: boxes can have the keyboard's focus, and say what they are.

    Args:
        graph: from `condense`.
        label: what the drawing is, for those who hear it.
    """
    _, place, parts = _drawn(graph, interactive=True)
    size = f"{place.size[0]:.0f} {place.size[1]:.0f}"
    return f'<svg viewBox="0 0 {size}" role="group" aria-label="{escape(label)}">{"".join(parts)}</svg>'


@cache
def asset(name: str) -> str:
    """A file that lies beside this one."""
    return resources.files("sqcompile.draw").joinpath(name).read_text(encoding="utf-8")


def swatch(css: str) -> str:
    """A small box of a colour."""
    return f'<g class="{css}">{_rect(0.7, 0.7, 22.6, 14.6, 4)}</g>'


def _drawn(graph: nx.DiGraph, interactive: bool) -> tuple[nx.DiGraph, Layout, list[str]]:
    g = graph.copy()
    for _, data in g.nodes(data=True):
        data["classes"] = classes(data)
        data["width"], data["height"] = _size(data)
    place = layout(g)
    shapes, titles = _blocks(g, place, interactive)
    edges = [_edge(g, place, u, v) for u, v in g.edges]
    boxes = [_node(n, data, *place.boxes[n], interactive) for n, data in g.nodes(data=True)]
    return g, place, [*shapes, *edges, *boxes, *titles]


def _size(data: dict[str, Any]) -> tuple[float, float]:
    if _is_round(data):
        return 24.0, 24.0
    chips = sum(w + 4 for role, (_, w) in CHIPS.items() if role in data["roles"])
    text = max(_text_width(data["label"], 6.7), _text_width(data["detail"], 5.3))
    return 2.0 * round((text + chips + 24) / 2), 38.0 if data["detail"] or data["sqnr"] is not None else 28.0


def _is_round(data: dict[str, Any]) -> bool:
    return data["kind"] == "join" and len(data["label"]) == 1


def _text_width(text: str, size: float) -> float:
    return float(round(size * len(text)))


def _node(name: str, data: dict[str, Any], x: float, y: float, interactive: bool) -> str:
    """A box around its own origin, so that those of equal blocks are equal texts, which pack well."""
    w, h = data["width"], data["height"]
    head = f'<g class="{data["classes"]}" data-node="{escape(name)}" transform="translate({x:g} {y:g})" '
    head += 'role="button" tabindex="-1">' if interactive else f'id="box-{escape(name)}">'
    if not interactive:
        head += f"<title>{escape(_title(name, data))}</title>"
    if _is_round(data):
        return f'{head}<circle class="box" r="{w / 2:g}"/><text y="4">{escape(data["label"])}</text></g>'
    parts = [head, _rect(-w / 2, -h / 2, w, h, h / 2 if data["kind"] in ("input", "output") else 7)]
    right = w / 2 - 6
    for role, (text, width) in reversed(CHIPS.items()):
        if role in data["roles"]:
            parts.append(_chip(role, text, right - width, -7.5, width))
            right -= width + 4
    middle = round((right - w / 2) / 2) if data["roles"] & set(CHIPS) else 0
    parts.append(f'<text x="{middle}" y="{-3 if h > 30 else 4}">{escape(data["label"])}</text>')
    if data["detail"]:
        parts.append(f'<text class="detail size" x="{middle}" y="11">{escape(data["detail"])}</text>')
    if data["sqnr"] is not None:
        parts.append(f'<text class="detail db" x="{middle}" y="11">{decibels(data["sqnr"])}</text>')
    return "".join([*parts, "</g>"])


def _title(name: str, data: dict[str, Any]) -> str:
    """What a pointer shows in an .svg file."""
    facts = [f"{term}: {text}" for term, text in data["facts"]]
    return "\n".join([*data["linears"], *facts, *data["lines"][-1:]]) or name


def _rect(x: float, y: float, w: float, h: float, r: float, css: str = "box") -> str:
    return f'<rect class="{css}" x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{r:g}"/>'


def _chip(role: str, text: str, x: float, y: float, width: float) -> str:
    body = _rect(x, y, width, 15, 4, f"chip {role}")
    return f'{body}<text class="chiptext" x="{x + width / 2:g}" y="{y + 11:g}">{escape(text)}</text>'


def _edge(g: nx.DiGraph, place: Layout, u: str, v: str) -> str:
    """A curve from its own origin, that bends between ranks alone and passes each rank straight down."""
    (x0, y0), (x1, y1) = place.boxes[u], place.boxes[v]
    start, end = y0 + g.nodes[u]["height"] / 2, y1 - g.nodes[v]["height"] / 2 - 6
    d, down, x, y = "M0 0", place.rows[u][1] - start, x0, place.rows[u][1]
    for nx_, top, bottom in [*place.routes[u, v], (x1, place.rows[v][0] - 6, end)]:
        by, gap = nx_ - x, top - y
        if by:
            d += f"{f'v{down:g}' if down else ''}c0 {gap / 2:g} {by:g} {gap / 2:g} {by:g} {gap:g}"
            down = 0.0
        else:
            down += gap
        down += bottom - top
        x, y = nx_, bottom
    d += f"v{down:g}" if down else ""
    smooth = " smooth" if g.edges[u, v]["smooth"] else ""
    tip = f'<path class="tip{smooth}" d="M{x1 - x0 - 3.5:g} {end - start:g}h7l-3.5 6z"/>'
    ends = f'data-from="{escape(u)}" data-to="{escape(v)}" transform="translate({x0:g} {start:g})"'
    return f'<g {ends}><path class="edge{smooth}" d="{d}"/>{tip}</g>'


def _blocks(g: nx.DiGraph, place: Layout, interactive: bool) -> tuple[list[str], list[str]]:
    """A frame behind each repeated block, and its title; none where it would overlap another's."""
    repeats = {d["block"]: d["repeat"] for _, d in g.nodes(data=True) if "repeat" in d}
    found = frames(g, place.boxes, place.routes)
    shapes, titles, drawn = list[str](), list[str](), list[Any]()
    # the frame of many blocks says how many they are, and comes first
    for name, frame in sorted(
        found.items(), key=lambda f: (f[0] not in repeats, (f[1][2] - f[1][0]) * (f[1][3] - f[1][1]))
    ):
        if name not in repeats and any(overlap(frame, other) for other in drawn):
            continue
        drawn.append(frame)
        a, b, c, d = frame
        if name in repeats:
            shapes += [_rect(a + k, b + k, c - a, d - b, 10, "block") for k in (8, 4)]
        shapes.append(_rect(a, b, c - a, d - b, 10, "block"))
        ground = _rect(a + 6, b + 5, _text_width(name, 6.4), 13, 3, "ground")
        titles.append(f'{ground}<text class="name" x="{a + 10:.1f}" y="{b + 16:.1f}">{escape(name)}</text>')
        if name in repeats:
            text = f"× {repeats[name]}"
            width = _text_width(text, 6.4) + 8
            chip = _chip("repeat", text, a + 16 + _text_width(name, 6.4), b + 4, width)
            spoken_ = f"{repeats[name]} equal blocks {name}: draw each of them"
            use = f' role="button" tabindex="-1" aria-label="{escape(spoken_)}"' if interactive else ""
            titles.append(f'<g data-repeat="{escape(name)}"{use}>{chip}</g>')
    return shapes, titles


def _legend(g: nx.DiGraph, reasons: Sequence[Reason], by_sqnr: bool) -> tuple[list[str], float, float]:
    """The legend of what is in the drawing: its elements, width and height."""
    out, x, y, width = list[str](), MARGIN, 20.0, 0.0

    def entry(body: str, size: float, text: str) -> None:
        nonlocal x, y, width
        whole = size + 6 + _text_width(text, 6.6) + 18
        if x + whole > 860 and x > MARGIN:
            x, y = MARGIN, y + 24
        place = f'<g transform="translate({x:.1f} {y:.1f})">'
        out.append(f'{place}{body}<text class="left" x="{size + 6:.1f}" y="12">{escape(text)}</text></g>')
        x += whole
        width = max(width, x)

    found = [c for _, c in g.nodes(data="classes")]
    for css, text in sqnr_legend() if by_sqnr else legend(data for _, data in g.nodes(data=True)):
        entry(swatch(css), 24, text)
    for role, text in CHIP_WORDS.items():
        if any(role in c.split() for c in found):
            label, size = CHIPS[role]
            entry(f'<g class="node">{_chip(role, label, 0, 0.5, size)}</g>', size, text)
    y += 34 if out else 0
    left = _REASONS
    for heading, members in by_done(reasons).items():
        width = max(width, MARGIN + _text_width(heading, 7.2))
        out.append(f'<text class="head" x="{MARGIN:g}" y="{y:g}">{escape(heading)}</text>')
        for reason in members[:left]:
            body, more = _reason(g, reason, y)
            out.append(body)
            width = max(width, *(MARGIN + 12 + _text_width(line, 6.6) for line in map(_short, reason.lines)))
            y += more
        if hidden := len(members) - left if len(members) > left else 0:
            y += 17
            out.append(f'<text class="left" x="{MARGIN + 12:g}" y="{y:g}">and {hidden} more</text>')
        left = max(0, left - len(members))
        y += 22
    return out, width + MARGIN, y


def _reason(g: nx.DiGraph, reason: Reason, y: float) -> tuple[str, float]:
    """The lines of a reason below y, as a link to the first of its boxes, and their height."""
    box = next((n for n, names in g.nodes(data="linears") if set(names) & set(reason.linears)), None)
    lines = "".join(
        f'<text class="left" x="{MARGIN + 12:g}" y="{y + 17 * (i + 1):g}">{escape(_short(line))}</text>'
        for i, line in enumerate(reason.lines)
    )
    body = f'<a href="#box-{escape(box)}">{lines}</a>' if box else lines
    title = escape("\n".join(reason.lines))
    return f'<g class="reason"><title>{title}</title>{body}</g>', 17.0 * len(reason.lines)


def _short(line: str) -> str:
    return line if len(line) <= _REASON_LENGTH else line[: _REASON_LENGTH - 1] + "…"
