"""What recipes cost three trained language models on text that calibration did not see, with paired standard errors."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import sqcompile
from sqcompile import PRESETS, Recipe
from sqcompile.bench.tools import Remembered
from sqcompile.lm import calibration_texts, evaluation_texts, load_lm, token_windows
from sqcompile.lm.load import DATA
from sqcompile.plan.recipe import ALPHAS

_SIBLINGS = Path(__file__).parent.parent / "data"
FOLDERS = {"llama": DATA, "neox": _SIBLINGS / "neox", "opt": _SIBLINGS / "opt"}
WINDOWS = 96

BEFORE = Recipe(ALPHAS, "per_tensor_static", "per_tensor", attention="qk_pv")  # O3 by the linears' own errors

# by style: norms of a layer, and the linears that read each
NORMS = {
    "llama": {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    },
    "neox": {
        "input_layernorm": ("attention.query_key_value",),
        "post_attention_layernorm": ("mlp.dense_h_to_4h",),
    },
    "opt": {
        "self_attn_layer_norm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "final_layer_norm": ("fc1",),
    },
}


def louder(style: str, by: float) -> PreTrainedModel:
    """The model with four channels of each norm so many times as large, and its linears' weights smaller: the same function."""
    model, _ = load_lm(folder=FOLDERS[style])
    which = torch.tensor([3, 50, 77, 120])
    layers = [m for m in model.modules() if all(hasattr(m, norm) for norm in NORMS[style])]
    for layer in layers:
        for name, readers in NORMS[style].items():
            norm: nn.Module = layer.get_submodule(name)
            for p in norm.parameters():
                p.data[which] *= by
            for reader in readers:
                layer.get_submodule(reader).weight.data[:, which] /= by
    assert layers
    return model


@functools.lru_cache(2)
def float_model(style: str, outliers: float) -> tuple[PreTrainedModel, nn.Module]:
    """A model, and itself with what it has computed once."""
    model = louder(style, outliers)
    return model, Remembered(model)


@functools.cache
def degradation(style: str, recipe: Recipe, outliers: float = 1.0) -> sqcompile.Evaluation:
    (model, reference), (_, tokenizer) = float_model(style, outliers), load_lm(folder=FOLDERS[style])
    seen = token_windows(calibration_texts(), tokenizer, 512, 16)
    unseen = token_windows(evaluation_texts(), tokenizer, 256, WINDOWS)
    compiled = sqcompile.compile(model, list(seen.split(4)), recipe=recipe, backend="eager", progress=False)
    found = sqcompile.evaluate(compiled, unseen, against=reference, layers=False, progress=False)
    print(f"{style}: {found.increase:+.3f} ± {found.increase_error:.3f} %, KL {found.kl:.5f} ± {found.kl_error:.5f}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("outliers", [1.0, 30.0])
@pytest.mark.parametrize(("style", "most"), [("llama", 5.5e-4), ("neox", 5e-4), ("opt", 8e-4)])
@torch.no_grad()
def test_the_default(style: str, most: float, outliers: float) -> None:
    """KL resolves it: between plans of equal KL, perplexity moves by some 0.05 %, by what roundings of weights happen to do."""
    found, half = (degradation(style, recipe, outliers) for recipe in (PRESETS["default"], Recipe()))
    assert found.increase <= 0.06 + 3 * found.increase_error
    assert found.kl <= most and found.kl < 0.6 * half.kl


@pytest.mark.slow
@pytest.mark.parametrize(("style", "most"), [("llama", 0.3), ("neox", 0.15), ("opt", 0.15)])
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
