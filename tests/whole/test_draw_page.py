"""The page of a drawing in a browser, used by mouse and keyboard."""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from draw_cases import PreNorm
from page_browser import accessible, chromium
from torch import Tensor, nn

import sqcompile
from sqcompile.draw import fragment

pytest.importorskip("selenium", reason="selenium is not installed")
from drawing_page import CONTRAST, ActionChains, Keys, Page

ODD = "a<b>&c @svg@ </script><script>boom()</script>"


class Model(nn.Module):
    """Five equal blocks, a gelu that no scale passes, and a linear with an odd name."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.last = nn.Sequential(*(PreNorm() for _ in range(5))), nn.Linear(16, 16)
        self.add_module(ODD, nn.Linear(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.gelu(self.layers(x))) + getattr(self, ODD)(x)


@pytest.fixture(scope="module")
def compiled() -> Iterator[sqcompile.CompiledModel]:
    torch.manual_seed(0)
    model = Model().eval()
    with torch.no_grad():
        for block in model.layers:
            block.norm.weight[::7] *= 20
    yield sqcompile.compile(model, [torch.randn(64, 16)], backend="eager", progress=False)
    del model  # which stages are rebuilt from


@pytest.fixture(scope="module")
def path(compiled: sqcompile.CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "graph.html"
    compiled.draw(file)
    return file


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("chrome"), "1500,950") as driver:
        yield driver


@pytest.fixture
def page(chrome: Any, path: Path) -> Iterator[Page]:
    chrome.get_log("performance")
    yield Page(chrome, path)
    assert chrome.get_log("browser") == []  # no error of a script, no warning
    events = [json.loads(e["message"])["message"] for e in chrome.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert {url for url in asked if not url.startswith("blob:")} <= {path.as_uri()}


def test_equal_blocks_unfold_and_fold(page: Page) -> None:
    assert page.labels().count("up") == 1
    page.box("5 equal blocks", "[data-repeat]").click()
    page.until(lambda: page.labels().count("up") == 5)
    page.press("every block")
    page.until(lambda: page.labels().count("up") == 1)
    page.keys("e")
    page.until(lambda: page.labels().count("up") == 5)


def test_a_click_on_a_box_shows_its_operations_its_site_and_its_numbers(
    page: Page, compiled: sqcompile.CompiledModel
) -> None:
    page.keys("e")
    page.until(lambda: page.labels().count("up") == 5)
    page.box("up").click()
    page.until(lambda: "layers.0.up.weight" in page.details())
    text, layer = page.details(), compiled.plan.layers[0]
    assert f"α {layer.alpha:.2f}" in text and f"{layer.sqnr_db:.1f} dB" in text and layer.reason in text
    assert re.search(r"absorbs s of\s+layers.0: norm -> up", text)
    assert re.search(r"s\s+16 channels, [\d.]+ to [\d.]+, median", text)
    assert "aten.linear(%layer_norm, %layers.0.up.weight" in text
    assert [b.get_attribute("aria-label").partition(",")[0] for b in page.all(".sqd-chosen")] == ["up"]
    page.keys(Keys.ESCAPE)
    page.until(lambda: page.details().startswith("Choose a box"))


def test_a_box_of_equal_blocks_lists_them_and_leads_to_each(page: Page) -> None:
    page.box("down").click()
    page.until(lambda: "5 equal blocks" in page.details())
    rows = page.all(".sqd-details table tr")
    assert len(rows) == 6 and "SQNR" in rows[0].text
    page.all(".sqd-details button[aria-label='go to layers.3']")[0].click()
    page.until(lambda: "layers.3.down.weight" in page.details())
    assert page.seen(page.all(".sqd-chosen")[0])


def test_search_moves_to_what_it_finds_and_marks_it(page: Page) -> None:
    page.keys("/")
    page.look_for("layers.4 down")
    page.until(lambda: page.all(".sqd-found")[0].text == "1 of 1")
    page.until(lambda: "layers.4.down.weight" in page.details())
    hit = page.all(".sqd-hit")
    assert len(hit) == 1 and page.seen(hit[0]) and page.labels().count("down") == 5
    page.look_for("norm -> up")  # a site
    page.until(lambda: page.all(".sqd-found")[0].text == "1 of 10")
    page.keys(Keys.ENTER)
    page.until(lambda: page.all(".sqd-found")[0].text == "2 of 10")
    page.look_for("no such thing")
    page.until(lambda: page.all(".sqd-found")[0].text == "not found" and not page.all(".sqd-hit"))


def test_stages_by_button_and_by_key(page: Page) -> None:
    page.box("last").click()
    page.until(lambda: "aten.linear" in page.details())
    page.press("quantized")
    page.until(lambda: "quantize" in page.labels())
    page.until(lambda: "%last.weight_int8" in page.details())  # what is chosen stays so
    assert page.seen(page.all(".sqd-chosen")[0])
    page.keys("1")
    page.until(lambda: "quantize" not in page.labels())
    pressed = [b.text for b in page.all(".sqd-bar [data-stage][aria-pressed='true']")]
    assert pressed == ["traced"]


def test_two_stages_side_by_side_have_one_choice(page: Page) -> None:
    page.keys("c")
    page.until(lambda: len(page.all(".sqd-pane")) == 2)
    assert [p.get_attribute("aria-label") for p in page.all(".sqd-pane")] == ["traced", "lowered"]
    page.box("last").click()
    page.until(lambda: len(page.all(".sqd-chosen")) == 2)
    assert all(map(page.seen, page.all(".sqd-chosen")))
    page.keys("c")
    page.until(lambda: len(page.all(".sqd-pane")) == 1)


def test_wheel_zooms_where_the_pointer_is_and_keys_fit_all(page: Page) -> None:
    before = page.view()
    page.wheel(-400)
    page.until(lambda: page.view()[2] < 0.7 * before[2])
    after = page.view()
    assert after[0] + after[2] / 2 == pytest.approx(before[0] + before[2] / 2, abs=2)
    page.keys("f")
    whole = page.view()
    size = [float(x) for x in re.findall(r'viewBox="0 0 (\d+) (\d+)"', first_drawing(page))[0]]
    assert whole[2] >= size[0] and whole[3] >= size[1] and whole[0] <= 0 and whole[1] <= 0
    page.keys("+")
    assert page.view()[2] == pytest.approx(whole[2] / 1.25)
    page.press("smaller")
    assert page.view()[2] == pytest.approx(whole[2])


def first_drawing(page: Page) -> str:
    return Path(page.driver.current_url.removeprefix("file://")).read_text(encoding="utf-8")


def test_dragging_moves_and_chooses_nothing(page: Page) -> None:
    before = page.view()
    ActionChains(page.driver).click_and_hold(page.box("norm")).move_by_offset(30, 20).move_by_offset(
        30, 20
    ).release().perform()
    after, scale = page.view(), before[2] / page.all(".sqd-canvas")[0].size["width"]
    assert after[0] == pytest.approx(before[0] - 60 * scale, abs=1.5)
    assert after[1] == pytest.approx(before[1] - 40 * scale, abs=1.5)
    assert page.details().startswith("Choose a box")


def test_the_keyboard_goes_from_box_to_box_along_the_edges(page: Page) -> None:
    focus = lambda: str(page.driver.switch_to.active_element.get_attribute("aria-label"))  # noqa: E731
    page.all(".sqd-zoom button")[-1].click()
    page.keys(Keys.TAB)
    assert focus() == "x"
    page.keys(Keys.ARROW_DOWN)
    page.until(lambda: focus().startswith("norm, absorbs 1/s"))
    page.keys(Keys.ARROW_DOWN)
    assert focus().startswith("up, 16 → 32, absorbs 1/s, absorbs s, in INT8")
    page.keys(Keys.ENTER)
    page.until(lambda: page.details().startswith("up"))
    page.keys(Keys.ARROW_UP, Keys.TAB)
    assert focus().startswith("5 equal blocks layers.{0..4}")
    page.keys(Keys.ENTER)
    page.until(lambda: page.labels().count("up") == 5)


def test_reasons_lead_to_their_boxes(page: Page) -> None:
    heading = "2 linears run in INT8 with x·(1/s) multiplied before quantization, since no parameter can absorb 1/s"
    assert heading in page.all(".sqd-reasons")[0].text and "refused" not in page.all("body")[0].text
    page.keys("+", "+", "+")
    link = next(b for b in page.all("[data-reason]") if "last: its input passes gelu" in b.text)
    link.click()
    page.until(lambda: page.labels(".sqd-hit") == ["last"])
    assert page.seen(page.all(".sqd-hit")[0])


def test_colours_by_sqnr_with_their_legend(page: Page, compiled: sqcompile.CompiledModel) -> None:
    assert "linear in INT8" in page.all(".sqd-legend")[0].text
    page.keys("d")
    legend = page.all(".sqd-legend")[0].text
    assert "below 20 dB" in legend and "linear in INT8" not in legend
    worst = min(l.sqnr_db for l in compiled.plan.layers if l.name.endswith("up.weight") and l.sqnr_db is not None)
    assert f"{worst:.1f} dB" in page.box("up").text
    page.press("colour by SQNR")
    assert "16 → 32" in page.box("up").text


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_accessible_in_both_schemes(page: Page, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    page.box("up").click()
    page.until(lambda: "equal blocks" in page.details())
    assert accessible(page.driver)[0] == []
    # what axe leaves out: text on the boxes of an SVG
    assert page.driver.execute_script(CONTRAST) >= 4.5
    page.keys("d")
    assert page.driver.execute_script(CONTRAST) >= 4.5


def test_names_are_escaped(page: Page) -> None:
    page.keys("/")
    page.look_for("boom()")
    page.until(lambda: page.all(".sqd-found")[0].text == "1 of 1")
    page.until(lambda: ODD in page.details())
    assert page.labels(".sqd-chosen") == [ODD.partition(",")[0]]


def test_two_fragments_in_a_page_keep_to_themselves(
    chrome: Any, compiled: sqcompile.CompiledModel, tmp_path: Path
) -> None:
    stages = {"traced": compiled.stages["traced"], "lowered": compiled.lowered}
    parts = [fragment(stages, compiled.plan, prefix=f"d{i}", stage="lowered") for i in range(2)]
    ids = [re.findall(r'\sid="([^"]*)"', part) for part in parts]
    assert all(i.startswith("d0") for i in ids[0]) and not set(ids[0]) & set(ids[1])
    text = (
        f"<!DOCTYPE html><title>x</title><p id=p class=node>text</p>{''.join(parts)}<div style='height: 2000px'></div>"
    )
    (tmp_path / "two.html").write_text(text, encoding="utf-8")
    page = Page(chrome, tmp_path / "two.html")
    page.until(lambda: len(page.all("[data-ready]")) == 2)
    before = [page.view(0), page.view(1)]
    page.wheel(50)
    page.until(lambda: chrome.execute_script("return scrollY") > 0)  # the page's own wheel, until a drawing is used
    chrome.execute_script("scrollTo(0, 0)")
    page.all(".sqd-canvas")[0].click()
    page.keys("+")
    assert page.view(0)[2] == pytest.approx(before[0][2] / 1.25) and page.view(1) == before[1]
    assert chrome.get_log("browser") == []


def test_a_page_in_a_narrow_frame_leaves_the_focus_to_what_is_around_it(
    chrome: Any, path: Path, tmp_path: Path
) -> None:
    frame = f'<iframe src="{path.as_uri()}" style="width: 600px; height: 600px"></iframe>'
    (tmp_path / "framed.html").write_text(f"<!DOCTYPE html><title>x</title>{frame}", encoding="utf-8")
    chrome.get((tmp_path / "framed.html").as_uri())
    chrome.switch_to.frame(0)
    page = Page(chrome)
    assert page.seen(page.box("x"))  # the legend stands below and leaves room
    chrome.switch_to.default_content()
    assert chrome.switch_to.active_element.tag_name == "body"


def test_a_page_of_many_layers_is_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    packed = re.search(r'class="sqd-data">([^<]*)<', text)
    assert packed is not None
    data = json.loads(zlib.decompress(base64.b64decode(packed[1])))
    assert {*data["stages"]} == {"traced", "folded", "quantized", "lowered"}
    assert len(text) < 75_000 and len(packed[1]) < 0.15 * len(json.dumps(data))
