"""What tests of the page share: a browser, and a page that is opened anew for each test."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import page_cases
import pytest
from page_browser import NASTY, chromium, requests

from sqcompile import Evaluation
from sqcompile.compiled.report import Report
from sqcompile.page import html

FAKE = "window.vegaEmbed = async () => ({ finalize() {}, view: { addEventListener() {} } });"


@pytest.fixture(scope="module")
def without_vega():
    """Pages that draw nothing: vega's scripts take seconds to be put together."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html, "_bundle", lambda module: FAKE)
        yield


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """Of a page with names that could be taken for HTML."""
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
