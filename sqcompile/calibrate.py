"""calibrate: run the captured graph on real input and keep raw statistics of every linear's input.

Raw means: nothing that depends on alpha or granularity, so that another recipe needs no second run. Memory is
O(channels): absmax per channel and a bounded sample of rows, never the activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from sqcompile.errors import CalibrationError, CaptureError
from sqcompile.inputs import Call, calls, flatten_like, real_tokens, run_callable, token_mask
from sqcompile.passes.graph import find_linears

SAMPLE_ROWS = 128


@dataclass
class InputStats:
    """Statistics of one linear's input over all calibration tokens.

    Attributes:
        absmax: float32 [K], max|X_j| per channel.
        rows: [R, K] in the input's dtype, a uniform sample of at most 128 tokens.
        count: number of tokens seen.
    """

    absmax: Tensor
    rows: Tensor
    count: int = 0
    keys: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)

    def update(self, x: Tensor, generator: torch.Generator) -> None:
        """Adds tokens x [T, K]. Each token draws a random key, and the sample is the tokens with the largest."""
        self.absmax = torch.maximum(self.absmax, x.abs().amax(dim=0).float())
        self.count += x.shape[0]
        keys = torch.cat([self.keys, torch.rand(x.shape[0], generator=generator)])
        self.keys, best = keys.topk(min(SAMPLE_ROWS, len(keys)))
        old = best[best < len(self.rows)].to(x.device)
        new = best[best >= len(self.rows)].to(x.device) - len(self.rows)
        self.keys = torch.cat([self.keys[best < len(self.rows)], self.keys[best >= len(self.rows)]])
        self.rows = torch.cat([self.rows[old], x[new]])


@dataclass(frozen=True)
class Calibration:
    """Statistics by linear name (see `Linear.name`); linears that read one tensor share one InputStats."""

    inputs: dict[str, InputStats]
    batches: int


def calibrate(
    gm: fx.GraphModule, model: nn.Module, loader: Iterable[Any] | Callable[..., Any], progress: bool = True
) -> Calibration:
    """Runs a traced graph over the calibration data.

    Args:
        gm: the traced graph; it is not changed.
        model: the module it was traced from, for its signature (and to be run, where ``loader`` is a callable).
        loader: batches, or a callable that runs the model itself. An ``attention_mask`` [batch, tokens] among the
            inputs excludes padding from the statistics.
        progress: whether to show a progress bar.

    Raises:
        CalibrationError: for a batch the model refuses, or a non-finite activation (names the tensor and the batch).
    """
    observer = _Observer(gm)
    try:
        total = len(loader) if isinstance(loader, Sized) else None
    except TypeError:  # a DataLoader over an iterable dataset
        total = None
    bar = tqdm(desc="calibrate", unit="batch", disable=not progress, total=total)

    def observe(call: Call) -> None:
        observer.batch(call)
        bar.update()

    with bar:
        if isinstance(loader, Iterable):
            for call in calls(model, loader):
                observe(call)
        else:
            run_callable(model, loader, observe)
    if not observer.batches:
        raise CalibrationError("the calibration callable made no call: it is run twice, first to see what it passes")
    found = {name: observer.stats[x] for name, x in observer.inputs.items() if x in observer.stats}
    return Calibration(found, observer.batches)


class _Observer(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.captured = gm.meta["captured"]
        linears = find_linears(gm)
        self.inputs = {l.name: l.x for l in linears}
        self.reads = {l.x: l.name for l in reversed(linears)}  # the first reader names the tensor in messages
        self.stats: dict[str, InputStats] = {}
        self.generator = torch.Generator().manual_seed(0)
        self.batches = 0
        self.mask: Tensor | None = None

    def batch(self, call: Call) -> None:
        try:
            leaves = flatten_like(call, self.captured)
        except CaptureError as e:
            raise CalibrationError(f"calibration batch {self.batches}: {e}") from e
        self.mask = token_mask(call)
        try:
            with torch.no_grad():
                self.run(*leaves, enable_io_processing=False)
        except CalibrationError:
            raise
        except Exception as e:
            raise CalibrationError(
                f"the model refuses calibration batch {self.batches}: {type(e).__name__}: {e}"
            ) from e
        self.batches += 1

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if n.name in self.reads:
            rows = real_tokens(out, self.mask)
            if len(rows):
                self._update(n.name, rows)
        return out

    def _update(self, name: str, rows: Tensor) -> None:
        if name not in self.stats:
            k = rows.shape[-1]
            self.stats[name] = InputStats(torch.zeros(k, device=rows.device), rows.new_empty(0, k))
        stats = self.stats[name]
        stats.update(rows, self.generator)
        if not bool(stats.absmax.isfinite().all()):
            raise CalibrationError(
                f"the input of {self.reads[name]} (node {name}) is not finite in calibration batch {self.batches}: "
                "check the batch and the model's dtype (float16 overflows at 65504; try bfloat16)"
            )
