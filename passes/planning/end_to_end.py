"""end_to_end: whether smoothing helps a model as a whole, by its outputs on a few calibration calls.

A site's own error does not say it. Roundings of weights are the same for every token, and those of several layers may add
up although each became smaller: seldom in wide layers, where many channels average, now and then in narrow ones. In the
backend of torch.compile each graph is judged by its own outputs.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from sqcompile.passes.ir.explain import first_line
from sqcompile.passes.ir.graph import arguments
from sqcompile.plan.plan import Plan
from sqcompile.process.interrupts import checkpoint

CALLS, ROWS = 8, 1024  # no call is added to as many calls, or rows of an output
LARGEST = 2**26  # bytes of all that is kept of a graph

# Smoothing is left out unless a loss of so much can be ruled out. The sample is small, and smoothing guards against larger
# outliers than it holds: so it needs no gain.
TOLERANCE_DB = 0.5

WHY = "smoothing would make the outputs worse, if not of this layer alone"

EXACT = 1e-12  # relative energy of an error that is none: float32's own
LEAST = 1e-3  # a row counts as at least so much of its output's mean energy: one of zeros has no relative error
MOST_DB = 20.0  # that a row says: where a threshold is crossed, or a value met by luck, it would say anything


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
    """The first calls of a traced graph, with what they gave in float. On the device of the calls.

    Attributes:
        calls: those that are kept.
        rows, bytes: how much that is.
    """

    calls: list[_Call] = field(default_factory=list)
    rows: int = 0
    bytes: int = 0

    def add(self, arguments: Sequence[Any], outputs: Any, real: Callable[[int, Tensor], Tensor | None]) -> None:
        """Keeps a call, unless there are enough.

        Args:
            arguments: one for each placeholder; they are copied.
            outputs: what the graph returned.
            real: which rows of an output at a position are real tokens, bool [R]; None for all.
        """
        size = sum(a.numel() * a.element_size() for a in arguments if isinstance(a, Tensor))
        compared = _compared(outputs)
        left = (LARGEST - self.bytes - size) // (4 * CALLS * max(1, len(compared)))  # numbers of one output
        if len(self.calls) >= CALLS or self.rows >= ROWS or left <= 0:
            return
        kept = {}
        for i, y in compared.items():
            rows, keep = _rows(y), real(i, y) if y.dim() > 1 else None
            which = torch.arange(len(rows), device=y.device)
            if keep is not None and len(keep) == len(rows):
                which = which[keep.to(y.device)]
            most = min(ROWS, left // rows.shape[-1])
            if most and len(which):
                which = which[:: math.ceil(len(which) / most)]
                kept[i] = which, rows[which].float()
        if kept:
            copies = tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in arguments)
            self.calls.append(_Call(copies, kept))
            self.rows += max(len(which) for which, _ in kept.values())
            self.bytes += size + sum(4 * rows.numel() for _, rows in kept.values())

    def noise(self, quantized: fx.GraphModule) -> list[Tensor]:
        """Energy of the error of each kept row of each call, relative to the row's: float64 [R], of all outputs."""
        found = []
        for call in self.calls:
            with contextlib.ExitStack() as stack:
                for kind in {which.device.type for which, _ in call.rows.values()}:
                    stack.enter_context(torch.autocast(kind, enabled=False))  # a user's: INT8 values need float32
                outputs = pytree.tree_leaves(_Run(quantized).run(*call.arguments, enable_io_processing=False))
            parts = []
            for i, (which, want) in call.rows.items():
                signal = want.double().square().sum(-1)
                error = (_rows(outputs[i])[which].double() - want.double()).square().sum(-1)
                parts.append((error / signal.clamp_min(LEAST * signal.mean()).clamp_min(1e-300)).cpu())
            found.append(torch.cat(parts))
        return found


def _compared(outputs: Any) -> dict[int, Tensor]:
    """By position: the outputs in floating point; of four dims, as caches [B, H, S, D], only where there are no others."""
    tensors = {
        i: y
        for i, y in enumerate(pytree.tree_leaves(outputs))
        if isinstance(y, Tensor)
        and y.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        and y.layout == torch.strided
        and y.numel()
        and bool(y.isfinite().all())
    }
    return {i: y for i, y in tensors.items() if y.dim() < 4} or tensors


def _rows(y: Tensor) -> Tensor:
    """An output as rows [R, C]: of tokens, if it has some."""
    return y.reshape(-1, y.shape[-1]) if y.dim() > 1 else y.reshape(1, -1)


def is_random(gm: fx.GraphModule) -> bool:
    """Whether two runs of a graph may differ for the random numbers in them. Dropout is none: training mode is refused."""
    seeded = [n for n in gm.graph.nodes if torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())]
    return any("dropout" not in str(n.target) and arguments(n).get("dropout_p") != 0 for n in seeded)


def smoothed_or_not(choose: Callable[..., Plan], sample: Sample, quantize: Callable[[Plan], fx.GraphModule]) -> Plan:
    """The plan that `choose` makes, or the one without any smoothing where the model's outputs are better for it.

    What cannot be compared stays smoothed, with a warning.

    Args:
        choose: takes why nothing is smoothed, None for the recipe's own choice.
        sample: of the graph's calls.
        quantize: gives the quantized stage of a plan. It is asked for one plan at a time, as each has its own weights.
    """
    plan: Plan = choose()
    if not sample.calls or not (plan.scales or any(a.smoothing != "none" for a in plan.attention)):
        return plan
    try:
        plain: Plan = choose(unsmoothed=WHY)
        with torch.no_grad():
            smoothed, unsmoothed = (_noise(sample, quantize(p)) for p in (plan, plain))
    except Exception as e:  # memory, say; neither plan is wrong for it
        warnings.warn(
            f"whether smoothing helps the outputs was not compared: {type(e).__name__}: {first_line(e)}", stacklevel=2
        )
        return plan
    return plain if at_worst(smoothed, unsmoothed) > TOLERANCE_DB else plan


def _noise(sample: Sample, quantized: fx.GraphModule) -> list[Tensor]:
    try:
        return sample.noise(quantized)
    finally:
        quantized.graph.owning_module = None  # a cycle, which would keep the weights until garbage is collected


def at_worst(noise: list[Tensor], other: list[Tensor]) -> float:
    """How much worse one noise (see `Sample.noise`) may be than another, in dB: the mean over calls and a standard error.

    Tokens of one call are not independent of each other, so calls are what is averaged. In a call each row of an output
    counts as much: one for each token of a hidden state beside one for each sequence of a pooled output. Rows that are exact
    either way say nothing. Noise that is not finite is the worst.
    """
    calls = []
    for a, b in zip(noise, other, strict=True):
        if not bool(b.isfinite().all()):
            continue
        if not bool(a.isfinite().all()):
            return math.inf
        told = (a > EXACT) | (b > EXACT)
        if bool(told.any()):
            decibels = 10 * ((a[told] + EXACT) / (b[told] + EXACT)).log10()
            calls.append(decibels.clamp(-MOST_DB, MOST_DB).mean())
    if not calls:
        return -math.inf
    means = torch.stack(calls)
    return float(means.mean() + (means.std() / math.sqrt(len(calls)) if len(calls) > 1 else 0.0))
