"""The comparison with other tools, without them: rows of our own, and what it takes for a quantized linear."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from sqcompile.bench import other_tools, tools
from sqcompile.lm import load_lm
from sqcompile.lm.load import DATA


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where no other tool is installed."""
    for package in ("torchao", "llmcompressor"):
        monkeypatch.setitem(sys.modules, package, None)
    tools.recipes.cache_clear()
    yield
    tools.recipes.cache_clear()


@pytest.mark.usefixtures("alone")
def test_without_the_other_tools_there_are_rows_of_our_own(capsys: pytest.CaptureFixture[str]) -> None:
    opt = str(Path(__file__).parents[1] / "data" / "opt")
    tools.main(["--windows", "4", "--calibration", "1", "--only", "sqcompile, W8A8", "--threads", "1", "--models", opt])
    out = capsys.readouterr().out
    assert "without torchao_recipes: " in out and "without llm_compressor_recipes: " in out
    assert "1 calibration windows of 512 tokens, 4 held-out windows of 256" in out
    assert "opt, sqcompile, W8A8 per token: 30 of 31 linears" in out
    row = next(line for line in out.splitlines() if line.startswith("| sqcompile, W8A8 per token |"))
    kl = float(row.split(", ")[-1].split(" ± ")[0])
    assert 30 < kl < 120  # 1e-4 nats; 57 on all windows


class Rounding(nn.Linear):
    """Rounds its input to 8 bits per row."""

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127
        return super().forward((x / scale).round() * scale)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=64)
        self.embed, self.a, self.b, self.head = (
            nn.Embedding(64, 16),
            Rounding(16, 16),
            nn.Linear(16, 16),
            nn.Linear(16, 64),
        )

    def forward(self, input_ids: Tensor, use_cache: bool = True) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.b(self.a(self.embed(input_ids)))))


def test_a_linear_counts_if_it_rounds_what_it_reads() -> None:
    torch.manual_seed(0)
    assert tools.rounding_linears(Model(), torch.arange(32)[None]) == (1, 3)


def test_a_remembered_model_computes_a_batch_once() -> None:
    model = Model()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    remembered = tools.Remembered(model)
    a, b = torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.int64)
    first, second = remembered(a), remembered(b)
    assert remembered(a) is first and not torch.equal(first, second) and len(calls) == 2


def test_a_refusal_is_a_cell_in_the_tool_s_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(model: nn.Module, windows: Tensor) -> tuple[nn.Module, str]:
        raise RuntimeError("no such architecture") from ValueError("no q_proj")

    monkeypatch.setattr(tools, "recipes", lambda: {"other": refuses})
    windows = torch.zeros(1, 8, dtype=torch.int64)
    result = tools.run(DATA, "other", Model(), windows, windows)
    assert tools.cell(result) == "refused"
    assert result.remark == "RuntimeError: no such architecture, from ValueError: no q_proj"
    text = [*tools.table([result])]
    assert text[0] == "| | llama |" and text[2] == "| other | refused |"
    assert text[-1].endswith("from ValueError: no q_proj")


@pytest.mark.parametrize("style", ["neox", "opt"])
def test_mappings_by_hand_find_each_layer_once(style: str) -> None:
    model, _ = load_lm(folder=Path(__file__).parents[1] / "data" / style)
    leaves = [n for n, m in model.named_modules() if not [*m.children()]]
    for balance, smooth in other_tools._BY_HAND[type(model).__name__]:
        for pattern in (*balance, smooth):
            found = [n for n in leaves if re.match(pattern.removeprefix("re:"), n)]
            assert len(found) == model.config.num_hidden_layers, pattern
