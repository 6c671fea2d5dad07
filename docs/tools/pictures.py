"""Draws the plots of docs/concepts.md into docs/pictures, of real models: python docs/tools/pictures.py"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt
from pages import ROOT
from torch import Tensor, nn

from sqcompile.demo import SENTENCES, load_minilm
from sqcompile.lm import calibration_texts, load_lm, token_windows

matplotlib.use("agg")
# the same file for the same values: no date, no random names; text as text, in the reader's font
plt.rcParams.update({"svg.hashsalt": "sqcompile", "svg.fonttype": "none", "font.size": 9, "axes.titlesize": 10})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "figure.facecolor": "white"})
BLUE, PURPLE, GREY = "#3b6fb6", "#8a4fb0", "#9a9a9a"


def inputs_of(linear: nn.Linear, model: nn.Module, call: Mapping[str, Tensor]) -> Tensor:
    """What a linear reads in a call of the model, without padding: float32 [rows, K]."""
    seen = []
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(**call)
    handle.remove()
    return seen[0][call.get("attention_mask", torch.ones(seen[0].shape[:-1])).bool()]


def smoothing(x: Tensor, w: Tensor, alpha: float = 0.5) -> Tensor:
    """s [K] = max|X_j|^α / max|W_:j|^(1-α), as in the paper."""
    return x.abs().amax(0).pow(alpha) / w.abs().amax(0).pow(1 - alpha)


def quantized(x: Tensor, scale: Tensor) -> Tensor:
    return torch.round(x / scale).clamp(-127, 127) * scale


def smooth_picture(x: Tensor, w: Tensor) -> None:
    s = smoothing(x, w)
    figure, axes = plt.subplots(2, 2, figsize=(8, 4.2), sharex=True)
    rows = (
        (axes[0][0], x.abs().amax(0), "activations X: a few channels are large", BLUE),
        (axes[0][1], w.abs().amax(0), "weights W: flat", PURPLE),
        (axes[1][0], (x / s).abs().amax(0), "X · diag(1/s): flatter", BLUE),
        (axes[1][1], (w * s).abs().amax(0), "diag(s) · Wᵀ: takes them over", PURPLE),
    )
    for axis, values, title, color in rows:
        axis.fill_between(range(len(values)), values / values.median(), step="mid", color=color, linewidth=0)
        axis.margins(x=0)
        axis.set_title(title, loc="left")
        axis.set_ylabel("max |.| / median")
    for axis in axes[1]:
        axis.set_xlabel("input channel")
    for left, right in axes:
        top = max(left.get_ylim()[1], right.get_ylim()[1])
        left.set_ylim(0, top)
        right.set_ylim(0, top)
    _save(figure, "smoothing.svg")


def rotation_picture(x: Tensor) -> None:
    h = torch.ones(1, 1)
    for _ in range(5):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)]) / 2**0.5
    blocks = x.unflatten(-1, (-1, 32))
    row = int((blocks.abs().amax(-1) / blocks.abs().mean(-1)).amax(-1).argmax())
    block = int((blocks[row].abs().amax(-1) / blocks[row].abs().mean(-1)).argmax())
    before = blocks[row, block]
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.4), sharey=True)
    for axis, values, title in zip(
        axes, (before, before @ h), ("x: one channel is large", "x H: all share it"), strict=True
    ):
        axis.bar(range(32), values, width=0.8, color=BLUE)
        axis.axhline(0, color=GREY, linewidth=0.8)
        largest = values.abs().max()
        axis.set_title(f"{title}; a step is {largest / 127:.4f}", loc="left")
        axis.set_xlabel("channel of a block of 32")
    _save(figure, "rotation.svg")


def granularity_picture(x: Tensor, w: Tensor) -> None:
    want = x @ w.T
    s = smoothing(x, w)
    bars = {"no smoothing": [], "α = 0.5": []}
    kinds = ("per tensor,\nper tensor", "per tensor,\nper channel", "per token,\nper tensor", "per token,\nper channel")
    for name, (a, b) in {"no smoothing": (x, w), "α = 0.5": (x / s, w * s)}.items():
        for kind in kinds:
            of_x, of_w = kind.split(",\n")
            dx = (a.abs().amax(-1, keepdim=True) if of_x == "per token" else a.abs().max()) / 127
            dw = (b.abs().amax(-1, keepdim=True) if of_w == "per channel" else b.abs().max()) / 127
            error = quantized(a, dx) @ quantized(b, dw).T - want
            bars[name].append(float(10 * torch.log10(want.square().mean() / error.square().mean())))
    figure, axis = plt.subplots(figsize=(8, 2.8))
    at = np.arange(len(kinds))
    for offset, (name, values), color in zip((-0.2, 0.2), bars.items(), (GREY, BLUE), strict=True):
        found = axis.bar(at + offset, values, width=0.38, color=color, label=name)
        axis.bar_label(found, fmt="%.1f", fontsize=8)
    axis.set_xticks(at, [k.replace(",\n", " X,\n") + " W" for k in kinds])
    axis.set_ylabel("SQNR of the output, dB")
    axis.set_ylim(0, 1.25 * max(map(max, bars.values())))
    axis.legend(frameon=False, loc="upper left", ncols=2)
    _save(figure, "granularity.svg")


def _save(figure: plt.Figure, name: str) -> None:
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "pictures" / name, metadata={"Date": None})
    if "--png" in sys.argv:
        figure.savefig(f"/tmp/{name}.png", dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    minilm, of_minilm = load_minilm()
    linear = minilm.encoder.layer[3].intermediate.dense
    inputs = inputs_of(linear, minilm, dict(of_minilm(SENTENCES, padding=True, return_tensors="pt")))
    smooth_picture(inputs, linear.weight.detach())
    granularity_picture(inputs, linear.weight.detach())
    lm, tokenizer = load_lm()
    call = {"input_ids": token_windows(calibration_texts(), tokenizer, 256, 8)}
    rotation_picture(inputs_of(lm.model.layers[3].mlp.down_proj, lm, call))
