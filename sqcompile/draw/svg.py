"""svg: a condensed graph as SVG text, and as a page of its own. Nothing in either refers to anything outside of it."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

import networkx as nx

from sqcompile.draw.frames import frames, overlap
from sqcompile.draw.layout import MARGIN, Layout, layout

_STYLE = """
text { font-family: system-ui, "Segoe UI", Helvetica, Arial, sans-serif; font-size: 12px; fill: #0f172a; text-anchor: middle }
.detail { font-size: 9.5px; fill: #64748b }
.left { text-anchor: start }
.name { font-size: 11px; fill: #94a3b8; text-anchor: start }
.page { fill: #ffffff }
.block { fill: #f8fafc; stroke: #e2e8f0 }
.ground { fill: #f8fafc }
.edge { fill: none; stroke: #a3b1c6; stroke-width: 1.3 }
.edge.smooth { stroke: #2563eb; stroke-width: 2 }
.tip { fill: #a3b1c6 }
.tip.smooth { fill: #2563eb }
.box { fill: #ffffff; stroke: #94a3b8; stroke-width: 1.3 }
.input .box, .output .box { fill: #e2e8f0; stroke: #64748b }
.repeat .box { fill: #f1f5f9; stroke: #64748b; stroke-dasharray: 2 3 }
.norm.producer .box { fill: #dbeafe; stroke: #2563eb }
.balance .box { fill: #ede9fe; stroke: #7c3aed }
.refused .box { fill: #fef3c7; stroke: #d97706 }
.quantized .box { fill: #d1fae5; stroke: #059669 }
.quantized.refused .box { stroke: #d97706 }
.float .box { fill: #fee2e2; stroke: #dc2626; stroke-dasharray: 5 3 }
.chip.producer { fill: #2563eb }
.chip.balance { fill: #7c3aed }
.chip.explicit { fill: #d97706 }
.chiptext { font-size: 9.5px; fill: #ffffff; font-weight: 600 }
"""

# role -> (text of the chip, its width)
_CHIPS = {"producer": ("1/s", 22.0), "balance": ("s", 14.0), "explicit": ("× 1/s", 31.0)}

# (classes that a box must have, classes that it must not have, what the colour means)
_LEGEND = [
    ("norm producer", "", "norm or scale that absorbs 1/s"),
    ("linear quantized", "refused", "GEMM in INT8"),
    ("linear quantized refused", "", "GEMM in INT8 whose 1/s no parameter can absorb"),
    ("linear float", "", "linear that stays in float"),
    ("product quantized", "", "attention in INT8"),
    ("product float", "", "attention that stays in float"),
    ("linear balance", "quantized float", "balance layer"),
    ("linear refused", "quantized float", "linear whose 1/s no parameter can absorb"),
]
_CHIP_LEGEND = {
    "producer": "producer: absorbs 1/s", "balance": "balance layer: absorbs s",
    "explicit": "input multiplied by 1/s",
}  # fmt: skip
_REASONS, _REASON_LENGTH = 8, 120


def render(graph: nx.DiGraph, reasons: Iterable[str] = ()) -> str:
    """The drawing as an SVG document.

    Args:
        graph: from `condense`.
        reasons: lines of the legend: why linears are refused.
    """
    g = graph.copy()
    for _, data in g.nodes(data=True):
        data["classes"] = classes(data)
        data["width"], data["height"] = _size(data)
    place = layout(g)
    legend, legend_width, top = _legend(g, list(reasons))
    width, height = max(place.size[0], legend_width), top + place.size[1]
    left = (width - place.size[0]) / 2
    frames, titles = _blocks(g, place)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}">',
        f"<style>{_STYLE}</style>",
        f'<rect class="page" width="{width:.0f}" height="{height:.0f}"/>',
        *legend,
        f'<g transform="translate({left:.1f} {top:.1f})">',
        *frames,
        *(_edge(g, place, u, v) for u, v in g.edges),
        *titles,
        *(_node(n, data, *place.boxes[n]) for n, data in g.nodes(data=True)),
        "</g>",
        "</svg>",
    ]
    return "\n".join(parts)


def classes(data: dict[str, Any]) -> str:
    """The CSS classes of a box: what it is, then its roles. They carry the colours."""
    return " ".join(["node", "linear" if data["linears"] else data["kind"], *sorted(data["roles"])])


def _size(data: dict[str, Any]) -> tuple[float, float]:
    if data["kind"] == "join" and len(data["label"]) == 1:
        return 24.0, 24.0
    chips = sum(w + 4 for role, (_, w) in _CHIPS.items() if role in data["roles"])
    text = max(_text_width(data["label"], 6.7), _text_width(data["detail"], 5.3))
    return text + chips + 24, 38.0 if data["detail"] else 28.0


def _text_width(text: str, size: float) -> float:
    return size * len(text)


def _node(name: str, data: dict[str, Any], x: float, y: float) -> str:
    w, h = data["width"], data["height"]
    head = f'<g class="{data["classes"]}" data-node="{escape(name)}"><title>{escape(data["title"] or name)}</title>'
    if data["kind"] == "join" and len(data["label"]) == 1:
        shape = f'<circle class="box" cx="{x:.1f}" cy="{y:.1f}" r="{w / 2:.1f}"/>'
        return f'{head}{shape}<text x="{x:.1f}" y="{y + 4:.1f}">{escape(data["label"])}</text></g>'
    round_ = h / 2 if data["kind"] in ("input", "output") else 7
    parts = [head, _rect(x - w / 2, y - h / 2, w, h, round_)]
    right = x + w / 2 - 6
    for role, (text, width) in reversed(_CHIPS.items()):
        if role in data["roles"]:
            parts.append(_chip(role, text, right - width, y - 7.5, width))
            right -= width + 4
    middle = (x - w / 2 + right) / 2 if data["roles"] & set(_CHIPS) else x
    up = 3 if data["detail"] else -4
    parts.append(f'<text x="{middle:.1f}" y="{y - up:.1f}">{escape(data["label"])}</text>')
    if data["detail"]:
        parts.append(f'<text class="detail" x="{middle:.1f}" y="{y + 11:.1f}">{escape(data["detail"])}</text>')
    return "".join([*parts, "</g>"])


def _rect(x: float, y: float, w: float, h: float, r: float, css: str = "box") -> str:
    return f'<rect class="{css}" x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="{r:g}"/>'


def _chip(role: str, text: str, x: float, y: float, width: float) -> str:
    body = _rect(x, y, width, 15, 4, f"chip {role}")
    return f'{body}<text class="chiptext" x="{x + width / 2:.1f}" y="{y + 11:.1f}">{escape(text)}</text>'


def _edge(g: nx.DiGraph, place: Layout, u: str, v: str) -> str:
    """A curve that bends between ranks alone and passes each rank straight down."""
    (x0, y0), (x1, y1) = place.boxes[u], place.boxes[v]
    start, end = y0 + g.nodes[u]["height"] / 2, y1 - g.nodes[v]["height"] / 2 - 6
    d = f"M{x0:.1f} {start:.1f}V{place.rows[u][1]:.1f}"
    x, y = x0, place.rows[u][1]
    for nx_, top, bottom in [*place.routes[u, v], (x1, place.rows[v][0] - 6, end)]:
        middle = (y + top) / 2
        d += f"C{x:.1f} {middle:.1f} {nx_:.1f} {middle:.1f} {nx_:.1f} {top:.1f}V{bottom:.1f}"
        x, y = nx_, bottom
    smooth = " smooth" if g.edges[u, v]["smooth"] else ""
    tip = f'<path class="tip{smooth}" d="M{x1 - 3.5:.1f} {end:.1f}h7l-3.5 6z"/>'
    ends = f'data-from="{escape(u)}" data-to="{escape(v)}"'
    return f'<g {ends}><path class="edge{smooth}" d="{d}"/>{tip}</g>'


def _blocks(g: nx.DiGraph, place: Layout) -> tuple[list[str], list[str]]:
    """A frame behind each repeated block, and its title; none where it would overlap another's."""
    shapes, titles, drawn = [], [], list[Any]()
    found = frames(g, place.boxes, place.routes)
    for name, frame in sorted(found.items(), key=lambda f: (f[1][2] - f[1][0]) * (f[1][3] - f[1][1])):
        if any(overlap(frame, other) for other in drawn):
            continue
        drawn.append(frame)
        a, b, c, d = frame
        shapes.append(_rect(a, b, c - a, d - b, 10, "block"))
        ground = _rect(a + 6, b + 5, _text_width(name, 6.4), 13, 3, "ground")
        titles.append(f'{ground}<text class="name" x="{a + 10:.1f}" y="{b + 16:.1f}">{escape(name)}</text>')
    return shapes, titles


def _legend(g: nx.DiGraph, reasons: list[str]) -> tuple[list[str], float, float]:
    """The legend of what is in the drawing: its elements, width and height."""
    found = [set(c.split()) for _, c in g.nodes(data="classes")]
    out, x, y, width = [], MARGIN, 20.0, 0.0

    def entry(body: str, swatch: float, text: str) -> None:
        nonlocal x, y, width
        size = swatch + 6 + _text_width(text, 6.9) + 18
        if x + size > 860:
            x, y = MARGIN, y + 24
        place = f'<g transform="translate({x:.1f} {y:.1f})">'
        out.append(f'{place}{body}<text class="left" x="{swatch + 6:.1f}" y="12">{escape(text)}</text></g>')
        x += size
        width = max(width, x)

    for want, without, text in _LEGEND:
        if any(set(want.split()) <= c and not c & set(without.split()) for c in found):
            entry(f'<g class="node {want}">{_rect(0, 0, 24, 16, 4)}</g>', 24, text)
    for role, text in _CHIP_LEGEND.items():
        if any(role in c for c in found):
            label, size = _CHIPS[role]
            entry(f'<g class="node">{_chip(role, label, 0, 0.5, size)}</g>', size, text)
    shown = reasons[:_REASONS] + ([f"and {len(reasons) - _REASONS} more"] if len(reasons) > _REASONS else [])
    y += 34 if out else 0
    for line in shown:
        short = line if len(line) <= _REASON_LENGTH else line[: _REASON_LENGTH - 1] + "…"
        text = f'<text class="left" x="{MARGIN:.1f}" y="{y:.1f}">{escape(short)}</text>'
        out.append(f'<g class="reason"><title>{escape(line)}</title>{text}</g>')
        width, y = max(width, MARGIN + _text_width(short, 6.9)), y + 17
    return out, width + MARGIN, y


def page(svg: str, title: str) -> str:
    """An HTML page around a drawing: drag or scroll to move, Ctrl + scroll to zoom, hover for details."""
    return _PAGE.replace("@title@", escape(title)).replace("@svg@", svg)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>@title@</title>
<style>
html, body { margin: 0; height: 100%; overflow: hidden; background: #ffffff }
svg { width: 100%; height: 100%; cursor: grab; display: block }
#note, #help { position: fixed; font: 12px/1.5 system-ui, sans-serif; pointer-events: none }
#note { display: none; max-width: 46em; padding: 8px 12px; border-radius: 8px; background: #0f172af0; color: #f8fafc;
  white-space: pre-wrap; overflow-wrap: anywhere }
#help { right: 12px; bottom: 8px; color: #94a3b8 }
.dim { opacity: 0.25 }
</style>
</head>
<body>
@svg@
<div id="note"></div>
<div id="help">drag or scroll to move, Ctrl + scroll to zoom, double-click to start over</div>
<script>
const svg = document.querySelector("svg"), note = document.getElementById("note");
const size = svg.viewBox.baseVal, full = [size.width, size.height];
svg.setAttribute("preserveAspectRatio", "xMinYMin");
let x, y, zoom, from = null;
const show = () => svg.setAttribute("viewBox", [x, y, innerWidth / zoom, innerHeight / zoom].join(" "));
function start() {
  zoom = Math.min(1, innerWidth / full[0]);
  x = (full[0] - innerWidth / zoom) / 2;
  y = 0;
  show();
}
svg.addEventListener("wheel", e => {
  e.preventDefault();
  if (e.ctrlKey || e.metaKey) {
    const next = Math.min(8, Math.max(0.02, zoom * Math.exp(-e.deltaY / 300)));
    x += e.clientX / zoom - e.clientX / next;
    y += e.clientY / zoom - e.clientY / next;
    zoom = next;
  } else {
    x += e.deltaX / zoom;
    y += e.deltaY / zoom;
  }
  show();
}, {passive: false});
svg.addEventListener("pointerdown", e => { from = [e.clientX, e.clientY]; svg.setPointerCapture(e.pointerId); });
svg.addEventListener("pointerup", () => { from = null; });
svg.addEventListener("pointermove", e => {
  note.style.left = Math.min(e.clientX + 14, Math.max(0, innerWidth - note.offsetWidth - 8)) + "px";
  note.style.top = Math.min(e.clientY + 14, Math.max(0, innerHeight - note.offsetHeight - 8)) + "px";
  if (!from) return;
  x -= (e.clientX - from[0]) / zoom;
  y -= (e.clientY - from[1]) / zoom;
  from = [e.clientX, e.clientY];
  show();
});
svg.addEventListener("dblclick", start);
addEventListener("resize", show);
const edges = [...svg.querySelectorAll("[data-from]")];
for (const g of svg.querySelectorAll(".node[data-node], .reason")) {
  const title = g.querySelector("title"), text = title.textContent, name = g.dataset.node;
  title.remove();
  g.addEventListener("pointerenter", () => {
    note.textContent = text;
    note.style.display = "block";
    if (name) for (const e of edges) e.classList.toggle("dim", e.dataset.from !== name && e.dataset.to !== name);
  });
  g.addEventListener("pointerleave", () => {
    note.style.display = "none";
    for (const e of edges) e.classList.remove("dim");
  });
}
start();
</script>
</body>
</html>
"""
