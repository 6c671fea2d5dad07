"""The page of a report in a browser: it draws, sorts, filters, copies; asks the network for nothing; and can be read by all."""

from __future__ import annotations

import ast
import dataclasses
import time
from pathlib import Path
from typing import Any

import page_cases
import pytest
from page_browser import chromium, requests, until

from sqcompile import Evaluation, Recipe
from sqcompile.compiled.report import Report

pytest.importorskip("altair", reason="altair is not installed")
pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")

pytestmark = pytest.mark.slow  # half a minute of two cores: a browser, and vega's scripts

NASTY = "</script><script>window.bad = 1</script><!--<b>&amp;\"'"


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    plan = page_cases.synthetic(2, NASTY)
    recipe = dataclasses.replace(plan.recipe, overrides={"*.0.mlp.up_proj": {"alpha": (0.3, 0.5)}})
    entries = (dataclasses.replace(plan.layers[0], reason=NASTY), *plan.layers[1:])
    measured = Evaluation(
        "next tokens", 8, 4096, 12.5, 0.4, 12.4, 0.4, 0.8, 0.05, tokens_per_second=200.0, float_tokens_per_second=100.0
    )
    found = tmp_path_factory.mktemp("page") / "report.html"
    plan = dataclasses.replace(plan, recipe=recipe, layers=entries)
    Report.of(plan).to_html(found, evaluation=measured, title=NASTY)
    return found


@pytest.fixture
def page(driver, path) -> Any:
    """Opened anew; afterwards no script has failed, and nothing was asked of the network."""
    driver.get(path.as_uri())
    requests(driver)
    driver.get_log("browser")
    yield driver
    assert [e for e in driver.get_log("browser") if e["level"] in ("SEVERE", "WARNING")] == []
    assert requests(driver) == []
    assert driver.execute_script("return window.bad") is None


def click(driver: Any, css: str) -> None:
    found = driver.find_element("css selector", css)
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", found)
    found.click()


def texts(driver: Any, css: str) -> list[str]:
    return driver.execute_script(f"return [...document.querySelectorAll({css!r})].map(x => x.textContent)")


def scroll_through(driver: Any) -> None:
    """To everything that is drawn when it is seen, until it is."""
    boxes = driver.execute_script("return document.querySelectorAll('.plot').length")
    for i in range(boxes):
        driver.execute_script(f"document.querySelectorAll('.plot')[{i}].scrollIntoView({{block: 'center'}})")
        until(driver, f"document.querySelectorAll('.plot')[{i}].dataset.drawn")


def test_names_are_text(page):
    assert page.title == f"{NASTY}: INT8 report" and texts(page, "h1") == [NASTY]
    assert NASTY in texts(page, "#rows tr td:last-child")[0]


def test_every_plot_is_drawn_when_it_is_seen(page):
    assert page.execute_script("return [window.vegaEmbed, document.querySelectorAll('.plot[data-drawn]').length]") == [None, 0]
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


def test_sorting_and_filtering(page):
    click(page, '#head th[data-column="5"] button')
    values = [float(x) for x in texts(page, "#rows td:nth-child(7)") if x]
    assert values == sorted(values) and len(values) == 14 and texts(page, "#rows td:nth-child(7)")[-1] == ""
    assert page.find_element("css selector", '#head th[data-column="5"]').get_attribute("aria-sort") == "ascending"
    click(page, '#head th[data-column="5"] button')
    values = [float(x) for x in texts(page, "#rows td:nth-child(7)") if x]
    assert values == sorted(values, reverse=True) and texts(page, "#rows td:nth-child(7)")[-1] == ""
    page.find_element("id", "filter").send_keys("DOWN_proj")
    assert texts(page, "#shown") == ["2 of 15"] and len(texts(page, "#rows tr")) == 2
    page.execute_script("document.getElementById('filter').value = ''")
    page.find_element("css selector", '#kind option[value="0"]').click()
    assert texts(page, "#rows td.name") == ["lm_head"]


def test_selected_rows_become_overrides(page):
    page.execute_cdp_cmd("Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]})
    page.find_element("id", "filter").send_keys("layers.1.mlp")
    click(page, "#all")
    page.execute_script("document.getElementById('filter').value = ''; document.getElementById('filter').dispatchEvent(new Event('input'))")  # fmt: skip
    click(page, '#rows tr[data-layer="0"] input')
    text = page.find_element("id", "overrides").get_attribute("value")
    given = ast.literal_eval(text.removeprefix("overrides="))
    names = ["model.layers.0.self_attn.q_proj", *(f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up", "down"))]
    assert given == {"*.0.mlp.up_proj": {"alpha": (0.3, 0.5)}, **{n: {"skip": True} for n in names}}
    assert Recipe("auto", overrides=given)
    click(page, "#copy")
    until(page, "document.getElementById('copy').textContent === 'Copied'")
    assert page.execute_async_script("navigator.clipboard.readText().then(arguments[0])") == text
    click(page, "#none")
    assert not page.find_element("id", "copy").is_enabled() and not page.find_element("id", "overrides").is_displayed()


def test_a_name_in_the_table_opens_its_site(page):
    click(page, '#rows tr[data-layer="10"] td.name button')
    assert texts(page, "#site h3")[0] == "model.layers.1: v_proj -> o_proj"


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
def test_axe_finds_nothing_serious(page, dark):
    axe = pytest.importorskip("axe_selenium_python", reason="axe-selenium-python is not installed").Axe(page)
    if dark:
        click(page, "#theme")
    scroll_through(page)
    click(page, '#rows tr[data-layer="3"] input')
    click(page, "#site details summary")
    axe.inject()
    found = axe.run()
    assert len(found["passes"]) > 15
    serious = [v for v in found["violations"] if v["impact"] in ("serious", "critical")]
    assert [(v["id"], [n["html"][:200] for n in v["nodes"]][:3]) for v in serious] == []


def test_all_can_be_done_by_the_keyboard(page):
    from selenium.webdriver.common.keys import Keys

    page.find_element("tag name", "body").send_keys(Keys.TAB)
    assert page.switch_to.active_element.text == "Skip to the report"
    page.find_element("css selector", '#sitelist button[data-site="2"]').send_keys(Keys.ENTER)
    assert texts(page, "#site h3")[0].startswith("model.layers.0: post_attention_layernorm")
    page.find_element("css selector", '#head th[data-column="0"] button').send_keys(Keys.SPACE)
    assert page.find_element("css selector", '#head th[data-column="0"]').get_attribute("aria-sort") == "ascending"


def test_a_page_of_32_layers_opens_at_once(driver, tmp_path):
    Report.of(page_cases.synthetic(32)).to_html(tmp_path / "report.html")
    assert 890_000 < (tmp_path / "report.html").stat().st_size < 2_500_000
    start = time.monotonic()
    driver.get((tmp_path / "report.html").as_uri())
    until(
        driver,
        "document.querySelectorAll('#rows tr').length === 225 && document.querySelectorAll('#site .plot').length === 6",
    )
    assert time.monotonic() - start < 2
