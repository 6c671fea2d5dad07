"""The page of a report in a browser, with all its plots: they are drawn as they are seen, and everybody can read it."""

from __future__ import annotations

import time

import page_cases
import pytest
from page_browser import accessible, click, fixtures, scroll_through, texts, until

from sqcompile.compiled.report import Report

pytest.importorskip("altair", reason="altair is not installed")
pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")
pytestmark = pytest.mark.slow  # half a minute of two cores: a browser, and vega's scripts
fixtures(globals())


def test_every_plot_is_drawn_when_it_is_seen(page):
    assert page.execute_script("return [window.vegaEmbed, document.querySelectorAll('.plot[data-drawn]').length]") == [
        None,
        0,
    ]
    scroll_through(page)
    kinds = page.execute_script("return [...document.querySelectorAll('.plot')].map(x => x.dataset.drawn)")
    assert kinds == ["sqnr", "ranking", "channels", "channels", "heat", "heat", "curve", "codes"]
    marks = page.execute_script("return [...document.querySelectorAll('.plot')].map(p => p.querySelectorAll('svg path, canvas').length)")  # fmt: skip
    assert min(marks) > 0 and marks[0] > 15
    labels = page.execute_script(
        "return [...document.querySelectorAll('.plot')].map(p => p.getAttribute('aria-label'))"
    )
    assert all(len(label) > 40 for label in labels)
    assert "Chosen, with a ring: α 0.5, not rotated" in labels[6] and "✕ 3 dead" in labels[2]


def test_another_site_is_drawn_when_it_is_opened(page):
    click(page, '#sitelist button[data-site="7"]')
    assert texts(page, "#site h3")[0].startswith("model.layers.1: up_proj")
    assert page.execute_script("return document.querySelectorAll('#site .plot[data-drawn]').length") < 6
    scroll_through(page)
    assert "12 of 8192 calibration tokens reach 31x the others" in texts(page, "#site .card")[0]
    click(page, "#site .sitehead button:first-child")
    assert texts(page, "#site h3")[0].startswith("model.layers.1: post_attention_layernorm")
    page.find_element("id", "find").send_keys("down_proj")
    assert len(texts(page, "#sitelist button")) == 2


def test_the_theme_is_the_systems_and_can_be_switched(page):
    background = "return getComputedStyle(document.body).backgroundColor"
    page.execute_script("document.getElementById('p-sqnr').scrollIntoView()")
    until(page, "document.getElementById('p-sqnr').dataset.drawn")
    bar = "document.querySelector('#p-sqnr svg .mark-rect path').getAttribute('fill')"
    light, blue = page.execute_script(background), page.execute_script(f"return {bar}")
    click(page, "#theme")
    until(page, f"document.querySelector('#p-sqnr svg .mark-rect path') && {bar} !== {blue!r}")
    dark = page.execute_script(background)
    assert light != dark and texts(page, "#theme") == ["Light theme"]
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    page.refresh()
    assert page.execute_script(background) == dark
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.parametrize("dark", [False, True])
def test_axe_finds_nothing(page, dark):
    if dark:
        click(page, "#theme")
    scroll_through(page)
    click(page, '#rows tr[data-layer="3"] input')
    click(page, "#site details summary")
    wrong, fulfilled = accessible(page)
    assert wrong == [] and fulfilled > 15


def test_a_page_of_32_layers_opens_at_once(driver, tmp_path):
    Report.of(page_cases.synthetic(32)).to_html(tmp_path / "report.html")
    assert 400_000 < (tmp_path / "report.html").stat().st_size < 1_500_000
    start = time.monotonic()
    driver.get((tmp_path / "report.html").as_uri())
    until(
        driver,
        "document.querySelectorAll('#rows tr').length === 225 && document.querySelectorAll('#site .plot').length === 6",
    )
    assert time.monotonic() - start < 2
