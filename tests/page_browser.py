"""A headless Chromium for tests of the page; tests that need one are skipped, with a word, where there is none."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import page_cases
import pytest

from sqcompile import Evaluation
from sqcompile.compiled.report import Report
from sqcompile.page import html
from sqcompile.plan.entries import AttentionPlan

FAKE = html._packed("window.vegaEmbed = async () => ({ finalize() {}, view: { addEventListener() {} } });")
NASTY = "</script><script>window.bad = 1</script><!--<b>&amp;\"'"

_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip


@contextmanager
def chromium(folder: Path, size: str = "1300,900") -> Iterator[Any]:
    """A driver of a window of a size; ``folder`` is for the browser's own files."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    browser, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no Chromium with its chromedriver on this machine")
    options = webdriver.ChromeOptions()
    for flag in (*_FLAGS, f"--window-size={size}", f"--user-data-dir={folder}"):
        options.add_argument(flag)
    options.binary_location = browser
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        found.set_script_timeout(60)
        yield found
    finally:
        found.quit()


def requests(driver: Any) -> list[str]:
    """What the browser has asked the network for since the last call."""
    every = (json.loads(entry["message"])["message"] for entry in driver.get_log("performance"))
    urls = [m["params"]["request"]["url"] for m in every if m["method"] == "Network.requestWillBeSent"]
    return [u for u in urls if not u.startswith(("file:", "data:", "blob:", "chrome:", "about:"))]


def accessible(driver: Any) -> tuple[list[Any], int]:
    """What axe-core finds wrong with the page, and how many of its rules the page fulfils; skipped without axe-core."""
    pytest.importorskip("axe_playwright_python", reason="axe-playwright-python, which has axe-core, is not installed")
    source = resources.files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    driver.execute_script(source)
    found = driver.execute_async_script("axe.run().then(arguments[arguments.length - 1])")
    wrong = [
        (v["id"], v["impact"], [(n["html"][:200], n["failureSummary"][:300]) for n in v["nodes"]][:3])
        for v in found["violations"]
    ]
    return wrong, len(found["passes"])


def until(driver: Any, script: str, seconds: float = 30.0) -> Any:
    """Waits for a script's value to be true, and gives it."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, seconds, 0.05).until(lambda d: d.execute_script(f"return {script}"))


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


def without_vega() -> Iterator[None]:
    """Pages that draw nothing: vega's scripts take seconds to be put together."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html, "_bundle", lambda module: FAKE)
        yield


def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A browser."""
    with chromium(tmp_path_factory.mktemp("browser")) as found:
        yield found


def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a page with names that could be taken for HTML."""
    plan = page_cases.synthetic(2, NASTY)
    recipe = dataclasses.replace(plan.recipe, overrides={"*.0.mlp.up_proj": {"alpha": (0.3, 0.5)}})
    entries = (dataclasses.replace(plan.layers[0], reason=NASTY), *plan.layers[1:])
    measured = Evaluation(
        "next tokens", 8, 4096, 12.5, 0.4, 12.4, 0.4, 0.8, 0.05, tokens_per_second=200.0, float_tokens_per_second=100.0
    )
    found = tmp_path_factory.mktemp("page") / "report.html"
    of = {"alpha": 0.5, "sqnr_db": 33.0, "shape": (4, 2, 16)}
    attention = (AttentionPlan(NASTY, "qk", "folded", NASTY, **of), AttentionPlan("b", "none", "none", "skipped"))
    plan = dataclasses.replace(plan, recipe=recipe, layers=entries, attention=attention)
    Report.of(plan).to_html(found, evaluation=measured, title=NASTY)
    return found


def page(driver: Any, path: Path) -> Iterator[Any]:
    """Opened anew; afterwards no script has failed, and nothing was asked of the network."""
    driver.get(path.as_uri())
    requests(driver)
    driver.get_log("browser")
    yield driver
    assert [e for e in driver.get_log("browser") if e["level"] in ("SEVERE", "WARNING")] == []
    assert requests(driver) == []
    assert driver.execute_script("return window.bad") is None


def fixtures(module: dict[str, Any]) -> None:
    """Gives a test file the fixtures of this one."""
    for fixture in (without_vega, driver, path):
        module[fixture.__name__] = pytest.fixture(scope="module")(fixture)
    module["page"] = pytest.fixture(page)
