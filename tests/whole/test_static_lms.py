"""What static scales cost three trained language models on text that calibration did not see: per channel, and O3."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

import sqcompile
from sqcompile import PRESETS, Recipe
from sqcompile.lm import calibration_texts, evaluation_texts, load_lm, token_windows
from sqcompile.lm.load import DATA
from sqcompile.plan.recipe import ALPHAS

_SIBLINGS = Path(__file__).parent.parent / "data"
FOLDERS = {"llama": DATA, "neox": _SIBLINGS / "neox", "opt": _SIBLINGS / "opt"}
WINDOWS = 96

BEFORE = Recipe(ALPHAS, "per_tensor_static", "per_tensor", attention="qk_pv")  # what O3 was: the linears' own errors


@functools.cache
def degradation(style: str, recipe: Recipe) -> sqcompile.Evaluation:
    model, tokenizer = load_lm(folder=FOLDERS[style])
    seen = token_windows(calibration_texts(), tokenizer, 512, 16)
    unseen = token_windows(evaluation_texts(), tokenizer, 256, WINDOWS)
    compiled = sqcompile.compile(model, list(seen.split(4)), recipe=recipe, backend="eager", progress=False)
    found = sqcompile.evaluate(compiled, unseen, against=model, layers=False, progress=False)
    print(f"{style}: {found.increase:+.3f} ± {found.increase_error:.3f} %, KL {found.kl:.5f} ± {found.kl_error:.5f}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("style", "most"), [("llama", 0.3), ("neox", 0.15), ("opt", 0.3)])
@torch.no_grad()
def test_static_scales_of_whole_inputs(style: str, most: float) -> None:
    found = degradation(style, Recipe("auto", "per_tensor_static", rotate="auto"))
    assert found.increase <= most + 2 * found.increase_error
    before = degradation(style, Recipe(ALPHAS, "per_tensor_static"))
    assert found.kl < 0.5 * before.kl


@pytest.mark.slow
@pytest.mark.parametrize("style", FOLDERS)
@torch.no_grad()
def test_o3_costs_half_of_what_the_linears_own_errors_choose(style: str) -> None:
    found, before = degradation(style, PRESETS["O3"]), degradation(style, BEFORE)
    assert found.kl <= 0.5 * before.kl + 2 * found.kl_error
    assert found.increase <= 0.5 * before.increase + 2 * (found.increase_error + before.increase_error)
