"""What to quantize and how: the choices a user makes, apart from the model and the data."""

from __future__ import annotations

import numbers
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, cast, get_args

from sqcompile.errors import RecipeError
from sqcompile.kernels.qtypes import QTYPES, QType
from sqcompile.kernels.rotation import BLOCKS
from sqcompile.plan.notebook import table
from sqcompile.plan.overrides import Overrides, canonical

Activation = Literal["per_token", "per_tensor", "per_tensor_static"]
Weight = Literal["per_channel", "per_tensor"]
AttentionProducts = Literal["none", "qk", "qk_pv"]
Format = Literal["int8", "fp8"]
Spikes = Literal["dynamic", "static"]
Granularity = Literal["per_token", "per_head", "per_tensor", "per_tensor_static"]

LM_HEAD = "lm_head"  # in ``Recipe.skip``: the projection back to the vocabulary, there or not, whatever its name


@dataclass(frozen=True)
class Recipe:
    """Quantization and smoothing choices of one compilation (SmoothQuant, arXiv 2211.10438, table 2).

    Attributes:
        alpha: migration strength in [0, 1], ``s_j = max|X_j|^alpha / max|W_:j|^(1-alpha)``. A tuple is a set of
            candidates: each site takes the one with the smallest quantization error on the calibration sample.
            "auto" tries .1, .2, ... 1, and takes what the model's outputs feel least, by gradients on calibration
            calls. "No smoothing" is always a candidate, so that a site where smoothing hurts is left alone.
        activation: ``"per_token"`` (dynamic, one scale per row, every dim but the last), ``"per_tensor"`` (dynamic,
            one scale) or ``"per_tensor_static"`` (one scale from calibration).
        weight: ``"per_channel"`` (one scale per output channel, [N, 1]) or ``"per_tensor"``.
        smooth: False quantizes without smoothing.
        skip: qualified module names, or parts or shell patterns of them, that stay in float.
        dtype: the number format of weights and activations, ``"int8"`` or ``"fp8"`` (float8_e4m3fn, for GPUs of compute
            capability 8.9 and later). Attention and routed experts stay in float with "fp8".
        lm_head: whether the projection back to the vocabulary is quantized, too. It is a linear named "lm_head", or one
            of any name with the shape of the token embedding that no other linear reads.
        min_speedup: linears whose INT8 GEMM is expected to be less than this times as fast as bfloat16, by the measured
            table of this GPU (kernels/speedups), with 1, 512 or 2048 rows, stay in float; linears that share an input
            count as one. So do attentions expected to be less than this times as fast as
            scaled_dot_product_attention in bfloat16, in prefill or decode. 0 keeps none; shapes that no table knows, and
            linears on CPUs, are not affected. Attention without a kernel stays in float for any number but 0: on CPUs, and
            where it is not one operator.
        attention: products of attention in INT8: ``"none"``, ``"qk"`` (QKᵀ) or ``"qk_pv"`` (PV, too).
        qk: scales of Q and K: ``"per_token"`` (one per token and head), ``"per_head"`` (one per sequence and head),
            ``"per_tensor"`` or ``"per_tensor_static"``; None stands for what ``activation`` says. V has a scale per
            head channel, static where Q's and K's are, and the weights P their known range [0, 1].
        rotate: inputs of linears are rotated by Hadamard matrices in blocks of channels before they are quantized, which
            spreads outliers over a block (weights are rotated beforehand; `sqcompile.kernels.rotation`): "none", "auto"
            (each input's block of 16, 32, 64 or 128, or none, by the error on the calibration sample), or the size of the
            blocks, for every input whose channels it divides.
        overrides: other values of alpha, activation, weight, smooth, rotate, shift, spikes, min_speedup and lm_head for some linears,
            and ``"skip": True`` for those that stay in float: a dict of such dicts by patterns, which name linears as those
            of ``skip`` do. Of two that name one linear, the later wins. Linears that read one input share its
            activation, rotation, shift and α.
        max_degradation: percent of perplexity that the model may lose, as far as the calibration sample tells (its KL
            divergence and one standard error), or of the value of an ``evaluate`` that is passed to `compile`. The linears
            that cost most for their share of the INT8 work stay in float, as few as will do. None for no limit.
        spikes: what static scales do where a few calibration tokens are many times as large as the others: "dynamic"
            leaves such an input a scale for each token at run time, if that makes its error a quarter or less, and one of
            the few that cost the outputs most, if that halves what it costs (with gradients: alpha="auto"); "static"
            never does.
        shift: whether the mean of a LayerNorm's output is taken off what linears read, by the norm's bias and theirs, where
            their roundings become smaller for it (arXiv 2304.09145). No operation is added, except in a graph that lacks the norm.
            "default", "O2" and "O3" pass True: scales of whole tensors gain most.
        float_work: the share of the INT8 work, from 0 to 1, that may stay in float for accuracy. Inputs whose linears cost
            the logits at least twice their share of the work, as far as gradients on calibration calls tell, are left in
            float, dearest first, until the others cost less than .03 % of perplexity. "default" passes .1; nothing stays in
            float for it where a model gives no logits, and where ``max_degradation`` decides.

    Raises:
        RecipeError: if a value is of another type or out of range, or two contradict each other.
    """

    alpha: float | tuple[float, ...] | Literal["auto"] = 0.5
    activation: Activation = "per_token"
    weight: Weight = "per_channel"
    smooth: bool = True
    skip: tuple[str, ...] = ()
    min_speedup: float = 0.0
    attention: AttentionProducts = "none"
    qk: Granularity | None = None
    lm_head: bool = False
    dtype: Format = "int8"
    rotate: Literal["auto", "none"] | int = "none"
    overrides: Mapping[str, Mapping[str, Any]] | Overrides = ()
    max_degradation: float | None = None
    spikes: Spikes = "dynamic"
    shift: bool = False
    float_work: float = 0.0

    def __post_init__(self) -> None:
        if self.activation not in get_args(Activation):
            raise RecipeError(f"activation={self.activation!r}: choose one of {', '.join(get_args(Activation))}")
        if self.weight not in get_args(Weight):
            raise RecipeError(f"weight={self.weight!r}: choose one of {', '.join(get_args(Weight))}")
        if self.attention not in get_args(AttentionProducts):
            raise RecipeError(f"attention={self.attention!r}: choose one of {', '.join(get_args(AttentionProducts))}")
        if self.spikes not in get_args(Spikes):
            raise RecipeError(f"spikes={self.spikes!r}: choose one of {', '.join(get_args(Spikes))}")
        if self.dtype not in get_args(Format):
            raise RecipeError(f"dtype={self.dtype!r}: choose one of {', '.join(get_args(Format))}")
        if self.dtype != "int8" and self.attention != "none":
            raise RecipeError(
                f"attention={self.attention!r} with dtype={self.dtype!r}: attention runs in INT8 or in float, leave it out"
            )
        if self.dtype != "int8" and self.min_speedup:
            raise RecipeError(
                f"min_speedup={self.min_speedup!r} with dtype={self.dtype!r}: only INT8 was measured, leave it out"
            )
        if self.qk is not None and self.qk not in get_args(Granularity):
            raise RecipeError(f"qk={self.qk!r}: choose one of {', '.join(get_args(Granularity))}, or None")
        if self.qk is not None and self.attention == "none":
            raise RecipeError(f"qk={self.qk!r} without attention: pass attention='qk' or 'qk_pv', or leave qk out")
        if self.rotate not in ("auto", "none") and (type(self.rotate) is not int or self.rotate not in BLOCKS):
            raise RecipeError(
                f"rotate={self.rotate!r}: 'auto', 'none', or the size of the blocks, one of {', '.join(map(str, BLOCKS))}"
            )
        for name in ("smooth", "lm_head", "shift"):
            if not isinstance(getattr(self, name), bool):
                raise RecipeError(f"{name}={getattr(self, name)!r}: True or False")
        object.__setattr__(self, "skip", _patterns(self.skip))
        if self.lm_head and LM_HEAD in self.skip:
            raise RecipeError(
                f"lm_head=True quantizes the projection that skip={self.skip!r} leaves in float: drop one"
            )
        if not _within(self.min_speedup, sys.float_info.max):
            raise RecipeError(f"min_speedup={self.min_speedup!r}: a factor such as 1.0, or 0 to quantize all")
        object.__setattr__(self, "min_speedup", float(self.min_speedup))
        if self.max_degradation is not None:
            if not _within(self.max_degradation, sys.float_info.max):
                raise RecipeError(
                    f"max_degradation={self.max_degradation!r}: a percentage such as 0.05, or None for no limit"
                )
            object.__setattr__(self, "max_degradation", float(self.max_degradation))
        if not _within(self.float_work, 1.0):
            raise RecipeError(
                f"float_work={self.float_work!r}: a share of the work from 0 to 1, such as 0.1, or 0 for none"
            )
        object.__setattr__(self, "float_work", float(self.float_work))
        self._check_alpha()
        object.__setattr__(self, "overrides", canonical(self, self.overrides))

    def __repr__(self) -> str:
        return f"Recipe({', '.join(f'{name}={value!r}' for name, value in self.chosen())})"

    def _repr_html_(self) -> str:
        return table(["recipe", ""], self.chosen())

    def chosen(self) -> list[tuple[str, Any]]:
        """α, and the fields that are not as by default, with their values."""
        found = [
            (f.name, getattr(self, f.name))
            for f in fields(self)
            if f.name == "alpha" or getattr(self, f.name) != f.default
        ]
        as_given = {"overrides": {pattern: dict(own) for pattern, own in self.by_pattern}}
        return [(name, as_given.get(name, value)) for name, value in found]

    def _check_alpha(self) -> None:
        if isinstance(self.alpha, str):
            if self.alpha != "auto":
                raise RecipeError(f"alpha={self.alpha!r}: 'auto', a migration strength in [0, 1], or a tuple of them")
            return
        several = isinstance(self.alpha, (list, tuple))
        alphas: tuple[Any, ...] = tuple(self.alpha) if several else (self.alpha,)  # type: ignore[arg-type]
        if not alphas or not all(_within(a, 1.0) for a in alphas):
            raise RecipeError(f"alpha={self.alpha!r}: a migration strength, or each of a tuple of them, lies in [0, 1]")
        alphas = tuple(map(float, alphas))
        object.__setattr__(self, "alpha", alphas if several else alphas[0])

    @property
    def qtype(self) -> QType:
        """The number format of weights and activations."""
        return QTYPES[self.dtype]

    @property
    def alphas(self) -> tuple[float, ...]:
        """The candidate migration strengths of a site."""
        if isinstance(self.alpha, str):
            return AUTO
        return self.alpha if isinstance(self.alpha, tuple) else (self.alpha,)

    @property
    def by_loss(self) -> bool:
        """Whether sites choose by what the model's outputs feel."""
        return self.alpha == "auto" and (self.smooth or self.rotate == "auto" or self.activation == "per_tensor_static")

    @property
    def may_leave_dynamic(self) -> bool:
        """Whether single inputs of static linears may have a scale for each token after all."""
        return self.activation == "per_tensor_static" and self.spikes == "dynamic"

    @property
    def blocks(self) -> tuple[int, ...]:
        """The candidate sizes of the blocks in which inputs of linears are rotated."""
        return () if self.rotate == "none" else BLOCKS if isinstance(self.rotate, str) else (self.rotate,)

    @property
    def by_pattern(self) -> Overrides:
        """``overrides`` as they are kept: patterns in order, with their fields."""
        return cast(Overrides, self.overrides)

    @property
    def granularity(self) -> Granularity:
        """Of Q's and K's scales."""
        return self.qk or self.activation


