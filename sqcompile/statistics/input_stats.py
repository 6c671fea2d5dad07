"""Raw statistics of one tensor of tokens: what calibration keeps of it, in memory of O(channels)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sqcompile.kernels.reference import ABSMAX_FLOOR

SAMPLE_ROWS = 128
SMALLEST, PER_OCTAVE = -150, 4  # the exponent of float32's least number, and bins
SIZES = (128 - SMALLEST) * PER_OCTAVE
_STEP = 0x9E3779B97F4A7C15  # odd: rows and batches that differ are different counters
SAME = 1e-5  # of the largest value: rows that differ by no more are equal


@dataclass
class InputStats:
    """Statistics of one linear's input, or of an attention's queries, keys or values, over all calibration tokens.

    Attributes:
        lowest, highest: float32 [2, K], the least and the largest X_j of either half of the tokens: what one half says about
            tokens that it does not hold can be tried on the other. Of no tokens inf and -inf.
        rows: [R, K] in the input's dtype, a uniform sample of at most 128 tokens.
        half: int64 [R], the half of each sampled row.
        count: number of tokens seen; 0 where nothing but the largest values is known, see `of_absmax`.
        experts: int64 [R], the expert of each sampled row; zeros where there are no experts.
        tokens: int64 [E], tokens seen by each expert; [1] where there are no experts.
        sizes: int64 [B], how many tokens have their largest value in each quarter of an octave, from 2^-150 on.
        keys: int64 [R], the random number of each sampled row, by which it was chosen; the largest first.
        offset: float32 [K], what was taken off every token (`shifted`); the statistics are of what is left.
    """

    lowest: Tensor
    highest: Tensor
    rows: Tensor
    half: Tensor
    experts: Tensor
    tokens: Tensor
    sizes: Tensor
    count: int
    keys: Tensor
    offset: Tensor

    @staticmethod
    def empty(like: Tensor, experts: int | None) -> InputStats:
        """No tokens yet of an input [T, K]."""
        k = like.shape[-1]
        counts = torch.zeros(experts or 1, dtype=torch.int64, device=like.device)
        none = torch.full((2, k), torch.inf, dtype=torch.float32, device=like.device)
        return InputStats(
            none,
            -none,
            like.new_empty(0, k),
            counts[:0],
            counts[:0],
            counts,
            torch.zeros(SIZES, dtype=torch.int64, device=like.device),
            0,
            counts[:0],
            torch.zeros(k, dtype=torch.float32, device=like.device),
        )

    @staticmethod
    def of_absmax(absmax: Tensor, like: Tensor, experts: int | None) -> InputStats:
        """Statistics of the largest values alone, float32 [K], as a file of activation scales has them.

        There are no tokens: no rows, and no counts. ``like``: an input [T, K], for its dtype and device.
        """
        stats = InputStats.empty(like, experts)
        stats.highest = absmax.to(stats.highest).expand(2, -1).contiguous()
        stats.lowest = -stats.highest
        return stats

    @property
    def absmax_alone(self) -> bool:
        """Whether no token is known, so that nothing can be tried."""
        return self.count == 0

    @property
    def halves(self) -> Tensor:
        """float32 [2, K], max|X_j| per channel of either half of the tokens; 0 of no tokens."""
        return torch.maximum(-self.lowest, self.highest).clamp_min(0)

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

    def update(self, x: Tensor, experts: Tensor, seed: int, batch: int) -> bool:
        """Adds tokens x [T, K] of ``experts``, int64 [T]; or none of them, and gives False, if a value is not finite.

        Each token has a random key, and the sample is the tokens with the largest, in the order of their keys: whatever
        is seen first, and in however many parts that are `merged`, the sample is the same. The tokens of one half come
        one after the other, as neighbours are alike; those of experts, which are sorted, take turns.

        Args:
            x: tokens of one batch, all that this input has there.
            experts: that each is dealt to; zeros where there are none.
            seed: `seed_of` the input.
            batch: index of the batch.
        """
        n, turns = len(x), len(self.tokens) > 1
        parts = (x[::2], x[1::2]) if turns else (x[: n // 2], x[n // 2 :])
        flip = batch % 2  # what stands at the front of every batch is not one half's alone
        lowest, highest = torch.full_like(self.lowest, torch.inf), torch.full_like(self.highest, -torch.inf)
        for h, p in enumerate(parts[::-1] if flip else parts):
            if len(p):
                ends = torch.stack([p.amin(0), p.amax(0)]).float()  # aminmax reads columns one by one
                if not bool(ends.isfinite().all()):
                    return False
                lowest[h], highest[h] = ends
        keys, kept = _keys(n, seed, batch, x.device).topk(min(SAMPLE_ROWS, n))
        half = (kept % 2 if turns else (kept >= n // 2).long()) ^ flip
        tokens = experts.bincount(minlength=len(self.tokens))
        new = InputStats(lowest, highest, x[kept], half, experts[kept], tokens, _sizes(x), n, keys, self.offset)
        vars(self).update(vars(self.merged(new)))
        return True

    def alike(self, other: InputStats) -> bool:
        """Whether both are of as many channels and experts."""
        return self.lowest.shape == other.lowest.shape and self.tokens.shape == other.tokens.shape

    def merged(self, other: InputStats) -> InputStats:
        """Statistics of both's tokens: those of one that has seen them all."""
        keys = torch.cat([self.keys, other.keys])
        best = keys.argsort(descending=True, stable=True)[:SAMPLE_ROWS]
        rows, half, experts = (
            torch.cat([mine, others])[best]
            for mine, others in ((self.rows, other.rows), (self.half, other.half), (self.experts, other.experts))
        )
        lowest, highest = torch.minimum(self.lowest, other.lowest), torch.maximum(self.highest, other.highest)
        tokens, sizes, count = self.tokens + other.tokens, self.sizes + other.sizes, self.count + other.count
        return InputStats(lowest, highest, rows, half, experts, tokens, sizes, count, keys[best], self.offset)

    def shifted(self, offset: Tensor) -> InputStats:
        """Statistics of the tokens less ``offset``, float32 [K].

        `sizes` are those of the sampled rows, in the place of all tokens that are no larger than these were; others stay.
        """
        rows = (self.rows.float() - offset).to(self.rows.dtype)
        lowest, highest, sizes = self.lowest - offset, self.highest - offset, self.sizes
        if len(rows):
            beyond = sizes.clone()
            beyond[: int(_sizes(self.rows).nonzero().max()) + 1] = 0
            sizes = beyond + _sizes(rows) * (self.count - int(beyond.sum())) // len(rows)
        return replace(self, lowest=lowest, highest=highest, rows=rows, sizes=sizes, offset=self.offset + offset)


def seed_of(name: str) -> int:
    """The seed of the keys of an input's tokens, 64 bits, by a name that it has in every process."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def _keys(n: int, seed: int, batch: int, device: torch.device) -> Tensor:
    """Random numbers int64 [n], of the input, the batch and the row alone. No two tokens of an input have the same.

    They are SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) of a counter: each step can be undone, so that numbers which
    differ stay so.
    """
    z = torch.arange(n, device=device) * _signed(_STEP) + _signed(seed + (batch << 32) * _STEP)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ _shifted(z, shift)) * _signed(factor)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """64 bits moved to the right, zeros before them."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    """The int64 with the last 64 bits of a number."""
    return (x + 2**63) % 2**64 - 2**63


def _sizes(x: Tensor) -> Tensor:
    """`InputStats.sizes` of tokens [T, K]."""
    exponent = x.abs().amax(-1).float().log2()
    return ((exponent - SMALLEST) * PER_OCTAVE).clamp(0, SIZES - 1).long().bincount(minlength=SIZES)
