"""Which token each row of a tensor is of, as text."""

from __future__ import annotations

from expecttest import assert_expected_inline
from golden_cases import graph, untrue

from sqcompile.passes.ir.text import show
from sqcompile.passes.labels import token_rows


def order(rows: token_rows.Rows | None) -> str:
    """What rows run over, outermost first."""
    if rows is None:
        return "of no single token each"
    before, after = rows.around
    around = f", {before} before and {after} after each sequence" if rows.around != (0, 0) else ""
    return f"({', '.join(map(str, rows.order))}) of {rows.mask}{around}"


ROWS = """
    %ids: i64[s0, s1] = input
    %b = aten.sym_size(%ids, 0)
    %t = aten.sym_size(%ids, 1)
    %h = aten.embedding(%w, %ids)
    %x = aten.transpose(%h, 0, 1)
    %heads = aten.reshape(%h, [%b, %t, 2, 4])
    %q = aten.transpose(%heads, 1, 2)
    %last = aten.select(%h, 1, -1)
    %pooled = aten.mean(%h, [1])
    return [%x, %q, %last, %pooled]
"""


def test_rows_over_the_tokens_of_a_mask():
    gm = graph(ROWS, {"w": [10, 8]})
    asked = {name: -1 for name in ("h", "x", "q", "last", "pooled")}
    found = token_rows.token_rows(gm, {"ids": ("mask", 0, 1)}, asked)
    rows = "".join(f"rows of %{name}: {order(found.get(name))}\n" for name in asked)
    text = f"{show(gm)}\n->\n{rows}"
    assert untrue(token_rows, text) == []
    assert_expected_inline(
        text,
        """\
%ids: i64[s0, s1] = input
%b: size = aten.sym_size(%ids, 0)
%t: size = aten.sym_size(%ids, 1)
%h: f32[s0, s1, 8] = aten.embedding(%w, %ids)
%x: f32[s1, s0, 8] = aten.transpose(%h, 0, 1)
%heads: f32[s0, s1, 2, 4] = aten.reshape(%h, [%b, %t, 2, 4])
%q: f32[s0, 2, s1, 4] = aten.transpose(%heads, 1, 2)
%last: f32[s0, 8] = aten.select(%h, 1, -1)
%pooled: f32[s0, 8] = aten.mean(%h, [1])
return [%x, %q, %last, %pooled]
->
rows of %h: (b, t) of mask
rows of %x: (t, b) of mask
rows of %q: (b, 2, t) of mask
rows of %last: of no single token each
rows of %pooled: of no single token each
""",
    )


def test_rows_of_a_prompt_before_the_tokens_are_no_tokens():
    gm = graph(
        """
        %ids: i64[s0, s1] = input
        %h = aten.embedding(%w, %ids)
        %b = aten.sym_size(%ids, 0)
        %p = aten.expand(%prompt, [%b, -1, -1])
        %y = aten.cat([%p, %h], 1)
        return %y
        """,
        {"w": [10, 8], "prompt": [1, 3, 8]},
    )
    found = token_rows.token_rows(gm, {"ids": ("mask", 0, 1)}, {"y": -1})
    assert_expected_inline(
        f"rows of %y: {order(found['y'])}\n",
        """\
rows of %y: (b, t) of mask, 3 before and 0 after each sequence
""",
    )
