"""Sample: the first calibration calls of a graph and some rows of what they gave, in bounded memory."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.passes.ir.graph import arguments
from sqcompile.pytorch.core import pytree
from sqcompile.statistics.divergence import divergence
from sqcompile.statistics.together import run_together

CALLS, ROWS = 8, 1024  # no call is added to as many calls, or rows of an output
LOOKS = 32  # nor after as many that were looked at: some cannot be kept
LARGEST = 2**26  # bytes of all that is kept of a graph
LEAST = 1e-3  # a row counts as at least so much of its output's mean energy: one of zeros has no relative error


@dataclass(frozen=True)
class SampledCall:
    """Arguments of a call, and rows [R, C] of its outputs: by the output's position, which rows, and the rows in float.

    ``batch`` is the index that `InputStats.update` had for it.
    """

    arguments: tuple[Any, ...]
    rows: dict[int, tuple[Tensor, Tensor]]
    batch: int


@dataclass
class Sample:
    """The first calls of a traced graph, with what they gave in float. On the device of the calls.

    Attributes:
        calls: those that are kept.
        rows, bytes: how much that is.
        looks: how many calls it was shown.
    """

    calls: list[SampledCall] = field(default_factory=list)
    rows: int = 0
    bytes: int = 0
    looks: int = 0

    @property
    def full(self) -> bool:
        """Whether no other call is added, whatever it is."""
        return len(self.calls) >= CALLS or self.rows >= ROWS or self.looks >= LOOKS

    def add(
        self,
        arguments: Sequence[Any],
        outputs: Any,
        real: Callable[[int, Tensor], Tensor | None],
        batch: int,
        every: Callable[[Sequence[bool]], Sequence[bool]] = lambda holds: holds,
    ) -> None:
        """Keeps a call, unless there are enough.

        Args:
            arguments: one for each placeholder; they are copied.
            outputs: what the graph returned.
            real: which rows of an output at a position are real tokens, bool [R]; None for all.
            batch: index of the call.
            every: of conditions, which hold in all processes that run the graph.
        """
        if self.full:
            return
        self.looks += 1
        size = sum(a.numel() * a.element_size() for a in arguments if isinstance(a, Tensor))
        compared = _compared(outputs, every)
        left = (LARGEST - self.bytes - size) // (4 * CALLS * max(1, len(compared)))  # numbers of one output
        if left <= 0:
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
            self.calls.append(SampledCall(copies, kept, batch))
            self.rows += max(len(which) for which, _ in kept.values())
            self.bytes += size + sum(4 * rows.numel() for _, rows in kept.values())

    def noise(self, quantized: fx.GraphModule, calls: slice = slice(None)) -> list[Tensor]:
        """Energy of the error of each kept row of some calls, relative to the row's: float64 [R], of all outputs."""
        found = []
        for pairs in self._again(quantized, calls):
            parts = []
            for want, got in pairs.values():
                signal = want.double().square().sum(-1)
                error = (got.double() - want.double()).square().sum(-1)
                parts.append((error / signal.clamp_min(LEAST * signal.mean()).clamp_min(1e-300)).cpu())
            found.append(torch.cat(parts))
        return found

    def divergence(self, quantized: fx.GraphModule, logits: Collection[int]) -> list[Tensor]:
        """KL divergence of each kept row of each call from the float one, in nats: float32 [R], of the outputs at positions."""
        found = []
        for pairs in self._again(quantized):
            rows = [
                divergence(w.log_softmax(-1), g.float().log_softmax(-1)) for i, (w, g) in pairs.items() if i in logits
            ]
            found += [torch.cat([r.cpu() for r in rows])] if rows else []
        return found

    def _again(self, quantized: fx.GraphModule, calls: slice = slice(None)) -> list[dict[int, tuple[Tensor, Tensor]]]:
        """For each of some calls, by the position of an output, its kept rows [R, C] in float and those of another graph."""
        again = self.calls[calls]
        outputs = pytree.tree_leaves(next(iter(quantized.graph.find_nodes(op="output"))).args)
        found: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in again]

        def see(call: int, n: fx.Node, y: Any) -> None:
            for i, (which, want) in again[call].rows.items():
                if outputs[i] is n:
                    found[call][i] = want, _rows(y)[which]

        with contextlib.ExitStack() as stack:
            for kind in {which.device.type for call in again for which, _ in call.rows.values()}:
                stack.enter_context(torch.autocast(kind, enabled=False))  # a user's: INT8 values need float32
            run_together(quantized, [call.arguments for call in again], see)
        return [{i: pairs[i] for i in call.rows if i in pairs} for call, pairs in zip(again, found, strict=True)]


def _compared(outputs: Any, every: Callable[[Sequence[bool]], Sequence[bool]]) -> dict[int, Tensor]:
    """By position: the outputs in floating point; of four dims, as caches [B, H, S, D], only where there are no others."""
    tensors = {
        i: y
        for i, y in enumerate(pytree.tree_leaves(outputs))
        if isinstance(y, Tensor)
        and y.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        and y.layout == torch.strided
        and y.numel()
    }
    finite = every([bool(y.isfinite().all()) for y in tensors.values()])
    tensors = {i: y for (i, y), so in zip(tensors.items(), finite, strict=True) if so}
    return {i: y for i, y in tensors.items() if y.dim() < 4} or tensors


def _rows(y: Tensor) -> Tensor:
    """An output as rows [R, C]: of tokens, if it has some."""
    return y.reshape(-1, y.shape[-1]) if y.dim() > 1 else y.reshape(1, -1)


def is_random(gm: fx.GraphModule) -> bool:
    """Whether two runs of a graph may differ for the random numbers in them. Dropout is none: training mode is refused."""
    seeded = [n for n in gm.graph.nodes if torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())]
    return any("dropout" not in str(n.target) and arguments(n).get("dropout_p") != 0 for n in seeded)
