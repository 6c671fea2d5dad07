"""The page of a report in a browser: its table sorts, filters and copies, names in it are text, and the keyboard will do."""

from __future__ import annotations

import ast
import dataclasses
import math

import page_cases
import pytest
from page_browser import NASTY, click, fixtures, texts, until

from sqcompile import Plan, Recipe
from sqcompile.page import Subject, write_page
from sqcompile.plan.edit import named_by
from sqcompile.plan.entries import AttentionPlan, LayerPlan

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


def small(*names: str, **fields: object) -> Plan:
    """A plan of linears without evidence."""
    layers = tuple(
        LayerPlan(f"{n}.weight", "linear", True, "none", "", shape=(8, 8), **fields)  # type: ignore[arg-type]
        for n in names
    )
    return Plan(Recipe(), {"args": [], "kwargs": {}}, {}, layers)


def test_overrides_name_the_selected_linear_alone(page, tmp_path):
    names = ("3", "fc", "block.fc", "block.fc.fc", "a[0]*", "a0", "constructor")
    write_page(tmp_path / "r.html", Subject(small(*names)))
    page.get((tmp_path / "r.html").as_uri())
    until(page, "document.querySelectorAll('#rows tr').length === 7")
    for i, name in enumerate(names):
        click(page, "#none")
        click(page, f'#rows tr[data-layer="{i}"] input')
        (pattern,) = ast.literal_eval(page.find_element("id", "overrides").get_attribute("value").partition("=")[2])
        assert [n for n in names if named_by(pattern, f"{n}.weight")] == [name]


def test_what_is_exact_and_what_nobody_knows(page, tmp_path):
    plan = small("a", "b", "c")
    layers = tuple(dataclasses.replace(l, sqnr_db=x) for l, x in zip(plan.layers, (math.inf, 30.0, None), strict=True))
    every = small("a", "b", sqnr_db=math.inf)
    for shown, cells, words in (
        (dataclasses.replace(plan, layers=layers), ["exact", "30.0", ""], "Without a bar: 1 in INT8 whose SQNR is not known."),
        (every, ["exact", "exact"], "The lowest is exact, of a; the median is exact. Bars over the whole height: 2 exact."),
        (plan, ["", "", ""], "The plan has no SQNR of its linears."),
        (dataclasses.replace(plan, layers=()), [], "The plan has no SQNR of its linears."),
    ):  # fmt: skip
        write_page(tmp_path / "r.html", Subject(shown))
        page.get((tmp_path / "r.html").as_uri())
        until(page, f"document.getElementById('shown').textContent.startsWith('{len(cells)} of')")
        assert texts(page, "#rows td:nth-child(7)") == cells and words in texts(page, "#c-sqnr")[0]
        assert "no evidence" in texts(page, "#site")[0] and texts(page, "#sitelist li") == [
            "None: the plan has no evidence."
        ]


def test_an_edited_site_says_what_is_not_so_any_more(page, tmp_path):
    plan = page_cases.synthetic(2).keep_float("model.layers.0.mlp.down_proj")
    write_page(tmp_path / "r.html", Subject(plan))
    page.get((tmp_path / "r.html").as_uri())
    until(page, "document.querySelectorAll('#sitelist button').length === 8")
    click(page, '#sitelist button[data-site="2"]')
    assert "model.layers.0.mlp.up_proj: the weight absorbed 1/s of a site that was dropped" in texts(page, "#site")[0]
    click(page, '#sitelist button[data-site="6"]')
    assert "Edited" not in texts(page, "#site")[0]


def test_the_list_shows_the_site_that_is_open(page, tmp_path):
    write_page(tmp_path / "r.html", Subject(page_cases.synthetic(8)))
    page.get((tmp_path / "r.html").as_uri())
    until(page, "document.querySelectorAll('#sitelist button').length === 32")
    seen = """const list = document.getElementById('sitelist').getBoundingClientRect();
      const b = document.querySelector('#sitelist button[aria-current="true"]').getBoundingClientRect();
      return [b.top >= list.top && b.bottom <= list.bottom, document.getElementById('sitelist').scrollTop]"""
    for row, last in ((55, True), (0, False)):
        click(page, f'#rows tr[data-layer="{row}"] td.name button')
        found, top = page.execute_script(seen)
        assert found and (top > 0) == last


def test_attentions_are_a_table(page, tmp_path):
    made = {"alpha": 0.5, "sqnr_db": 33.0, "shape": (4, 2, 16)}
    attention = tuple(AttentionPlan(n, "qk", "folded", f"because of {n}", **made) for n in ("a", "<i>b</i>"))
    write_page(tmp_path / "r.html", Subject(dataclasses.replace(small("fc"), attention=attention)))
    page.get((tmp_path / "r.html").as_uri())
    until(page, "document.querySelectorAll('#rows tr').length === 1")
    assert texts(page, "nav a")[-1] == "Attention" and texts(page, "#attention td.name") == ["a", "<i>b</i>"]
    assert texts(page, "#attention tbody tr:first-child td")[1:] == [
        "INT8 QKᵀ", "4 × 16, keys 2 × 16", "folded, α 0.50", "Q and K one for each token and head",
        "33.0 dB", "because of a",
    ]  # fmt: skip


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
