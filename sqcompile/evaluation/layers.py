"""layers: SQNR of each quantized linear's output, on the evaluation data, by the stages of a compiled model.

The "traced" stage, in float, and the "quantized" stage, which the lowered one agrees with to rounding, are run in step,
so that no more than the values in use are kept. Where a linear's output channels absorb 1/s, the "folded" stage, which is
in float as well, runs beside them: what it has of a channel, relative to "traced", is 1/s, and the quantized channel is
divided by it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.capture.captured import contiguous, flatten_like
from sqcompile.capture.inputs import Call
from sqcompile.compiled.emit import CompiledModel
from sqcompile.compiled.walk import values, without_autocast
from sqcompile.errors import StageError
from sqcompile.evaluation.result import LayerError
from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import find_linears
from sqcompile.passes.ir.origin import PLANNED
from sqcompile.plan.names import linear_labels
from sqcompile.process.progress import part
from sqcompile.statistics.padding import Padding

ROWS = 1024  # of an output that are compared, over all calls


def layer_errors(compiled: CompiledModel, calls: Sequence[Call]) -> tuple[LayerError, ...]:
    """The error of each quantized linear, in graph order.

    Args:
        compiled: the compiled model; it is not run itself.
        calls: calls of the model. Once `ROWS` rows have been seen no more of them is run.

    Raises:
        SQCompileError: if its stages cannot be had, or do not serve the calls.
    """
    graphs = [compiled.stages[name] for name in ("traced", "folded", "quantized")]
    linears = [l for l in find_linears(graphs[0]) if l.name in {p.name for p in compiled.plan.layers if p.quantized}]
    named = [{l.node: l.name for l in find_linears(gm)} for gm in graphs[:2]]
    named.append({n.name: str(n.meta[PLANNED]) for n in graphs[2].graph.nodes if PLANNED in n.meta})
    padding = Padding(graphs[0], {l.node: -1 for l in linears})
    labels = linear_labels(l.name for l in find_linears(graphs[0]))
    sums = {l.name: [0.0, 0.0, 0] for l in linears}  # signal, noise, rows
    with part(total=len(calls) * len(linears)) as done, without_autocast(b for gm in graphs for b in gm.buffers()):
        for call in calls:
            if all(seen[2] >= ROWS for seen in sums.values()):
                break
            arguments = contiguous(flatten_like(call, about(graphs[0]).calls))
            padding.start(arguments)
            runs = [_Outputs(gm, arguments, names) for gm, names in zip(graphs, named, strict=True)]
            for l in linears:
                of = [run.take(l.name) for run in runs]
                done()
                # rows of experts lie in the order of the experts, and the router of the compiled model may choose others
                if l.experts is None and len({x.shape for x in of}) == 1:
                    _add(sums[l.name], of, padding.real(l.node, of[0]))
    return tuple(LayerError(name, labels[name], _decibels(s), int(s[2])) for name, s in sums.items())


class _Outputs:
    """Outputs of a stage's linears. It runs as far as it is asked for."""

    def __init__(self, gm: fx.GraphModule, arguments: Sequence[Any], names: dict[str, str]) -> None:
        self._run, self._names = values(gm, arguments), names
        self._kept: dict[str, Tensor] = {}

    def take(self, name: str) -> Tensor:
        while name not in self._kept:
            step = next(self._run, None)
            if step is None:
                raise StageError(f"the linear {name} is not in all stages: its outputs cannot be compared")
            node, value = step
            if node.name in self._names:
                self._kept[self._names[node.name]] = value
        return self._kept.pop(name)


def _add(sums: list[float], of: Sequence[Tensor], real: Tensor | None) -> None:
    """Adds the rows of a linear's output in float, folded and quantized, that are real, at most as many as are wanted."""
    which = torch.arange(of[0][..., 0].numel(), device=of[0].device)
    which = which if real is None else which[real.to(which.device)]
    left = ROWS - int(sums[2])
    if left <= 0 or not len(which):
        return
    which = which[:: math.ceil(len(which) / left)]
    traced, folded, quantized = (x.reshape(-1, x.shape[-1])[which].double() for x in of)
    energy = traced.square().sum(0)
    scale = torch.where(energy > 0, (folded * traced).sum(0) / energy, 1.0)
    noise = quantized / torch.where(scale == 0, 1.0, scale) - traced
    sums[0] += float(energy.sum())
    sums[1] += float(noise.square().sum())
    sums[2] += len(which)


def _decibels(sums: Sequence[float]) -> float | None:
    signal, noise, rows = sums
    if not rows or not math.isfinite(noise):
        return None
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
