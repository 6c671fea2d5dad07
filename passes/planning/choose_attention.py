"""choose_attention: which attentions are quantized, with which scales of head channels. Part of `choose`.

    s_j = max|K_j|^α / max|Q_j|^(1-α)               K / s, Q · s: keys are the side with outliers

j runs over the classes of head channels that share a scale (`head_labels`). Every α, and no smoothing, is tried on a
sample of queries and keys, with and without K's mean subtracted, and the one with the smallest error of the scores is
taken. Where no parameter absorbs s, it is multiplied explicitly, before quantization, if that pays; then every channel
of a key head has a scale of its own. The error leaves out what is the same for all keys of a query: softmax does not see it. For the same reason a
constant per head and channel may be subtracted from all keys: K's mean over the calibration tokens. That is exact for
whatever mask, padding or number of keys, and costs one subtraction that is fused into the quantization.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from sqcompile.kernels import speedup
from sqcompile.kernels.reference import absmax_scale, quantize, token_scale
from sqcompile.kernels.targets import Target
from sqcompile.passes.attention.chains import Attention
from sqcompile.passes.attention.head_sites import HeadSite, match_heads
from sqcompile.passes.attention.value_sites import value_labels
from sqcompile.passes.planning.error import Chooser
from sqcompile.passes.planning.overrides import recipe_of_attention
from sqcompile.passes.planning.smoothing import awake, smoothing_scale
from sqcompile.passes.planning.sqnr import relative, sqnr_db
from sqcompile.passes.planning.static_scales import margin, margin_of_channels
from sqcompile.plan.edit import named
from sqcompile.plan.entries import AttentionPlan, Smoothing
from sqcompile.plan.recipe import Recipe
from sqcompile.statistics.input_stats import InputStats

# Scales that no parameter absorbs are multiplied explicitly only if they cut the error of the scores to this part.
PAYS = 0.9


@dataclass(frozen=True)
class _Choice:
    """How one attention's operands are changed before quantization, and what error is left.

    Attributes:
        by: Q [H, D] is multiplied by ``by[0]``, K [G, D] divided by ``by[1]``; float32.
        mean: subtracted from K before it is divided, float32 [G, D]; None for nothing.
        error: of the scores, relative to their energy.
    """

    by: tuple[Tensor, Tensor]
    mean: Tensor | None
    error: float


def choose_attention(
    gm: fx.GraphModule, chooser: Chooser, attentions: Sequence[Attention], floats: set[str]
) -> tuple[tuple[AttentionPlan, ...], dict[str, Tensor]]:
    """Plans for attentions, and their tensors (see `Plan.heads`).

    Args:
        gm: a traced graph.
        chooser: with the scales of its linears applied; those of head channels are added to it.
        attentions: of the graph; none leaves all attention alone.
        floats: names of the linears that stay in float.
    """
    reasons = {a.name: reason for a in attentions if (reason := _stays_float(chooser, a))}
    open_ = {a.name: a for a in attentions if a.name not in reasons}
    sites, why = ([], {}) if chooser.unsmoothed else match_heads(gm, list(open_.values()))
    tensors: dict[str, Tensor] = {}
    chosen: dict[str, tuple[_Choice, float | None, str]] = {}
    for site in sites:
        s, alpha, choices = _best(chooser, site, open_, floats)
        reason = "smoothing would raise the error of its scores"
        if s is not None:
            tensors[f"{site.name}/scale"] = s
            _apply(chooser, site, s)
            q, k = (", ".join(x.name for x, _ in side) for side in (site.queries, site.keys))
            reason = f"s folded into {q}" + ("" if q == k else f" and {k}")
        chosen |= {name: (choice, alpha, reason) for name, choice in choices.items()}
    static = chooser.recipe.granularity == "per_tensor_static" and chooser.recipe.attention == "qk_pv"
    values = value_labels(gm, list(open_.values())) if static else {}
    plans = []
    for a in attentions:
        shape = (a.heads, a.groups, a.width)
        if a.name in reasons:
            plans.append(AttentionPlan(a.name, "none", "none", reasons[a.name], shape=shape))
            continue
        how: Smoothing = "folded"
        if a.name in why:
            how = "multiplied"
            chosen[a.name] = _explicit(chooser, a, why[a.name])
        elif a.name not in chosen:
            chosen[a.name] = _least(chooser, a, _ones(chooser, a)), None, chooser.unsmoothed or ""
        plans.append(_plan(chooser, a, how, *chosen[a.name], values.get(a.name), tensors))
    return tuple(plans), tensors


def _plan(
    chooser: Chooser,
    a: Attention,
    how: Smoothing,
    choice: _Choice,
    alpha: float | None,
    reason: str,
    values: dict[str, Tensor] | None,
    tensors: dict[str, Tensor],
) -> AttentionPlan:
    """The plan, and its tensors; ``values`` says what V is made of where it gets a static Δ (`value_labels`)."""
    recipe, shape = chooser.recipe, (a.heads, a.groups, a.width)
    if alpha is not None:
        tensors[f"{a.name}/query_by"], tensors[f"{a.name}/key_by"] = choice.by[0], choice.by[1].reciprocal()
    if choice.mean is not None:
        tensors[f"{a.name}/key_mean"] = choice.mean / choice.by[1]
        reason += "; K less its mean"
    if isinstance(a.scores, str):
        reason += f"; not one operator: {a.scores}"
    q_scale = k_scale = None
    if recipe.granularity == "per_tensor_static":
        q_scale = _static(chooser.calibration.heads[a.q], choice.by[0].reciprocal())
        k_scale = _static(chooser.calibration.heads[a.k], choice.by[1])
        if values is not None:
            absmax_v = chooser.calibration.heads[a.v].absmax.view(a.groups, -1)
            for producer, labels in values.items():
                s, index = chooser.producers.get(producer), labels.to(absmax_v.device)
                if s is not None:
                    absmax_v = torch.where(index >= 0, absmax_v / s[index.clamp_min(0)], absmax_v)
            heads = torch.stack([awake(head) for head in absmax_v])  # a silent channel may wake up, a silent head, too
            room = 1 + margin_of_channels(chooser.calibration.heads[a.v])
            tensors[f"{a.name}/value_scale"] = absmax_scale(torch.where(heads > 0, heads, awake(absmax_v)) * room)
    sqnr = sqnr_db(choice.error, f"the scores of {a.name}") if choice.error > 0 else None  # nothing to compare
    how = "none" if alpha is None else how
    return AttentionPlan(a.name, recipe.attention, how, reason, alpha, sqnr, q_scale, k_scale, shape)


def _static(stats: InputStats, columns: Tensor) -> float:
    """Static Δ of Q or K, whose channels are divided by columns [H, D]."""
    by = columns.flatten()
    room = 1 + margin(stats, by.expand(2, -1), by.square().reciprocal())
    return float(absmax_scale((stats.absmax / by).max() * room))


def _stays_float(chooser: Chooser, a: Attention) -> str | None:
    if a.refused:
        return a.refused
    own = recipe_of_attention(a, chooser.recipe)
    for pattern in own.skip:
        if named(pattern, a.name):
            return f"skipped by the recipe ({pattern!r})"
    if any(node not in chooser.calibration.heads for node in a.operands.values()):
        return "no calibration token reached it"
    if chooser.recipe.granularity == "per_tensor_static":
        for what, node in a.operands.items():
            if (how := chooser.calibration.heads[node].unvarying()) and (
                what != "values" or chooser.recipe.attention == "qk_pv"
            ):
                return f"its {what} were {how}: no static scale can be chosen"
    return _slow(chooser, a, own)


def _slow(chooser: Chooser, a: Attention, recipe: Recipe) -> str | None:
    """Why an attention stays in float that is not expected to be fast enough on this device."""
    if not recipe.min_speedup:
        return None
    device = chooser.calibration.heads[a.q].absmax.device
    gains = speedup.expected_attention(device, recipe.attention, a.width)
    if isinstance(a.scores, str):
        return f"INT8 is slower than float for what is not one operator ({a.scores})"
    if not gains and Target.of(device).attention != "triton":
        return f"INT8 is slower than float on {device.type}, which has no kernel for it"
    for (batch, queries, keys), gain in gains.items():
        if gain < recipe.min_speedup:
            call = f"{batch} x {queries} queries of {keys} keys"
            return f"INT8 is expected to be {gain:.2f}x of bf16 with {call}, less than {recipe.min_speedup}x"
    return None


def _best(
    chooser: Chooser, site: HeadSite, attentions: dict[str, Attention], floats: set[str]
) -> tuple[Tensor | None, float | None, dict[str, _Choice]]:
    """The scales with the smallest error, their alpha, and the choice for each attention; None for no smoothing."""
    device = _absmax(chooser, attentions[site.name])[0].device
    maxima = torch.zeros(2, site.classes, dtype=torch.float32, device=device)
    for name, maps in site.maps.items():
        for largest, absmax, classes in zip(maxima, _absmax(chooser, attentions[name]), maps, strict=True):
            here = classes.to(device) >= 0
            largest.scatter_reduce_(0, classes.to(device)[here], absmax[here], "amax")
    producers = {x.producer for x, _ in (*site.queries, *site.keys) if x.kind == "linear"}
    rows = [l for l in (chooser.linears[p] for p in producers) if l.name not in floats]
    # one scale for all rows feels their scales
    touched = [l for l in rows if chooser.own[l.name].weight == "per_tensor"]
    best: tuple[float, Tensor | None, float | None, dict[str, _Choice]] = (math.inf, None, None, {})
    for alpha in (None, *chooser.recipe.alphas):
        one = torch.ones(site.classes, dtype=torch.float32, device=device)
        s = one if alpha is None else smoothing_scale(maxima[1], maxima[0], alpha)
        choices = {}
        for name, maps in site.maps.items():
            by = [torch.where(m.to(device) >= 0, s[m.to(device).clamp_min(0)], 1.0) for m in maps]
            choices[name] = _least(chooser, attentions[name], (by[0], by[1]))
        saved = dict(chooser.rows)
        _apply(chooser, site, s)
        error = sum(c.error for c in choices.values()) + sum(chooser.error(l) for l in touched)
        chooser.rows = saved
        if error < best[0]:
            best = error, None if alpha is None else s, alpha, choices
    return best[1:]


def _explicit(chooser: Chooser, a: Attention, why: str) -> tuple[_Choice, float | None, str]:
    """The choice where no parameter absorbs s, its alpha, and the reason: q·s and k·(1/s) cost an operation each."""
    best, alpha = _least(chooser, a, _ones(chooser, a)), None
    most = best.error * PAYS
    absmax_q, absmax_k = _absmax(chooser, a)
    repeats = a.heads // a.groups
    together = absmax_q.view(a.groups, repeats, a.width).amax(1)
    for candidate in chooser.recipe.alphas:
        s = smoothing_scale(absmax_k.flatten(), together.flatten(), candidate).view_as(together)
        choice = _least(chooser, a, (s.repeat_interleave(repeats, 0), s))
        if choice.error < most:
            best, most, alpha = choice, choice.error, candidate
    if alpha is None:
        return best, None, f"not smoothed: {why}"
    return best, alpha, f"q·s and k·(1/s) before quantization: {why}"


def _apply(chooser: Chooser, site: HeadSite, s: Tensor) -> None:
    """Divides the rows of the linears that absorb s."""
    for absorbers, by in ((site.queries, s.reciprocal()), (site.keys, s)):
        for x, classes in absorbers:
            if x.kind == "linear":
                index = classes.to(s.device)
                rows = torch.where(index >= 0, by[index.clamp_min(0)], 1.0)
                name = chooser.linears[x.producer].name
                chooser.rows[name] = chooser.rows[name] * rows if name in chooser.rows else rows


def _ones(chooser: Chooser, a: Attention) -> tuple[Tensor, Tensor]:
    q, k = _absmax(chooser, a)
    return torch.ones_like(q), torch.ones_like(k)


def _absmax(chooser: Chooser, a: Attention) -> tuple[Tensor, Tensor]:
    """max|Q| and max|K| per head and channel: float32 [H, D] and [G, D]."""
    stats = chooser.calibration.heads
    return stats[a.q].absmax.view(a.heads, a.width), stats[a.k].absmax.view(a.groups, a.width)


def _least(chooser: Chooser, a: Attention, by: tuple[Tensor, Tensor]) -> _Choice:
    """The smaller error of K with and without its mean, which only dynamic scales and plain scores leave open."""
    free = not isinstance(a.scores, str) and not a.scores.softcap
    choices = [_Choice(by, None, _error(chooser, a, by, None, free))]
    if free and not chooser.unsmoothed and chooser.recipe.granularity != "per_tensor_static":
        mean = chooser.calibration.heads[a.k].rows.float().mean(0).view(a.groups, a.width)
        choices.append(_Choice(by, mean, _error(chooser, a, by, mean, free)))
    return min(choices, key=lambda c: c.error)


def _error(chooser: Chooser, a: Attention, by: tuple[Tensor, Tensor], mean: Tensor | None, shift: bool) -> float:
    """|S_quantized - S|² / |S|² of the scores of sampled queries and keys; of their differences, if ``shift``."""
    stats, granularity = chooser.calibration.heads, chooser.recipe.granularity
    q = stats[a.q].rows.float().unflatten(1, (a.heads, a.width)).transpose(0, 1)  # [H, R, D]
    k = stats[a.k].rows.float().unflatten(1, (a.groups, a.width)).transpose(0, 1)  # [G, R, D]
    repeats = a.heads // a.groups

    def scores(q: Tensor, k: Tensor) -> Tensor:
        s = q @ k.repeat_interleave(repeats, 0).mT
        return s - s.mean(-1, keepdim=True) if shift else s

    want = scores(q, k)
    smooth_q, smooth_k = q * by[0][:, None], (k if mean is None else k - mean[:, None]) / by[1][:, None]
    absmax_q, absmax_k = _absmax(chooser, a)
    static = granularity == "per_tensor_static"
    sizes = (absmax_q * by[0], absmax_k / by[1]) if static else (smooth_q.abs(), smooth_k.abs())
    got = []
    for x, size in zip((smooth_q, smooth_k), sizes, strict=True):
        if granularity == "per_token":
            scale = token_scale(x)
        else:
            scale = absmax_scale(size.amax((1, 2), keepdim=True) if granularity == "per_head" else size.max())
        got.append(quantize(x, scale).float() * scale)
    want = want.double()  # squares overflow float32 where the scores do not
    return relative(float((scores(*got) - want).square().sum()), float(want.square().sum()))
