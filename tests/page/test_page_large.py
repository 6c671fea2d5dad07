"""The page of a decoder of 80 layers, with its graph and vega's real scripts: small, and open at once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from page_browser import fixtures, requests, scroll_through, texts, until
from torch import nn

import sqcompile
from sqcompile import Progress, Recipe

pytest.importorskip("altair", reason="altair is not installed")
pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.docs]  # some minutes, most of them to compile 560 linears
fixtures(globals())

LAYERS = 80
STAGES = ("traced", "folded", "quantized", "lowered")


def decoder() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=LAYERS, **sizes)
    ).eval()


def test_a_page_of_80_layers_with_its_graph(driver: Any, tmp_path: Path) -> None:
    model = decoder()
    batches = [
        {"input_ids": torch.randint(0, 512, (2, 32), generator=torch.Generator().manual_seed(i))} for i in (0, 1)
    ]
    compiled = sqcompile.compile(model, batches, recipe=Recipe(alpha=0.5), backend="eager", progress=False)
    seen: list[Progress] = []
    path = tmp_path / "report.html"
    compiled.report.to_html(path, progress=seen.append)
    assert {f"draw: {stage}" for stage in STAGES} <= {p.stage for p in seen}
    assert 1_200_000 < path.stat().st_size < 3_000_000  # the scripts alone are a third of it

    requests(driver)
    driver.get_log("browser")
    start = time.monotonic()
    driver.get(path.as_uri())
    drawn = "document.querySelectorAll('#site .plot').length === 6"
    until(driver, f"document.querySelectorAll('#rows tr').length === {7 * LAYERS + 1} && {drawn}")
    assert time.monotonic() - start < 2

    scroll_through(driver)
    kinds = driver.execute_script("return [...document.querySelectorAll('.plot')].map(x => x.dataset.drawn)")
    assert kinds == ["sqnr", "ranking", "channels", "channels", "heat", "heat", "curve", "codes"]
    driver.execute_script("document.querySelector('iframe').scrollIntoView()")
    until(driver, "document.querySelector('iframe').srcdoc")
    driver.switch_to.frame(driver.find_element("tag name", "iframe"))
    until(driver, "document.querySelector('svg .node')")
    assert texts(driver, "button[data-stage]") == [*STAGES]
    for stage in STAGES:
        driver.find_element("css selector", f"button[data-stage={stage}]").click()
        until(driver, f"document.querySelector('svg[aria-label^=\"Graph of the {stage} stage\"]')")
    driver.switch_to.default_content()
    assert [e for e in driver.get_log("browser") if e["level"] in ("SEVERE", "WARNING")] == []
    assert requests(driver) == []
