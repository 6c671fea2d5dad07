"""A tutorial and its notebook are one source: every block that is run is a cell, and no other is."""

from __future__ import annotations

import pages
import pytest

pytest.importorskip("jupytext")
pytest.importorskip("nbclient")

import notebooks


@pytest.mark.parametrize("page", notebooks.SOURCES, ids=lambda p: p.stem)
def test_cells_are_the_blocks_that_run(page):
    cells = notebooks.as_notebook(page).cells
    code = [c.source.removeprefix("%%bash\n").strip() for c in cells if c.cell_type == "code"]
    assert code == [b.code.strip() for b in pages.runs(page)]
    text = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    assert ".md)" not in text and ".md#" not in text and ".noeval" not in text and "<!-- not run" not in text
    assert all(b.code.splitlines()[0] in text for b in pages.blocks(page) if b.skipped)


def test_a_short_page_is_executed(tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks, "environment", dict)  # nothing of it is needed, and the tests' own stays as it is
    page = tmp_path / "page.md"
    page.write_text(
        "# A page\n\n```python\nx = 2\nprint(x * 21)\n```\n\n```text\n41\n```\n\n"
        "<!-- not run: it would fail here -->\n```sh\nfalse\n```\n\n```sh\necho $((40 + 3))\n```\n"
    )
    notebook, _ = notebooks.executed(page)
    printed = [o["text"] for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    assert printed == ["42\n", "43\n"]


def test_a_cell_that_fails_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks, "environment", dict)
    page = tmp_path / "page.md"
    page.write_text("```python\nraise ValueError('so')\n```\n")
    with pytest.raises(Exception, match="ValueError"):
        notebooks.executed(page)
