"""check_values: whether what a plan says can be done. Nothing of a file, or of a plan made by hand, is taken on trust.

What only a graph can tell is left to `rewrite`: names, and shapes of weights.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any, Protocol, get_args

import torch
from torch import Tensor

from sqcompile.capture.call_spec import check_spec
from sqcompile.errors import PlanError
from sqcompile.kernels.rotation import blocks_of
from sqcompile.plan.entries import AttentionPlan, LayerPlan, Shard
from sqcompile.plan.recipe import Activation, AttentionProducts, Recipe, Weight

_SHORT = {type(None), bool, float}
_LONGEST_NAME = 1000
_LARGEST_SIZE = 2**31 - 1

# No smoothing scale is larger, nor smaller than 1 over it: any s is as exact, and two of them take no sane weight out of float32.
LARGEST_SCALE = 2.0**40

# Scales of smoothing: what `fold` makes of a weight, w · s_in / s_out, is finite in float32 for every |w| < 2^47.
_SMOOTHING = 1 / LARGEST_SCALE, LARGEST_SCALE
# Δ of activations: 1/Δ and 127 Δ are finite in float32; the least one stands for zeros (`absmax_scale`).
_STEP = 1e-33, 2.7e36
_ANY = -torch.finfo(torch.float32).max, torch.finfo(torch.float32).max
LARGEST_SHIFT = 2.0**16  # c: X - c keeps float32's precision
_SHIFT = -LARGEST_SHIFT, LARGEST_SHIFT

# By what it is, each tensor of an attention: its shape, from (H, G, D), None for a size that only the graph knows; its range.
_HEADS: dict[str, tuple[Callable[[int, int, int], tuple[int | None, ...]], tuple[float, float]]] = {
    "scale": (lambda h, g, d: (None,), _SMOOTHING),
    "query_by": (lambda h, g, d: (h, d), _SMOOTHING),
    "key_by": (lambda h, g, d: (g, d), _SMOOTHING),
    "key_mean": (lambda h, g, d: (g, d), _ANY),
    "value_scale": (lambda h, g, d: (g, None), _STEP),
}


class Contents(Protocol):
    """What a `Plan` holds."""

    @property
    def recipe(self) -> Recipe: ...
    @property
    def call(self) -> Any: ...
    @property
    def scales(self) -> dict[str, Tensor]: ...
    @property
    def layers(self) -> tuple[LayerPlan, ...]: ...
    @property
    def attention(self) -> tuple[AttentionPlan, ...]: ...
    @property
    def heads(self) -> dict[str, Tensor]: ...
    @property
    def columns(self) -> dict[str, Tensor]: ...
    @property
    def shifts(self) -> dict[str, Tensor]: ...
    @property
    def shard(self) -> Shard | None: ...


def check_values(plan: Contents) -> None:
    """Checks every field of a plan whose parts have the right classes, and that they agree with each other.

    Raises:
        PlanError: names the field, its value and what it should be.
    """
    check_spec(plan.call)
    _check_shard(plan.shard)
    layers = {l.name: l for l in plan.layers if _named(l.name, "linear")}
    attention = {a.name: a for a in plan.attention if _named(a.name, "attention")}
    need(len(layers) == len(plan.layers), "it names a linear twice")
    need(len(attention) == len(plan.attention), "it names an attention twice")
    for l in plan.layers:
        _check_layer(l, f"linear {l.name!r}", plan.recipe)
    for a in plan.attention:
        _check_attention(a, f"attention {a.name!r}", plan)
    need(any(l.quantized for l in plan.layers), "it quantizes no linear")
    for name, s in plan.columns.items():
        need(name in layers, f"its columns belong to {said(name)}, which is none of its linears")
        _tensor(s, f"columns of {name!r}", layers[name].shape[-1:], _SMOOTHING)
    for name, c in plan.shifts.items():
        known = name in layers and layers[name].kind == "linear"
        need(known, f"its shifts belong to {said(name)}, which is none of its linears")
        _tensor(c, f"shifts of {name!r}", layers[name].shape[-1:], _SHIFT)
    for name, t in plan.heads.items():
        whose, _, what = name.rpartition("/") if isinstance(name, str) else ("", "", "")
        known = whose in attention and what in _HEADS
        need(known, f"its heads have {said(name)}, which is nothing of one of its attentions")
        static = plan.recipe.granularity == "per_tensor_static"
        need(static or what != "value_scale", f"its heads have {name!r}, and its recipe is dynamic")
        shape, bounds = _HEADS[what]
        _tensor(t, f"heads {name!r}", shape(*attention[whose].shape), bounds)
    _check_sites(plan, layers)


def _check_shard(shard: Any) -> None:
    if shard is None:
        return
    need(isinstance(shard, Shard), f"its shard is {said(shard)}, neither a Shard nor None")
    good = all(type(n) is int for n in (shard.rank, shard.count)) and 0 <= shard.rank < shard.count <= _LARGEST_SIZE
    need(good and shard.count > 1, f"its shard is of rank {said(shard.rank)} of {said(shard.count)} processes")


def _check_layer(l: LayerPlan, what: str, recipe: Recipe) -> None:
    _choice(l.kind, ("linear", "experts"), f"{what}: kind")
    need(isinstance(l.quantized, bool), f"{what}: quantized is {said(l.quantized)}, not True or False")
    _sizes(l.shape, what, 3 if l.kind == "experts" else 2)
    _check_decision(l, what)
    if l.input_scale is not None:
        number(l.input_scale, f"{what}: input_scale", *_STEP)
    if l.rotation is not None:
        known = type(l.rotation) is int and l.rotation in blocks_of(l.shape[-1])
        need(
            known, f"{what}: rotation is {said(l.rotation)}, no size of blocks that divides its {l.shape[-1]} channels"
        )
        need(l.quantized, f"{what} is rotated, and stays in float")
    for name, choices in (("activation", get_args(Activation)), ("weight", get_args(Weight))):
        if (own := getattr(l, name)) is not None:
            _choice(own, choices, f"{what}: {name}")
            left = name == "activation" and own == "per_token" and recipe.activation == "per_tensor_static"
            need(bool(recipe.overrides) or left, f"{what}: {name} is {own!r}, and its recipe overrides nothing")
    if l.loss is not None:
        number(l.loss, f"{what}: loss", 0.0, math.inf)
    if l.quantized:
        static = (l.activation or recipe.activation) == "per_tensor_static"
        how = "an input_scale, as its recipe is static" if static else "no input_scale, as its recipe is dynamic"
        need((l.input_scale is not None) == static, f"{what} needs {how}")


def _check_attention(a: AttentionPlan, what: str, plan: Contents) -> None:
    _choice(a.quantized, get_args(AttentionProducts), f"{what}: quantized")
    _sizes(a.shape, what, 3, 1 if a.quantized != "none" else 0)  # of what is no attention they are not known
    need(a.shape[1] > 0, f"{what}: it has no key heads")
    need(a.shape[0] % a.shape[1] == 0, f"{what}: its {a.shape[1]} key heads do not share {a.shape[0]} heads evenly")
    _check_decision(a, what)
    for name in ("q_scale", "k_scale"):
        if (step := getattr(a, name)) is not None:
            number(step, f"{what}: {name}", *_STEP)
    if a.quantized == "none":
        return
    need(a.quantized == plan.recipe.attention, f"{what}: quantized is {a.quantized!r}, and not so in the recipe")
    static = plan.recipe.granularity == "per_tensor_static"
    how = (
        "a q_scale and a k_scale, as its recipe is static"
        if static
        else "no q_scale and k_scale, as its recipe is dynamic"
    )
    need((a.q_scale is not None) == (a.k_scale is not None) == static, f"{what} needs {how}")
    both = all(f"{a.name}/{by}" in plan.heads for by in ("query_by", "key_by"))
    need(a.smoothing == "none" or both, f"{what}: smoothing is {a.smoothing!r}, without heads query_by and key_by")


def _check_decision(x: LayerPlan | AttentionPlan, what: str) -> None:
    """What linears and attentions have in common."""
    _choice(x.smoothing, ("folded", "multiplied", "none"), f"{what}: smoothing")
    need(is_text(x.reason), f"{what}: reason is {said(x.reason)}, not a line of text")
    if x.alpha is not None:
        number(x.alpha, f"{what}: alpha", 0.0, 1.0)
    if x.sqnr_db is not None:  # infinite where the output is exact
        number(x.sqnr_db, f"{what}: sqnr_db", *_ANY[:1], math.inf)


def _check_sites(plan: Contents, layers: dict[str, LayerPlan]) -> None:
    """Every smoothed linear has its scale in one site, or at least in ``columns``."""
    commas = max((name.count(", ") for name in layers), default=0) + 1
    balanced: set[str] = set()
    for site, s in plan.scales.items():
        _tensor(s, f"scales of {said(site)}", (None,), _SMOOTHING)
        balance = _balance(site, layers, commas) if isinstance(site, str) else []
        need(bool(balance), f"its scales have {said(site)}, which is no 'producer -> linears' with linears of it")
        need(len({*balance} - balanced) == len(balance), f"it scales a linear of {site!r} twice")
        balanced.update(balance)
    for name, l in layers.items():
        if l.quantized and l.smoothing == "none":
            need(name not in balanced, f"linear {name!r}: smoothing is 'none', and it is in a site with scales")
        elif l.quantized:
            scaled = name in balanced or name in plan.columns
            need(scaled, f"linear {name!r}: smoothing is {l.smoothing!r}, and there are no scales for it")


def _balance(site: str, layers: dict[str, LayerPlan], commas: int) -> list[str]:
    """The linears of a site "producer -> linear, linear", empty if it is none; a name may have a comma in it."""
    producer, _, rest = site.partition(" -> ")
    parts, found, i = rest.split(", "), list[str](), 0
    while i < len(parts):
        whole = (", ".join(parts[i:j]) for j in range(min(i + commas, len(parts)), i, -1))
        name = next((n for n in whole if n in layers), None)
        if name is None:
            return []
        found.append(name)
        i += name.count(", ") + 1
    return found if is_text(producer) and producer else []


def _tensor(t: Any, what: str, shape: tuple[int | None, ...], bounds: tuple[float, float]) -> None:
    if not isinstance(t, Tensor):  # which takes long to print
        need(False, f"{what} are {said(t)}, no tensor")
    need(t.dtype == torch.float32, f"{what} are {t.dtype}, not torch.float32")
    fits = len(t.shape) == len(shape) and all(n == want or want is None for n, want in zip(t.shape, shape, strict=True))
    sizes = " x ".join("any" if n is None else str(n) for n in shape)
    need(fits and t.numel() > 0, f"{what} have the shape {tuple(t.shape)}, not {sizes}")
    need(t.layout == torch.strided and not t.is_meta, f"{what} hold no numbers")
    low, high = bounds
    inside = (t >= low) & (t <= high)
    if not bool(inside.all()):  # nor is a NaN
        need(False, f"{what} have {float(t[~inside][0])}, and must lie in [{low:.3g}, {high:.3g}]")


def number(x: Any, what: str, low: float, high: float) -> None:
    need(isinstance(x, float) and low <= x <= high, f"{what} is {said(x)}, not a float in [{low:.3g}, {high:.3g}]")


def _choice(x: Any, choices: tuple[str, ...], what: str) -> None:
    need(isinstance(x, str) and x in choices, f"{what} is {said(x)}, not one of {', '.join(choices)}")


def _sizes(shape: Any, what: str, dims: int, least: int = 1) -> None:
    good = isinstance(shape, tuple) and len(shape) == dims
    good = good and all(type(n) is int and least <= n <= _LARGEST_SIZE for n in shape)
    need(good, f"{what}: shape is {said(shape)}, not {dims} sizes")


def _named(name: Any, what: str) -> bool:
    good = is_text(name) and 0 < len(name) <= _LONGEST_NAME
    need(good, f"the name of one {what} is {said(name)}, not a name of a parameter or module")
    return True


def is_text(x: Any) -> bool:
    """Whether x is one line that can be printed: no control characters of a terminal, no halves of surrogate pairs."""
    return isinstance(x, str) and x.isprintable()


def need(good: bool, otherwise: str) -> None:
    if not good:
        raise PlanError(f"the plan cannot be right: {otherwise}. Calibrate again")


def said(x: Any) -> str:
    """A value in a few words, whatever it is."""
    if type(x) in _SHORT:  # what most checks are of, each of which has its words ready
        return repr(x)
    if isinstance(x, Tensor) or is_dataclass(x):  # thousands of numbers, printed before a check is known to fail
        return f"of the type {type(x).__name__}"
    try:
        return reprlib.repr(x)
    except Exception:  # a number too long to be printed
        return f"a {type(x).__name__}"
