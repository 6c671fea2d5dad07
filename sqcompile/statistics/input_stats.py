"""Raw statistics of one tensor of tokens: what calibration keeps of it, in memory of O(channels)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sqcompile.kernels.reference import ABSMAX_FLOOR

SAMPLE_ROWS = 128
SMALLEST, PER_OCTAVE = -150, 4  # the exponent of float32's least number, and bins
SIZES = (128 - SMALLEST) * PER_OCTAVE
SAME = 1e-5  # of the largest value: rows that differ by no more are equal


@dataclass
class InputStats:
    """Statistics of one linear's input, or of an attention's queries, keys or values, over all calibration tokens.

    Attributes:
        halves: float32 [2, K], max|X_j| per channel of either half of the tokens: what one half says about tokens that
            it does not hold can be tried on the other.
        rows: [R, K] in the input's dtype, a uniform sample of at most 128 tokens.
        half: int64 [R], the half of each sampled row.
        count: number of tokens seen; 0 where nothing but the largest values is known, see `of_absmax`.
        experts: int64 [R], the expert of each sampled row; zeros where there are no experts.
        tokens: int64 [E], tokens seen by each expert; [1] where there are no experts.
        sizes: int64 [B], how many tokens have their largest value in each quarter of an octave, from 2^-150 on.
    """

    halves: Tensor
    rows: Tensor
    half: Tensor
    experts: Tensor
    tokens: Tensor
    sizes: Tensor
    count: int = 0
    updates: int = 0
    keys: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float32), repr=False)

    @staticmethod
    def empty(like: Tensor, experts: int | None) -> InputStats:
        """No tokens yet of an input [T, K]."""
        k = like.shape[-1]
        counts = torch.zeros(experts or 1, dtype=torch.int64, device=like.device)
        return InputStats(
            torch.zeros(2, k, dtype=torch.float32, device=like.device),
            like.new_empty(0, k),
            counts[:0],
            counts[:0],
            counts,
            torch.zeros(SIZES, dtype=torch.int64, device=like.device),
        )

    @staticmethod
    def of_absmax(absmax: Tensor, like: Tensor, experts: int | None) -> InputStats:
        """Statistics of the largest values alone, float32 [K], as a file of activation scales has them.

        There are no tokens: no rows, and no counts. ``like``: an input [T, K], for its dtype and device.
        """
        stats = InputStats.empty(like, experts)
        stats.halves = absmax.to(stats.halves).expand(2, -1).contiguous()
        return stats

    @property
    def absmax_alone(self) -> bool:
        """Whether no token is known, so that nothing can be tried."""
        return self.count == 0

    @property
    def absmax(self) -> Tensor:
        """float32 [K], max|X_j| per channel over all tokens."""
        return self.halves.amax(0)

    def unvarying(self) -> str | None:
        """In words, that the input was zero, or one and the same, in all tokens of a calibration of more than one."""
        absmax, last = self.absmax, self.rows[:1].float()
        largest = float(absmax.max()) if absmax.numel() else 0.0
        if largest <= ABSMAX_FLOOR:
            return "zero by its largest values" if self.absmax_alone else f"zero in all {self.count} calibration tokens"
        close = SAME * largest  # products of equal rows may differ in their last bits
        same = bool(((self.rows.float() - last).abs() <= close).all() & ((absmax - last.abs()).abs() <= close).all())
        return f"the same in all {self.count} calibration tokens" if same and self.count > 1 else None

    def update(self, x: Tensor, experts: Tensor, generator: torch.Generator) -> bool:
        """Adds tokens x [T, K] of ``experts``, int64 [T]; or none of them, and gives False, if a value is not finite.

        Each token draws a random key, and the sample is the tokens with the largest. The tokens of one half come one
        after the other, as neighbours are alike; those of experts, which are sorted, take turns.
        """
        n = len(x)
        first, second = (x[: n // 2], x[n // 2 :]) if len(self.tokens) == 1 else (x[::2], x[1::2])
        row = torch.arange(n, device=x.device)
        half = row >= n // 2 if len(self.tokens) == 1 else row % 2 == 1
        flip = self.updates % 2  # what stands at the front of every batch is not one half's alone
        parts = (second, first) if flip else (first, second)
        halves = torch.stack(
            [
                torch.maximum(h, p.abs().amax(0).float()) if len(p) else h
                for h, p in zip(self.halves, parts, strict=True)
            ]
        )
        if not bool(halves.isfinite().all()):
            return False
        self.halves = halves
        half = half.long() ^ flip
        self.updates += 1
        self.sizes = self.sizes + _sizes(x)
        self.tokens = self.tokens + experts.bincount(minlength=len(self.tokens))
        self.count += n
        keys = torch.cat([self.keys, torch.rand(n, dtype=torch.float32, generator=generator)])
        self.keys, best = keys.topk(min(SAMPLE_ROWS, len(keys)))
        old = best[best < len(self.rows)].to(x.device)
        new = best[best >= len(self.rows)].to(x.device) - len(self.rows)
        self.keys = torch.cat([self.keys[best < len(self.rows)], self.keys[best >= len(self.rows)]])
        self.rows = torch.cat([self.rows[old], x[new]])
        self.half = torch.cat([self.half[old], half[new]])
        self.experts = torch.cat([self.experts[old], experts[new]])
        return True

    def alike(self, other: InputStats) -> bool:
        """Whether both are of as many channels and experts."""
        return self.halves.shape == other.halves.shape and self.tokens.shape == other.tokens.shape

    def merged(self, other: InputStats) -> InputStats:
        """Statistics of both's tokens."""
        keys, best = torch.cat([self.keys, other.keys]).topk(min(SAMPLE_ROWS, len(self.keys) + len(other.keys)))
        best = best.to(self.rows.device)
        rows, half, experts = (
            torch.cat([mine, others])[best]
            for mine, others in ((self.rows, other.rows), (self.half, other.half), (self.experts, other.experts))
        )
        halves, tokens = torch.maximum(self.halves, other.halves), self.tokens + other.tokens
        count, updates = self.count + other.count, self.updates + other.updates
        sizes = self.sizes + other.sizes
        return InputStats(halves, rows, half, experts, tokens, sizes, count, updates, keys)


def _sizes(x: Tensor) -> Tensor:
    """`InputStats.sizes` of tokens [T, K]."""
    exponent = x.abs().amax(-1).float().log2()
    return ((exponent - SMALLEST) * PER_OCTAVE).clamp(0, SIZES - 1).long().bincount(minlength=SIZES)
