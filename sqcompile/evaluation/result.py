"""result: what `evaluate` found, as data; ``str`` of it is a table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sqcompile.plan.notebook import folded, preformatted, table, titled
from sqcompile.plan.said import decibels

_SHOWN = 5  # layers in the table


@dataclass(frozen=True)
class LayerError:
    """How far a quantized linear's output is from the float model's, on the evaluation data.

    Attributes:
        name: the weight's qualified name, as in ``plan.layers``.
        label: the same as a person would write it.
        sqnr_db: energy of the float model's output over that of the difference, in dB. The difference has in it what
            the linears before have made. Infinite for none, None where it was not measured.
        rows: how many rows were compared.
    """

    name: str
    label: str
    sqnr_db: float | None
    rows: int


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate` measured. A field is None where the outputs have no such thing, or no float model was given.

    An ``_error`` is a standard error over windows, NaN of a single one. A window is a row of a batch, and counts by its
    number of tokens.

    Attributes:
        compared: what was compared, in words.
        windows: how many had something that counts.
        tokens: how many predictions (of outputs that are no logits: vectors) were counted.
        perplexity: exp of the mean cross entropy of next-token prediction; ``perplexity_error`` in the same unit.
        float_perplexity: the float model's; ``float_perplexity_error``.
        increase: in percent, how much more perplexity is than the float model's: 100 (exp(d) - 1), where d is the mean of
            the differences of the two models' losses. ``increase_error`` is from the differences, window by window:
            windows differ far more from each other than two models do on one of them.
        kl: mean KL divergence from the float model's distributions, in nats a prediction; ``kl_error``.
        top1: how often the likeliest token or class is the float model's, in percent; ``top1_error``.
        relative_error: of outputs that are no logits: ``|y - x| / |x|`` over all that counts; ``relative_error_error``.
        cosine: of such outputs: mean cosine between vectors and the float model's; ``cosine_error``.
        layers: of each quantized linear, in graph order; None where it was not measured.
        without_layers: why not, in words; "" if it was.
        tokens_per_second: wall time of calls of the model, the median over batches but the first of each size, padding
            included; None if there are no others, or without token ids.
        float_tokens_per_second: the float model's.
        losses: mean cross entropy of each window, nats a token, float64 [windows].
        float_losses: the float model's.
        counts: predictions of each window that were counted, float64 [windows].
        checksum: of the tokens that are read and predicted, the same however they are batched and padded.
    """

    compared: str
    windows: int
    tokens: int
    perplexity: float | None = None
    perplexity_error: float | None = None
    float_perplexity: float | None = None
    float_perplexity_error: float | None = None
    increase: float | None = None
    increase_error: float | None = None
    kl: float | None = None
    kl_error: float | None = None
    top1: float | None = None
    top1_error: float | None = None
    relative_error: float | None = None
    relative_error_error: float | None = None
    cosine: float | None = None
    cosine_error: float | None = None
    layers: tuple[LayerError, ...] | None = None
    without_layers: str = ""
    tokens_per_second: float | None = None
    float_tokens_per_second: float | None = None
    losses: Tensor | None = field(default=None, repr=False)
    float_losses: Tensor | None = field(default=None, repr=False)
    counts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64), repr=False)
    checksum: str = field(default="", repr=False)

    def __str__(self) -> str:
        of = "vectors" if self.relative_error is not None else "predictions"
        lines = [f"{self.compared}; {self.windows:,} windows, {self.tokens:,} {of}"]
        lines += _table(self._rows())
        if self.layers:
            lines += ["", *self._of_layers(self.layers)]
        elif self.layers is None and (self.kl is not None or self.cosine is not None):
            lines.append(f"SQNR per layer is not measured: {self.without_layers}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        said = [f"{row[0]} {row[1]}" for row in self._rows() if row[0] and not row[0].startswith("tokens/s")]
        return f"Evaluation({'; '.join([f'{self.compared}; {self.windows:,} windows', *said])})"

    def _repr_html_(self) -> str:
        found = [[*row, "", ""][:3] for row in self._rows()]
        headings = found.pop(0) if found and not found[0][0] else ["", "model", ""]
        parts = [table(headings, found, right=(1, 2))]
        if self.layers:
            parts.append(folded("SQNR of layers", preformatted("\n".join(self._of_layers(self.layers)))))
        return titled(str(self).partition("\n")[0], *parts)

    def _rows(self) -> Iterable[tuple[str, ...]]:
        beside = self.float_perplexity is not None or self.float_tokens_per_second is not None
        mine = _number(self.perplexity, self.perplexity_error, ".3f")
        other = _number(self.float_perplexity, self.float_perplexity_error, ".3f")
        both = self.tokens_per_second, self.float_tokens_per_second
        timed = bool(mine) or any(s is not None for s in both)
        speeds = ["not measured" if s is None else f"{s:,.0f}" for s in both]
        if timed:
            yield ("", "model", "float model") if beside else ("", "model")
        if mine:
            yield ("perplexity", mine, other) if beside else ("perplexity", mine)
        if timed:
            yield ("tokens/s, wall time", *speeds[: 1 + beside])
        if self.increase is not None:
            yield "perplexity increase, %", _number(self.increase, self.increase_error, "+.3f")
        if self.kl is not None:
            yield "KL divergence, nats", _number(self.kl, self.kl_error, ".2e")
        if self.top1 is not None:
            yield "top-1 agreement, %", _number(self.top1, self.top1_error, ".2f")
        if self.relative_error is not None:
            yield "relative error", _number(self.relative_error, self.relative_error_error, ".2e")
        if self.cosine is not None:
            yield "cosine", _number(self.cosine, self.cosine_error, ".6f")

    def _of_layers(self, layers: Sequence[LayerError]) -> list[str]:
        found = sorted((l for l in layers if l.sqnr_db is not None), key=lambda l: l.sqnr_db or 0.0)
        lines = [f"SQNR of {len(found)} of {len(layers)} quantized linears' outputs, the lowest first"]
        width = max((len(l.label) for l in found[:_SHOWN]), default=0)
        lines += [f"  {l.label:{width}}  {decibels(l.sqnr_db or 0.0):>8}" for l in found[:_SHOWN]]
        if len(found) > _SHOWN:
            median = statistics.median(l.sqnr_db for l in found if l.sqnr_db is not None)
            lines.append(f"  {'median of all':{width}}  {decibels(median):>8}")
        return lines


def _number(value: float | None, error: float | None, form: str) -> str:
    if value is None or error is None:
        return ""
    if math.isnan(value):
        return "not defined"
    return f"{value:{form}} ± {'?' if math.isnan(error) else format(error, form.replace('+', ''))}"


def _table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Rows with their columns aligned."""
    every = [*rows]
    widths = [max((len(r[i]) for r in every if i < len(r)), default=0) for i in range(3)]
    return ["  " + "  ".join(f"{c:{w}}" for c, w in zip(r, widths, strict=False)).rstrip() for r in every]
