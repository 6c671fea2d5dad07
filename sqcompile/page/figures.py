"""figures: the plots of one site by matplotlib, for scripts and notebooks."""

from __future__ import annotations

from typing import Any

import torch

from sqcompile.errors import ReportError
from sqcompile.page.data import label_of
from sqcompile.page.extras import needed
from sqcompile.page.facts import inputs_of, is_dynamic
from sqcompile.plan.entries import LayerPlan
from sqcompile.plan.evidence import BINS, CODES, OCTAVES, Curve, InputEvidence
from sqcompile.plan.plan import Plan

_BEFORE, _AFTER = "#b45309", "#1d4ed8"
_MARKS = "os^PD"


def plot(plan: Plan, site: str | int) -> Any:
    """A matplotlib Figure: channels, tokens before and after, what was tried, codes.

    Raises:
        ReportError: without matplotlib, or for a site that the plan has no evidence of.
    """
    found = find(plan, site)
    figures = needed("matplotlib.figure")[0]
    needed("mpl_toolkits.mplot3d")  # what gives a figure 3-D axes
    first = next(l for l in plan.layers if l.name == found.linears[0])
    figure = figures.Figure(figsize=(11, 10), layout="constrained")
    edited = f"\n{', '.join(found.undivided)}: weights as before the plan was edited" if found.undivided else ""
    figure.suptitle(label_of(plan, found) + edited)
    for k, (title, row) in enumerate((("activations", 0), ("weights", 2))):
        _channels(figure.add_subplot(3, 2, k + 1), found, title, row, first.quantized)
    for k, when in enumerate(("before", "after")[: 1 + first.quantized]):
        _tokens(figure, 3 + k, found, when, k)
    curve = plan.evidence.curves.get(found.site) if plan.evidence and found.site else None
    _curve(figure.add_subplot(3, 2, 5), curve, first, is_dynamic(plan, first))
    _codes(figure.add_subplot(3, 2, 6), found)
    return figure


def find(plan: Plan, site: str | int) -> InputEvidence:
    """The evidence that a user names.

    Raises:
        ReportError: if there is none, or several.
    """
    inputs = inputs_of(plan)
    if not inputs:
        raise ReportError("the plan has no evidence to plot: calibrate again with this version")
    if type(site) is int:
        if not 0 <= site < len(inputs):
            raise ReportError(f"there is no site {site}: the plan has {len(inputs)}, from 0 on")
        return inputs[site]
    if not isinstance(site, str) or not site:
        raise ReportError(f"site={site!r}: pass the name of a linear or of a site, or a number")
    every = [
        (i, [i.site, label_of(plan, i), *i.linears, *(n.removesuffix(".weight") for n in i.linears)]) for i in inputs
    ]
    exact = [i for i, names in every if site in names]
    some = exact or [i for i, names in every if any(f".{site}." in f".{n}." for n in names)]
    if len(some) != 1:
        named = ", ".join(i.linears[0] for i in (some or inputs)[:3])
        how = "names no site with evidence; there are" if not some else f"names {len(some)} sites:"
        raise ReportError(f"site={site!r} {how} {named}, ...: pass the name of one linear")
    return some[0]


def _channels(axes: Any, i: InputEvidence, title: str, row: int, quantized: bool) -> None:
    at = torch.arange(i.absmax.shape[1]) * i.width
    for k, (when, color) in enumerate((("before", _BEFORE), ("after", _AFTER))[: 1 + quantized]):
        values = i.absmax[row + k].float()
        axes.step(at, torch.where(values > 0, values, torch.nan), where="post", lw=0.9, color=color, label=when)
    dead = i.dead_in.nonzero().flatten() * i.width
    if row == 0 and len(dead):
        low = axes.get_ylim()[0]
        axes.plot(dead, [max(low, 1e-6)] * len(dead), "x", color="#b91c1c", label=f"{i.dead} dead", clip_on=False)
    axes.set(yscale="log", xlabel="channel", ylabel="largest absolute value", title=f"{title}, per channel")
    axes.legend(loc="upper right", fontsize="small")


def _tokens(figure: Any, place: int, i: InputEvidence, when: str, half: int) -> None:
    if not i.heat.shape[1]:
        axes = figure.add_subplot(3, 2, place)
        _empty(axes, "no tokens in the calibration")
        return
    axes = figure.add_subplot(3, 2, place, projection="3d")
    code = i.heat[half].float()
    value = torch.where(code > 0, torch.exp2((code - 255) * OCTAVES / 254), 0.0) * i.tops[half]
    channel, token = torch.meshgrid(torch.arange(code.shape[1]) * i.cells, torch.arange(code.shape[0]), indexing="xy")
    surface = {"cmap": "viridis", "rcount": code.shape[0], "ccount": code.shape[1], "linewidth": 0}
    axes.plot_surface(channel.numpy(), token.numpy(), value.numpy(), **surface)
    axes.set(xlabel="channel", ylabel="sampled token", zlabel="|x|", title=f"tokens and channels, {when}")


def _curve(axes: Any, curve: Curve | None, first: LayerPlan, dynamic: bool) -> None:
    tried = [t for t in curve.tried if t.dynamic == dynamic] if curve is not None else []
    if curve is None or not tried:
        _empty(axes, "nothing was tried")
        return
    for mark, block in zip(_MARKS, (None, 16, 32, 64, 128), strict=True):
        mine = [t for t in tried if t.rotation == block]
        if mine:
            xs = [-0.1 if t.alpha is None else t.alpha for t in mine]
            axes.plot(xs, [t.cost for t in mine], f"{mark}-", ms=4, lw=1, label=f"rotation {block or 'none'}")
    chosen = [t for t in tried if (t.alpha, t.rotation) == (first.alpha, first.rotation)]
    for t in chosen[:1]:
        axes.plot([-0.1 if t.alpha is None else t.alpha], [t.cost], "o", ms=13, mfc="none", mec="black", label="chosen")
    unit = "cost of the outputs" if curve.by_loss else "relative error"
    axes.set(yscale="log", xlabel="migration strength α (-0.1: no smoothing)", ylabel=unit, title="what was tried")
    axes.legend(fontsize="small")


def _codes(axes: Any, i: InputEvidence) -> None:
    at = (torch.arange(BINS) - BINS // 2) * CODES
    for row, (what, color) in enumerate((("activations", _AFTER), ("weights", "#0f766e"))):
        if total := int(i.codes[row].sum()):
            axes.step(at, 100 * i.codes[row] / total, where="mid", color=color, label=what)
    if int(i.codes.sum()) == 0:
        _empty(axes, "these linears run in float")
        return
    axes.set(xlabel="code", ylabel="share of values, %", title="codes")
    axes.legend(fontsize="small")


def _empty(axes: Any, why: str) -> None:
    axes.text(0.5, 0.5, why, ha="center", va="center", transform=axes.transAxes)
    axes.set_axis_off()
