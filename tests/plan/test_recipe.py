"""Recipes: what their values may be, and what stays in float."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

import sqcompile
from sqcompile import Recipe


@pytest.mark.parametrize(
    "wrong",
    [
        {"alpha": "0.5"},
        {"alpha": True},
        {"alpha": None},
        {"alpha": (0.5, "0.6")},
        {"alpha": (0.5, float("nan"))},
        {"alpha": {0.5}},
        {"alpha": 10**400},
        {"alpha": torch.tensor(0.5)},
        {"activation": ["per_token"]},
        {"weight": None},
        {"smooth": "no"},
        {"smooth": 1},
        {"smooth": None},
        {"skip": 3},
        {"skip": None},
        {"skip": b"lm_head"},
        {"skip": ("fc1", 3)},
        {"skip": (("fc1",),)},
        {"min_speedup": "1.0"},
        {"min_speedup": True},
        {"min_speedup": float("nan")},
        {"min_speedup": float("inf")},
        {"min_speedup": 10**400},
        {"min_speedup": -1},
        {"attention": True},
        {"qk": 1, "attention": "qk"},
        {"lm_head": "yes"},
        {"lm_head": None},
        {"lm_head": True, "skip": ("fc1", "lm_head")},
    ],
    ids=repr,
)
def test_values_of_another_type_or_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(sqcompile.RecipeError, match=next(iter(wrong))):
        Recipe(**wrong)


def test_equal_choices_are_equal_recipes_however_they_are_spelled():
    plain = Recipe(alpha=(0.0, 0.5, 1.0), skip=("a", "b"), min_speedup=1.0)
    spelled = Recipe(alpha=[0, np.float32(0.5), np.int64(1)], skip=["a", "b"], min_speedup=1)
    assert spelled == plain and hash(spelled) == hash(plain)
    assert all(type(a) is float for a in spelled.alphas) and type(spelled.min_speedup) is float
    assert Recipe(alpha=1).alphas == (1.0,)


def tiny_lm(head="lm_head"):
    torch.manual_seed(0)
    layers = {"embed": nn.Embedding(32, 16), "up_proj": nn.Linear(16, 16), "down_proj": nn.Linear(16, 16)}
    layers |= {"act": nn.Tanh(), head: nn.Linear(16, 32)}
    return nn.Sequential(OrderedDict(layers)).eval(), [torch.arange(10).view(2, 5)]


def float_layers(model, batches, **recipe):
    plan = sqcompile.calibrate(model, batches, recipe=Recipe(**recipe), progress=False)
    return {l.name: l.reason for l in plan.layers if not l.quantized}


@pytest.mark.parametrize(
    ("skip", "lm_head", "floats"),
    [
        ((), False, {"lm_head"}),
        ((), True, set()),
        (("down_proj",), False, {"down_proj", "lm_head"}),
        (("down_proj",), True, {"down_proj"}),
        (("lm_head",), False, {"lm_head"}),
        (("*head*",), True, {"lm_head"}),
    ],
)
def test_the_head_stays_in_float_whatever_is_skipped_unless_asked(skip, lm_head, floats):
    found = float_layers(*tiny_lm(), skip=skip, lm_head=lm_head)
    assert {name.removesuffix(".weight") for name in found} == floats
    if "lm_head" in floats and not {"lm_head", "*head*"} & set(skip):
        assert "Recipe(lm_head=True)" in found["lm_head.weight"]


def test_a_head_of_another_name_and_skipping_one_that_is_not_there():
    lm = tiny_lm(head="out")
    assert list(float_layers(*lm)) == ["out.weight"]
    assert list(float_layers(*lm, skip=("lm_head",))) == ["out.weight"]
    assert float_layers(*lm, lm_head=True) == {}
    headless = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16)).eval()
    assert float_layers(headless, [torch.randn(2, 5, 16)], skip=("lm_head",)) == {}


def test_a_model_of_nothing_but_a_head_says_how_to_quantize_it():
    model = nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 32)).eval()
    ids = [torch.arange(10).view(2, 5)]
    with pytest.raises(sqcompile.NothingToQuantizeError, match=r"lm_head=True"):
        sqcompile.calibrate(model, ids, progress=False)
    assert float_layers(model, ids, lm_head=True) == {}
