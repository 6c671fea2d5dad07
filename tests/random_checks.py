"""What must hold for a random model, whatever it is: examined on one traced graph."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from conftest import fold_sites, relative_error
from random_blocks import RandomModel, outputs
from torch import Tensor, fx, nn

from sqcompile import Recipe, SQCompileError
from sqcompile.capture.call_spec import to_spec
from sqcompile.capture.inputs import Call, Forward, as_call
from sqcompile.capture.trace import trace
from sqcompile.compiled.emit import emit
from sqcompile.compiled.stages import Stages
from sqcompile.passes.attention.chains import find_attentions
from sqcompile.passes.ir.graph import clone, get_tensor, set_tensor
from sqcompile.passes.ir.verify import verify
from sqcompile.passes.labels.match import match
from sqcompile.passes.lowering.lower import lower
from sqcompile.passes.planning.choose import choose
from sqcompile.passes.planning.end_to_end import smoothed_or_not
from sqcompile.passes.planning.feel import feel
from sqcompile.pipeline import rewrite
from sqcompile.plan.plan import Plan
from sqcompile.plan.recipe import PRESETS
from sqcompile.statistics.observe import calibrate

RECIPES = (
    PRESETS["default"], PRESETS["default"], PRESETS["O1"], PRESETS["O2"], PRESETS["O3"], Recipe(), Recipe(attention="qk"),
    Recipe(activation="per_tensor", attention="qk_pv", qk="per_head"), Recipe(activation="per_tensor_static", attention="qk"),
)  # fmt: skip
HELD_OUT = range(6, 22)  # seeds of batches; those of calibration are 1 to 4
SHAPES = ((1, 9), (3, 17), (5, 1), (1, 1), (4, 50), (1, 33))  # of calls; calibration has (2, 40)


@dataclass
class Found:
    """Of one random model.

    Attributes:
        refused: the error, in words, that a step refused it with; None if it compiled.
        fold: relative error of folding random scales in float64; NaN where that was not reached.
        compiled: the largest relative difference of the compiled model to its quantized stage.
        gain: SQNR in dB on held-out tokens, with smoothing less without.
        static: whether the recipe's scales are static.
    """

    refused: str | None = None
    fold: float = math.nan
    compiled: float = math.nan
    gain: float = math.nan
    static: bool = False
    recipe: str = ""


def wrong(found: Found) -> str | None:
    """What does not hold that must, in words."""
    if found.fold > 1e-5:
        return f"a fold that is {found.fold:.1e} off"
    if found.compiled > 1e-3:
        return f"compiled, it is {found.compiled:.1e} from its quantized stage ({found.recipe})"
    return None


def loss(found: Found) -> str | None:
    """What smoothing costs with dynamic scales, if that is more than 1 dB."""
    if found.gain < -1.0 and not found.static:
        return f"smoothing costs {-found.gain:.1f} dB on tokens that calibration did not see ({found.recipe})"
    return None


@dataclass(frozen=True)
class Capture:
    """A random model, its state before anything was done with it, an example call, and its traced graph."""

    model: RandomModel
    before: list[Any]
    example: tuple[Tensor, ...]
    gm: fx.GraphModule

    @property
    def call(self) -> Call:
        return as_call(self.model, self.example)


@functools.lru_cache(maxsize=12)
def capture(seed: int) -> Capture:
    model = RandomModel(seed)
    before, example = state(model), model.inputs(2, 40, seed=1)
    try:
        return Capture(model, before, example, trace(model, as_call(model, example)))
    finally:
        check_untouched(model, before)


def examine(seed: int) -> Found:
    """Examines the random model of a seed, and that it is left as it was."""
    found = Found()
    try:
        c = capture(seed)
        _examine(c, random.Random(-1 - seed), found)
        check_untouched(c.model, c.before)
    except SQCompileError as e:
        found.refused = f"{type(e).__name__}: {e}"
    return found


def _examine(c: Capture, r: random.Random, found: Found) -> None:
    model, gm = c.model, c.gm
    found.fold = fold_error(c)

    recipe = r.choice(RECIPES)
    found.recipe = next(
        (name for name, p in PRESETS.items() if p == recipe), f"{recipe.activation}, {recipe.attention}"
    )
    found.static = recipe.activation == "per_tensor_static"
    attentions = find_attentions(gm) if recipe.attention != "none" else []
    calibration = calibrate(gm, model, [model.inputs(2, 40, seed) for seed in (1, 2, 3, 4)], attentions)
    sites, refusals = match(gm)

    quantize = functools.cache(functools.partial(rewrite, gm, until="quantized"))

    def quantized_by(recipe: Recipe) -> tuple[Plan, fx.GraphModule]:
        felt = feel(gm, sites, refusals, calibration, recipe)
        plan_of = functools.partial(
            choose, gm, sites, refusals, calibration, recipe, to_spec(c.call), attentions, felt=felt
        )
        plan = smoothed_or_not(plan_of, calibration.sample, quantize)
        return plan, quantize(plan)

    plan, quantized = quantized_by(recipe)
    stages, lowered = Stages(model, gm, plan), verify(lower(quantized), "lowered")
    compiled = emit(lowered, Forward.of(model), plan, stages, "eager", False)
    with torch.no_grad():
        found.compiled = max(difference(compiled, quantized, model.inputs(*s, seed=5)) for s in r.sample(SHAPES, 2))
        _, unsmoothed = quantized_by(dataclasses.replace(recipe, smooth=False))
        found.gain = sqnr(quantized, model) - sqnr(unsmoothed, model)


def difference(a: Any, b: Any, inputs: tuple[Tensor, ...]) -> float:
    pairs = zip(outputs(a(*inputs)), outputs(b(*inputs)), strict=True)
    return max(relative_error(x, y) if float(y.norm()) else float(x.norm()) for x, y in pairs)


def sqnr(stage: Any, model: Any) -> float:
    """Signal to quantization noise in dB on tokens that calibration did not see: the mean over tokens of outputs [B, S, C].

    Of many batches: a scale of a whole tensor is one draw a batch. A sum of squares over all tokens would be decided by a
    few of them, which an expert of other experts' choice, or a norm of almost nothing, made a thousand times as wrong.
    """
    decibels = []
    for seed in HELD_OUT:
        inputs = model.inputs(4, 40, seed)
        for y, want in zip(outputs(stage(*inputs)), outputs(model(*inputs)), strict=True):
            if want.dim() == 3 and want.shape[-1] >= 8:
                noise, signal = ((t.double().square().mean(-1)) for t in (y - want, want))
                decibels.append(10 * ((signal + 1e-12) / (noise + 1e-12)).log10().flatten())
    return float(torch.cat(decibels).mean())


def fold_error(c: Capture) -> float:
    """The relative error of folding random scales, far from 1, into every site there is; all in float64.

    Of the whole model in float64, as a cast to half precision in it turns a rounding of float32 into one a thousand times
    as large in a few numbers, whatever is folded.
    """
    wide = in_float64(c.gm)
    folded, _, _ = fold_sites(c.gm, c.call, seed=1, into=wide)
    inputs = tuple(t.double() if t.dtype == torch.float32 else t for t in c.example)
    with torch.no_grad():
        return difference(in_float64(folded), wide, inputs)


def in_float64(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a float32 graph that computes in float64 what it computes in float32."""
    gm = clone(gm)
    for n in gm.graph.nodes:
        if n.op == "get_attr" and get_tensor(gm, str(n.target)).dtype == torch.float32:
            set_tensor(gm, str(n.target), get_tensor(gm, str(n.target)).double())
        wider = fx.node.map_aggregate((n.args, n.kwargs), lambda a: torch.float64 if a is torch.float32 else a)
        n.args, n.kwargs = wider
    gm.recompile()
    return gm


def state(model: nn.Module) -> list[Any]:
    """All that a module is: values of its tensors, and what its submodules hold, by identity."""
    held = [{k: dict(v) if isinstance(v, dict) else v for k, v in m.__dict__.items()} for m in model.modules()]
    return [{k: v.clone() for k, v in model.state_dict(keep_vars=False).items()}, held]


def check_untouched(model: nn.Module, before: list[Any]) -> None:
    tensors, held = before
    now = model.state_dict()
    assert tensors.keys() == now.keys() and all(torch.equal(v, now[k]) for k, v in tensors.items())
    again = state(model)[1]
    for a, b in zip(held, again, strict=True):
        assert a.keys() == b.keys()
        assert all(_same(a[k], b[k]) for k in a), [k for k in a if not _same(a[k], b[k])]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(a[k] is b[k] for k in a)
    return a is b or a == b
