"""The page of a report in a browser: its table sorts, filters and copies, names in it are text, and the keyboard will do."""

from __future__ import annotations

import ast

import page_cases
import pytest
from page_browser import NASTY, click, fixtures, texts, until

from sqcompile import Recipe
from sqcompile.page import Subject, write_page

pytest.importorskip("altair", reason="altair is not installed")
pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")
pytestmark = pytest.mark.usefixtures("without_vega")
fixtures(globals())


def test_names_are_text(page):
    assert page.title == f"{NASTY}: INT8 report" and texts(page, "h1") == [NASTY]
    assert NASTY in texts(page, "#rows tr td:last-child")[0]


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


def test_a_drawing_is_a_frame_that_waits_until_it_is_seen(page, tmp_path):
    drawing = "<!doctype html><html lang=en><title>g</title><p id=drawn>all <b>of</b> it</p></html>"
    write_page(tmp_path / "r.html", Subject(page_cases.synthetic(2), drawing=drawing))
    page.get((tmp_path / "r.html").as_uri())
    assert texts(page, "nav a")[-1] == "Graph" and page.find_element("tag name", "iframe").get_attribute("srcdoc") == ""
    click(page, 'nav a[href="#graph"]')
    until(page, "document.querySelector('iframe').srcdoc")
    page.switch_to.frame(page.find_element("tag name", "iframe"))
    until(page, "document.getElementById('drawn')")
    assert texts(page, "#drawn") == ["all of it"]
    page.switch_to.default_content()


def test_a_name_in_the_table_opens_its_site(page):
    click(page, '#rows tr[data-layer="10"] td.name button')
    assert texts(page, "#site h3")[0] == "model.layers.1: v_proj -> o_proj"


def test_all_can_be_done_by_the_keyboard(page):
    from selenium.webdriver.common.keys import Keys

    page.find_element("tag name", "body").send_keys(Keys.TAB)
    assert page.switch_to.active_element.text == "Skip to the report"
    page.find_element("css selector", '#sitelist button[data-site="2"]').send_keys(Keys.ENTER)
    assert texts(page, "#site h3")[0].startswith("model.layers.0: post_attention_layernorm")
    page.find_element("css selector", '#head th[data-column="0"] button').send_keys(Keys.SPACE)
    assert page.find_element("css selector", '#head th[data-column="0"]').get_attribute("aria-sort") == "ascending"
