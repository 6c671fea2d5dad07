"""Rotated graphs compute what they did: in float exactly, quantized and lowered alike; and a wrong rotation is found."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from conftest import relative_error, tiny_lm, token_batches
from golden_cases import graph
from random_checks import capture
from torch.utils import _pytree as pytree

import sqcompile
from sqcompile import PlanError, Recipe
from sqcompile.kernels.ops import sqcompile_ops
from sqcompile.passes.ir.graph import find_linears
from sqcompile.passes.ir.text import show
from sqcompile.passes.ir.verify import verify
from sqcompile.passes.rewrite import fold as fold_module
from sqcompile.passes.rewrite.fold import fold
from sqcompile.plan.entries import LayerPlan
from sqcompile.plan.plan import Plan
from sqcompile.plan.recipe import resolve_recipe


def rotated(gm, rotations):
    """`fold` of a plan that rotates linears, by name, and smooths nothing."""
    layers = tuple(
        LayerPlan(
            l.name,
            "experts" if l.experts else "linear",
            True,
            "none",
            "",
            shape=l.shape,
            rotation=rotations.get(l.name),
        )
        for l in find_linears(gm)
    )
    return verify(fold(gm, [], Plan(Recipe(), None, {}, layers)), "folded")


def test_an_input_is_rotated_once_and_each_weight_with_it():
    gm = graph(
        """
    %x: f32[2, 3, 16] = input
    %q = aten.linear(%x, %wq)
    %k = aten.linear(%x, %wk, %b)
    return [%q, %k]