def _within(x: Any, high: float) -> bool:
    """Whether x is a number in [0, high]; True and False are none."""
    number = isinstance(x, numbers.Real) and not isinstance(x, bool)
    return number and bool(0 <= x <= high)


def _patterns(skip: Any) -> tuple[str, ...]:
    if isinstance(skip, str):
        raise RecipeError(f"skip={skip!r} is a string: pass a tuple of names, skip=({skip!r},)")
    found = tuple(skip) if isinstance(skip, Iterable) else (skip,)
    if not all(isinstance(pattern, str) for pattern in found):
        raise RecipeError(f"skip={skip!r}: pass a tuple of names, such as ('down_proj',)")
    return found


# "auto" tries all; stronger ones of the others win on the sample at times, by the linears' own errors, but lose on text
# unlike the calibration text.
AUTO = tuple(i / 10 for i in range(1, 11))
ALPHAS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)

# O1-O3 are the paper's efficiency levels, which quantize the products of attention, too; "default" is per-channel
# weights with per-token activations, the combination that keeps Llama-class models intact, and leaves attention float;
# "fp8" is the same in another number format.
PRESETS: dict[str, Recipe] = {
    "default": Recipe("auto", rotate="auto", shift=True, float_work=0.1),
    "O1": Recipe("auto", weight="per_tensor", attention="qk_pv", rotate="auto"),
    "O2": Recipe("auto", "per_tensor", "per_tensor", attention="qk_pv", rotate="auto", shift=True),
    "O3": Recipe("auto", "per_tensor_static", "per_tensor", attention="qk_pv", rotate="auto", shift=True),
    "fp8": Recipe(alpha=ALPHAS, dtype="fp8"),
}


def resolve_recipe(recipe: str | Recipe | None) -> Recipe:
    """The Recipe that a name or a Recipe stands for; None stands for "default".

    Raises:
        RecipeError: for an unknown name or type; the message lists the names.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if recipe is None:
        return PRESETS["default"]
    if isinstance(recipe, str) and recipe in PRESETS:
        return PRESETS[recipe]
    raise RecipeError(f"unknown recipe {recipe!r}: pass one of {', '.join(PRESETS)}, or a sqcompile.Recipe")
