"""Every code block of the documentation runs, or says why it cannot; and every link inside it leads somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pages
import pytest

ALL = pages.pages()
NAMES = [p.relative_to(pages.ROOT).as_posix() for p in ALL]
WITH_CODE = [n for n, p in zip(NAMES, ALL, strict=True) if any(not b.hidden for b in pages.runs(p))]


def test_pages_are_read_and_every_marker_has_a_reason():
    found = [b for p in ALL for b in pages.blocks(p)]
    assert len([b for b in found if b.kind in pages.RUN and not b.skipped]) > 50
    assert all(len(b.skipped.split()) >= 3 for b in found if b.skipped)  # words, which say what is missing
    for b in found:
        if b.kind == "python" and not b.skipped:
            compile(b.code, str(b.page), "exec")


def test_code_that_is_run_from_the_readme_alone_is_the_same_there():
    def lines(block):
        return [re.sub(r" *#.*", "", line) for line in block.code.splitlines()]

    readme = [line for b in pages.blocks(pages.ROOT / "README.md") for line in lines(b)]
    same = [b for p in ALL for b in pages.blocks(p) if b.skipped.startswith("README.md has the same code")]
    assert len(same) == 4 and all(line in readme for b in same for line in lines(b))


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("```\nx\n```", "of kind"),
        ("```pyton\nx\n```", "of kind"),
        ("```python hl_lines=2\nx\n```", "of kind"),
        ("```python\nx", "does not end"),
        ("<!-- notrun: no GPU -->\n```sh\nx\n```", "no marker"),
        ("<!-- not run:  -->\n```sh\nx\n```", "no marker"),
        ("<!-- not run: no GPU here -->\nwords\n```sh\nx\n```", "no block after"),
        ("<!-- not run: no GPU here -->", "no block after"),
        ("<!-- setup: a model\nx = 1\n", "does not end"),
    ],
)
def test_what_is_no_block_or_marker_is_refused(text, wrong):
    with pytest.raises(pages.PageError, match=wrong):
        pages.blocks(Path("page.md"), text)


def test_blocks_share_a_namespace_a_folder_and_the_page_names_their_lines(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- setup: a number\nx = 1\n-->\n\n```python\nx += 1\nopen('x', 'w').write(str(x))\n```\n\n"
        "<!-- file: y.py -->\n```python\nprint(3)\n```\n\n```sh\ntest $(cat x)$(python y.py) = 23\n```\n\n"
        "<!-- not run: it would fail -->\n```sh\nfalse\n```\n\n```text\nx\n```\n\n```python\nraise ValueError(x)\n```\n"
    )
    done = subprocess.run([sys.executable, pages.__file__, str(page)], capture_output=True, text=True)
    assert done.returncode == 1 and "ValueError: 2" in done.stderr and f'"{page}", line 29' in done.stderr
    assert not (tmp_path / "x").exists()


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as mkdocs and GitHub make them: lower case, without marks, with dashes."""
    found = set(re.findall(r"^::: (\S+)$", text, re.M))  # what mkdocstrings documents
    for title in re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M):
        plain = re.sub(r"[^\w\s-]", "", title.lower()).strip()
        found |= {re.sub(r"\s+", "-", plain), re.sub(r"[-\s]+", "-", plain), re.sub(r"\s", "-", plain)}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    page = pages.ROOT / name
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.M | re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", text)) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for target in targets:
        if re.match(r"[a-z]+:", target) or target.endswith(".ipynb"):  # other sites; notebooks, which `make docs` makes
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name}: {target}: there is no such file"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file.read_text()), f"{name}: {target}: no such heading"


# the others take six minutes of two cores
IN_SLOW = ("README.md", "docs/quickstart.md")


@pytest.mark.slow
@pytest.mark.parametrize("name", [n if n in IN_SLOW else pytest.param(n, marks=pytest.mark.docs) for n in WITH_CODE])
def test_the_code_of_a_page_runs(name, capfd):
    status = pages.run_page(pages.ROOT / name)
    out, err = capfd.readouterr()
    assert status == 0, f"{out[-6000:]}\n{err[-6000:]}"
