"""html: the page from its parts: the overview as HTML, which needs no script; everything else as data for the scripts.

What is drawn, and the scripts that draw, are compressed texts, which the page unpacks when it needs them.
"""

from __future__ import annotations

import base64
import functools
import json
import re
import zlib
from collections.abc import Iterable
from html import escape
from importlib import resources
from types import ModuleType
from typing import Any

from sqcompile.page.attention import HEADINGS, attention_rows
from sqcompile.page.charts import specs
from sqcompile.page.data import data_of
from sqcompile.page.facts import Facts, Subject, facts_of
from sqcompile.page.findings import Finding
from sqcompile.plan.plan import Plan
from sqcompile.plan.said import attentions_in

_SCRIPTS = ("plots.js", "sites.js", "table.js", "layers.js")
_DARK = """color-scheme: dark;
  --bg: #0e131a; --card: #161c26; --ink: #e7ebf1; --muted: #a3afbf; --line: #2c3543; --soft: #202836;
  --accent: #86b1ff; --on-accent: #0b1220;
  --before: #f2a33c; --after: #6ea8ff; --float: #e58bf2; --weights: #45cbb9;
  --good: #7fe0a4; --look: #f5c65b; --bad: #ff9a9a; --good-bg: #15301f; --look-bg: #362a0f; --bad-bg: #3b1a1c;
  --float-bg: #2a1c30; --chosen-bg: #1d2c49;
  --rot0: #a3afbf; --rot1: #38c6dc; --rot2: #6ea8ff; --rot3: #b69cff; --rot4: #ff7fb6;
  --heat0: #28364d; --heat1: #4d83c4; --heat2: #c07bd9; --heat3: #ffb347;"""
_TAGS = {"good": "good", "look": "look", "bad": "concern"}


def page(subject: Subject, altair: ModuleType, vl_convert: ModuleType) -> str:
    """The whole page as text."""
    facts, model = facts_of(subject), subject.plan.evidence.model if subject.plan.evidence else ""
    heading, dtype = subject.title or model or "A quantized model", subject.plan.recipe.dtype.upper()
    parts = {
        "title": escape(f"{heading}: {dtype} report"),
        "css": _asset("page.css").replace("/*DARK*/", _DARK),
        "kicker": escape("sqcompile report" + (f" on {model}" if model and model != heading else "")),
        "heading": escape(heading),
        "nav": _nav(subject),
        "dtype": escape(dtype),
        "cards": "".join(_card(*card) for card in facts.cards),
        "findings": "".join(_finding(f) for f in facts.findings),
        "floats": _floats(facts, dtype),
        "rows": "".join(f"<dt>{escape(k)}</dt><dd>{_value(k, v)}</dd>" for k, v in facts.rows),
        "attention": _attention(subject.plan),
        "graph": _graph(subject),
        "data": _packed(json.dumps(data_of(subject.plan), separators=(",", ":"), ensure_ascii=False, allow_nan=False)),
        "specs": _json(specs(altair)),
        "vega": _bundle(vl_convert),
        "script": "\n".join(_asset(name) for name in _SCRIPTS),
    }
    return "".join(parts[part] if i % 2 else part for i, part in enumerate(_split(_asset("page.html"))))


def _split(template: str) -> Iterable[str]:
    """Text and names of parts in turn; parts are put in at once, so that nothing in one is taken for another."""
    text, *rest = template.split("{{")
    yield text
    for piece in rest:
        name, _, after = piece.partition("}}")
        yield name
        yield after


def _asset(name: str) -> str:
    return resources.files("sqcompile.page").joinpath(name).read_text(encoding="utf-8")


@functools.cache
def _bundle(vl_convert: ModuleType) -> str:
    """Vega, Vega-Lite and Vega-Embed, compressed."""
    return _packed(vl_convert.javascript_bundle())


def _packed(text: str) -> str:
    """Text as the page's scripts unpack it; nothing in it can be taken for HTML."""
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def _json(found: Any) -> str:
    """JSON that can stand in a script element, whatever the names in it are."""
    text = json.dumps(found, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _card(title: str, value: str, note: str) -> str:
    note = re.sub(r"(?<=\w)\.(?=[a-z_])", ".<wbr>", escape(note))  # long names break at their dots
    return f"<li><span>{escape(title)}</span> <strong>{escape(value)}</strong> <span>{note}</span></li>"


def _finding(found: Finding) -> str:
    tag = f'<span class="tag {found.level}">{_TAGS[found.level]}</span>'
    return f"<li>{tag}<span>{escape(found.text)}</span></li>"


def _floats(facts: Facts, dtype: str) -> str:
    if not facts.floats:
        return f"<p>Nothing: every linear runs in {escape(dtype)}.</p>"
    return '<ul class="floats">' + "".join(f"<li>{escape(line)}</li>" for line in facts.floats) + "</ul>"


def _value(name: str, value: str) -> str:
    return f"<code>{escape(value)}</code>" if name == "Recipe" else escape(value)


def _nav(subject: Subject) -> str:
    there = {"attention": subject.plan.attention, "graph": subject.drawing is not None}
    return "".join(f'<li><a href="#{name}">{name.title()}</a></li>' for name, shown in there.items() if shown)


def _attention(plan: Plan) -> str:
    """A table of the attentions, which needs no script; nothing for a recipe that leaves them all alone."""
    if not plan.attention:
        return ""
    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in HEADINGS)
    rows = []
    for a, (name, *cells) in zip(plan.attention, attention_rows(plan), strict=True):
        css = ' class="float"' if a.quantized == "none" else ""
        name = f'<td class="name">{escape(name)}</td>'
        rows.append(f"<tr{css}>{name}{''.join(f'<td>{escape(c)}</td>' for c in cells)}</tr>")
    return (
        '<section id="attention" aria-labelledby="h-attention"><h2 id="h-attention">Attention</h2>'
        f'<p class="note">{escape(attentions_in(plan.attention))}. SQNR is of the scores QKᵀ on sampled tokens.</p>'
        '<div class="scroll" tabindex="0" role="region" aria-label="Table of attentions"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _graph(subject: Subject) -> str:
    if subject.drawing is None:
        return ""
    return (
        '<section id="graph" aria-labelledby="h-graph"><h2 id="h-graph">Graph</h2>'
        '<p class="note">What absorbs 1/s and s, what is quantized, and what stays in float. Repeated blocks are drawn once; choose a box to read its numbers.</p>'
        '<iframe title="Drawing of the graph" data-page="drawing"></iframe></section>'
        f'<script type="application/json" id="drawing">{_json(subject.drawing)}</script>'
    )
