"""end_to_end: whether smoothing helps the model as a whole, by its outputs on a few calibration calls.

A site's own error does not say it. Roundings of weights are the same for every token, and those of several layers may add
up although each became smaller: seldom in wide layers, where many channels average, now and then in narrow ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from sqcompile.interrupts import checkpoint
from sqcompile.plan import Plan

CALLS, ROWS = 8, 1024  # that are kept at most
LARGEST = 2**26  # bytes of a call's arguments, and of what is kept of an output

# Smoothing is left out where it makes the outputs so much worse. The sample is small, and smoothing guards against larger
# outliers than it holds.
TOLERANCE_DB = 0.5

TINY = torch.finfo(torch.float64).tiny
EXACT = 1e-12  # relative energy of an error that is none: float32's own


class _Run(fx.Interpreter):
    """Runs a graph; Ctrl-C takes effect between two operations."""

    def run_node(self, n: fx.Node) -> Any:
        checkpoint()
        return super().run_node(n)


@dataclass(frozen=True)
class _Call:
    """Arguments of a call, and rows [R, C] of its outputs: by the output's position, which rows, and the rows in float."""

    arguments: tuple[Any, ...]
    rows: dict[int, tuple[Tensor, Tensor]]


@dataclass
class Sample:
    """The first calls of a traced graph, with what they gave in float. On the device of the calls."""

    calls: list[_Call] = field(default_factory=list)
    rows: int = 0

    def add(self, arguments: Sequence[Any], outputs: Any, real: Callable[[int, Tensor], Tensor | None]) -> None:
        """Keeps a call, unless there are enough.

        Args:
            arguments: one for each placeholder; they are copied.
            outputs: what the graph returned.
            real: which rows of an output at a position are real tokens, bool [R]; None for all.
        """
        size = sum(a.numel() * a.element_size() for a in arguments if isinstance(a, Tensor))
        if len(self.calls) >= CALLS or self.rows >= ROWS or size > LARGEST:
            return
        kept = {}
        for i, y in _compared(outputs).items():
            rows, keep = _rows(y), real(i, y)
            which = torch.arange(len(rows), device=y.device) if keep is None else keep.nonzero().flatten()
            most = max(1, min(ROWS, LARGEST // (4 * rows.shape[-1])))
            which = which[:: max(1, math.ceil(len(which) / most))]
            if len(which):
                kept[i] = which, rows[which].float()
        if kept:
            copies = tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in arguments)
            self.calls.append(_Call(copies, kept))
            self.rows += max(len(which) for which, _ in kept.values())

    def noise(self, quantized: fx.GraphModule) -> list[list[Tensor]]:
        """Of each call, for each output, the energy of the error of each kept row relative to the row's: float64 [R]."""
        found = []
        for call in self.calls:
            outputs = _leaves(_Run(quantized).run(*call.arguments, enable_io_processing=False))
            rows = [(want.double(), _rows(outputs[i])[which].double()) for i, (which, want) in call.rows.items()]
            energies = [(want.square().sum(-1), (got - want).square().sum(-1)) for want, got in rows]
            found.append([error / signal.clamp_min(TINY) for signal, error in energies])
        return found


def _leaves(outputs: Any) -> list[Any]:
    return pytree.tree_leaves(outputs)


def _compared(outputs: Any) -> dict[int, Tensor]:
    """By position: the outputs in floating point, caches [B, H, S, D] only where there is nothing else."""
    tensors = {
        i: y
        for i, y in enumerate(_leaves(outputs))
        if isinstance(y, Tensor) and y.is_floating_point() and y.numel() and bool(y.isfinite().all())
    }
    return {i: y for i, y in tensors.items() if y.dim() < 4} or tensors


def _rows(y: Tensor) -> Tensor:
    """An output as rows [R, C]: of tokens, if it has some."""
    return y.reshape(-1, y.shape[-1]) if y.dim() > 1 and y.shape[-1] > 1 else y.reshape(1, -1)


def smoothed_or_not(choose: Callable[..., Plan], sample: Sample, quantize: Callable[[Plan], fx.GraphModule]) -> Plan:
    """The plan that `choose` makes, or the one without any smoothing where the model's outputs are better for it.

    Args:
        choose: takes why nothing is smoothed, None for the recipe's own choice.
        sample: of the graph's calls.
        quantize: gives the quantized stage of a plan. It is asked for one plan at a time, as each has its own weights.
    """
    plan: Plan = choose()
    if not sample.calls or not (plan.scales or any(a.smoothing != "none" for a in plan.attention)):
        return plan
    plain: Plan = choose(unsmoothed="smoothing would make the outputs of the whole model worse")
    with torch.no_grad():
        noise = [sample.noise(quantize(p)) for p in (plan, plain)]
    return plain if at_worst(*noise) > TOLERANCE_DB else plan


def at_worst(noise: list[list[Tensor]], other: list[list[Tensor]]) -> float:
    """How much worse one noise (see `Sample.noise`) is than another, in dB, as far as so few calls can tell.

    The mean over calls and a standard error: tokens of one call are not independent of each other. In a call each row of
    an output counts as much: one for each token of a hidden state beside one for each sequence of a pooled output.
    """
    calls = [
        (10 * ((torch.cat(a) + EXACT) / (torch.cat(b) + EXACT)).log10()).mean()
        for a, b in zip(noise, other, strict=True)
    ]
    decibels = torch.stack(calls)
    return float(decibels.mean() + (decibels.std() / math.sqrt(len(calls)) if len(calls) > 1 else 0.0))
