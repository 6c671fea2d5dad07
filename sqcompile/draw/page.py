"""page: all stages of a graph as a part of an HTML page, to look around in, and as a page of its own.

The first drawing stands in the page as it is. The others, and what there is to read of each box, are one compressed text that
the script unpacks, so that a model of many layers stays small. Nothing refers to anything outside of the page.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Mapping
from html import escape
from typing import Any

import networkx as nx
from torch import fx

from sqcompile.draw.condense import condense
from sqcompile.draw.legend import CHIP_WORDS, CHIPS, classes, legend, spoken, sqnr_legend
from sqcompile.draw.repeats import fold_repeats
from sqcompile.draw.roles import Reason, Roles, by_done, roles_of
from sqcompile.draw.svg import asset, interactive, swatch
from sqcompile.plan.plan import Plan
from sqcompile.process.progress import part

_SCRIPTS = ("pane.js", "details.js", "page.js")
_MARK = re.compile(r"@(\w+)@")
_STYLES = ("drawing.css", "page.css")


def fragment(
    stages: Mapping[str, fx.GraphModule],
    plan: Plan | None = None,
    *,
    prefix: str = "drawing",
    stage: str = "traced",
    full: bool = False,
    colour: str = "role",
    whole_page: bool = False,
) -> str:
    """A drawing of all stages as a part of an HTML page: elements, with their styles and script.

    Styles apply to what is below the class ``sqd`` alone, and the script touches nothing outside of its element. Colours
    follow ``prefers-color-scheme``. The height is that of a custom property, ``--sqd-height``, or most of the window.

    Args:
        stages: graphs by stage; "traced" is among them. Each is looked at once, and not kept.
        plan: what was decided; without one, the sites and refusals of `match` are shown.
        prefix: of the ids in it, which differ from those of other fragments in a page.
        stage: the one to begin with.
        full: begins with every block drawn.
        colour: "role" or "sqnr", as `draw`.
        whole_page: takes the whole window, with its keys and its wheel; else these act where the keyboard's focus is inside.

    Returns:
        HTML, one element and its style and script, for the body of a page.
    """
    with part("traced"):
        traced = stages["traced"]
        roles = roles_of(traced, plan)
    drawings = {}
    for name in stages:
        with part(name):  # a stage is rebuilt when it is looked at
            drawings[name] = _stage(traced if name == "traced" else stages[name], name, roles)
    begin = drawings[stage]
    first = begin["full"] if full or begin["folded"] is None else begin["folded"]
    data = {
        "stages": drawings,
        "reasons": [{"done": r.done, "lines": r.lines, "linears": r.linears} for r in roles.reasons],
    }
    packed = base64.b64encode(zlib.compress(json.dumps(data, ensure_ascii=False).encode(), 9)).decode()
    words = {
        "p": escape(prefix), "stage": escape(stage), "stages": "".join(_stage_button(name, stage) for name in stages),
        "svg": first, "packed": packed, "legend": begin["legend"], "reasons": _reasons(roles.reasons),
        "css": "\n".join(map(asset, _STYLES)), "js": "\n".join(map(asset, _SCRIPTS)),
        "full": "true" if full else "false", "db": "true" if colour == "sqnr" else "false",
        "db_class": " sqd-db" if colour == "sqnr" else "", "no_db": "" if roles.sqnr else " disabled",
        "no_compare": "" if len(stages) > 1 else " disabled",
        "no_full": "" if any(d["folded"] for d in drawings.values()) else " disabled",
        "page": " data-page" if whole_page else "",
    }  # fmt: skip
    return _MARK.sub(lambda m: words[m[1]], asset("page.html"))


def document(
    stages: Mapping[str, fx.GraphModule], plan: Plan | None = None, title: str = "graph", **options: Any
) -> str:
    """An HTML page of its own around `fragment`, which takes the options; it may stand in a frame of another page."""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">\n'
        "<style>html, body { margin: 0; height: 100% } h1 { position: absolute; clip-path: inset(50%); margin: 0 }</style>\n"
        f"</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n"
        f"{fragment(stages, plan, whole_page=True, **options)}\n</main>\n</body>\n</html>\n"
    )


def _stage(gm: fx.GraphModule, name: str, roles: Roles) -> dict[str, Any]:
    """What the script knows of a stage."""
    g = condense(gm, roles)
    folded = fold_repeats(g)
    label = f"Graph of the {name} stage"
    return {
        "full": interactive(g, label),
        "folded": None if folded is g else interactive(folded, f"{label}, equal blocks drawn once"),
        "nodes": {n: _node(n, data) for n, data in g.nodes(data=True)},
        "copies": {n: copies for n, copies in folded.nodes(data="copies") if copies},
        "legend": _legend(g),
    }


def _node(name: str, data: dict[str, Any]) -> dict[str, Any]:
    return {
        "label": data["label"], "block": data["block"], "names": [*data["linears"]], "keys": [*data["keys"]],
        "facts": data["facts"], "text": "\n".join(data["lines"]), "says": spoken(data),
    }  # fmt: skip


def _stage_button(name: str, chosen: str) -> str:
    pressed = "true" if name == chosen else "false"
    return f'<button type="button" data-stage="{escape(name)}" aria-pressed="{pressed}">{escape(name)}</button>'


def _legend(g: nx.DiGraph) -> str:
    found = [classes(data) for _, data in g.nodes(data=True)]
    chips = [
        f'<li><span class="sqd-chip {role}">{CHIPS[role][0]}</span>{escape(text)}</li>'
        for role, text in CHIP_WORDS.items()
        if any(role in c.split() for c in found)
    ]
    colours = "".join(_entry(css, text) for css, text in legend(data for _, data in g.nodes(data=True)))
    steps = "".join(_entry(css, text) for css, text in sqnr_legend())
    return (
        f'<ul class="sqd-by-role">{colours}{"".join(chips)}</ul>'
        f'<ul class="sqd-by-db sqd-db">{steps}{_entry("node float", "stays in float")}{_entry("node", "no linear or attention")}</ul>'
    )


def _entry(css: str, text: str) -> str:
    return f'<li><svg width="24" height="16" aria-hidden="true">{swatch(css)}</svg>{escape(text)}</li>'


def _reasons(reasons: list[Reason]) -> str:
    parts = []
    for heading, members in by_done(reasons).items():
        entries = []
        for reason in members:
            lines = "".join(f"<span>{escape(line)}</span>" for line in reason.lines)
            at = reasons.index(reason)
            entries.append(f'<li><button type="button" class="sqd-link" data-reason="{at}">{lines}</button></li>')
        parts.append(f"<h2>{escape(heading)}</h2><ul>{''.join(entries)}</ul>")
    return "".join(parts)