""",
        {"wq": [6, 16], "wk": [2, 16], "b": [2]},
    )
    text = show(rotated(gm, {"wq": 16, "wk": 16}))
    assert text.count("sqcompile.rotate(%x, 16)") == 1 and text.count("sqcompile.rotate(%w") == 2


def random_rotations(gm, r):
    """Also of blocks that are too small for kernels: random models are narrow."""
    fit = {l.name: [b for b in (2, 4, 8, 16, 32) if l.in_features % b == 0] for l in find_linears(gm)}
    return {name: r.choice(blocks) for name, blocks in fit.items() if blocks and r.random() < 0.8}


def worst(after, c):
    inputs = c.model.inputs(3, 11, seed=7)
    with torch.no_grad():
        got, want = (pytree.tree_leaves(f(*inputs)) for f in (after, c.model))
    return max(relative_error(y, w) for y, w in zip(got, want, strict=True))


@pytest.mark.parametrize("seed", range(12))
def test_random_models_with_random_rotations_fold_exactly(seed):
    c = capture(seed)
    rotations = random_rotations(c.gm, random.Random(seed))
    assert rotations and worst(rotated(c.gm, rotations), c) <= 1e-5


@pytest.mark.parametrize("wrong", ["a weight is not rotated", "an input is not rotated", "other blocks"])
def test_a_wrong_rotation_is_caught(wrong, monkeypatch):
    c, right = capture(0), fold_module._Folder._rotation

    def rotation(self, x, block):
        if wrong == "other blocks":
            return right(self, x, block if x in self.const else block // 2)
        return x if (x in self.const) == (wrong == "a weight is not rotated") else right(self, x, block)

    monkeypatch.setattr(fold_module._Folder, "_rotation", rotation)
    assert worst(rotated(c.gm, {l.name: 8 for l in find_linears(c.gm)}), c) > 1e-2


RECIPES = {
    "default": Recipe(rotate=16, alpha=0.5),
    "static": Recipe(rotate=16, alpha=0.5, activation="per_tensor_static"),
    "per tensor": Recipe(rotate=16, alpha=0.5, activation="per_tensor", weight="per_tensor"),
    "O3": dataclasses.replace(resolve_recipe("O3"), rotate=16),
    "fp8": Recipe(rotate=16, alpha=0.5, dtype="fp8"),
}


@pytest.mark.parametrize(
    ("family", "name", "dtype"),
    [
        ("llama", "default", torch.bfloat16),
        ("opt", "default", torch.bfloat16),
        ("mixtral", "default", torch.float32),
        ("mixtral", "static", torch.float32),
        *[("llama", name, torch.float32) for name in RECIPES],
    ],
)
def test_stages_agree(family, name, dtype):
    model = tiny_lm(family).to(dtype)
    compiled = sqcompile.compile(model, token_batches(16), recipe=RECIPES[name], backend="eager", progress=False)
    rotations = {l.rotation for l in compiled.plan.layers if l.quantized}
    assert rotations == {16}
    x = token_batches(1, (3, 11), seed=9)[0]
    with torch.no_grad():
        want, got = (pytree.tree_leaves(f(**x))[0] for f in (model, compiled))
        quantized = pytree.tree_leaves(compiled.stages["quantized"](**x))[0]
    assert relative_error(got, quantized) < (1e-3 if dtype == torch.float32 else 0.03)
    bound = {"fp8": 0.08, "O3": 0.1, "static": 0.1, "per tensor": 0.1}.get(name, 0.05)
    assert relative_error(got, want) < (bound if dtype == torch.float32 else 0.08)
    found = {n.target for n in compiled.stages["lowered"].graph.nodes}
    if name in ("default", "static"):
        by_rows = {"rotate_quantize", "linear_act_quantize", "linear_norm_quantize"}
        assert found & {getattr(sqcompile_ops, name).default for name in by_rows}
        assert sqcompile_ops.rotate.default not in found


def test_plans_keep_rotations_and_older_ones_are_read(tmp_path):
    model = tiny_lm("llama")
    plan = sqcompile.calibrate(model, token_batches(1), recipe=Recipe(rotate=32), progress=False)
    plan.save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan") == plan and any(l.rotation for l in plan.layers)
    wrong = tuple(dataclasses.replace(l, rotation=24) if l.quantized else l for l in plan.layers)
    with pytest.raises(PlanError, match="rotation is 24, no size of blocks that divides its 64 channels"):
        dataclasses.replace(plan, layers=wrong).save(tmp_path / "wrong")


@pytest.mark.parametrize("rotate", [0, 8, 24, True, "yes", None, 32.0])
def test_recipes_name_the_rotations_there_are(rotate):
    with pytest.raises(
        sqcompile.RecipeError, match="'auto', 'none', or the size of the blocks, one of 16, 32, 64, 128"
    ):
        Recipe(rotate=rotate)


def test_the_report_and_the_drawing_say_what_is_rotated(tmp_path):
    model = tiny_lm("llama")
    recipe = Recipe(rotate=32)
    compiled = sqcompile.compile(model, token_batches(2), recipe=recipe, backend="eager", progress=False)
    lines = compiled.report.to_text(full=True).splitlines()
    turned = sum(l.rotation == 32 for l in compiled.plan.layers)
    assert turned and sum("  H 32  " in line for line in lines) == turned
    assert lines[-1].endswith(f", {turned} with rotated inputs")
    compiled.draw(tmp_path / "lowered.svg", stage="lowered")
    compiled.draw(tmp_path / "folded.svg", stage="folded")
    lowered, folded = ((tmp_path / f"{name}.svg").read_text() for name in ("lowered", "folded"))
    assert "rotate, quantize" in lowered and "rotation: in blocks of 32 channels" in lowered and ">rotate<" in folded


def test_a_backend_rotates_as_compile_does():
    model, recipe = tiny_lm("llama"), Recipe(rotate=32)
    plan = sqcompile.calibrate(model, token_batches(2), recipe=recipe, progress=False)
    compiled = sqcompile.compile(model, plan=plan, backend="eager", progress=False)
    torch._dynamo.reset()
    net = torch.compile(model, backend="smoothquant", options={"plan": plan})
    for shape in ((2, 7), (1, 12)):
        x = token_batches(1, shape, seed=9)[0]
        with torch.no_grad():
            got, want = (pytree.tree_leaves(f(**x))[0] for f in (net, compiled))
        assert relative_error(got, want) < 1e-3
