"""Evidence: what calibration has seen and tried, kept small, for the page of a report. No decision depends on it.

Channels are put together in buckets of neighbours, of which the largest value counts; the few largest channels are kept by
themselves, exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

MOST_BUCKETS = 256  # of a curve
MOST_ROWS, MOST_CELLS = 32, 128  # of a heat map: tokens, and buckets of channels
LARGEST = 16  # channels that are kept by themselves
BINS, CODES = 51, 5  # of a histogram: bins, and INT8 codes in each, from -127 on
OCTAVES = 12  # below its largest value, a heat map has zeros


@dataclass(frozen=True)
class Tried:
    """One candidate of a site, and what it cost.

    Attributes:
        alpha: migration strength; None without smoothing.
        rotation: the blocks in which the input is rotated; None without rotation.
        dynamic: whether a static recipe leaves the input a scale for each token.
        cost: of the site's linears; see `Curve`.
    """

    alpha: float | None
    rotation: int | None
    dynamic: bool
    cost: float


@dataclass(frozen=True)
class Curve:
    """What was tried at one site.

    Attributes:
        by_loss: whether ``cost`` is what the model's outputs lose (see ``LayerPlan.loss``); else it is the relative energy
            of the error of the linears' outputs, added up.
        tried: the candidates, in the order of α and rotation.
    """

    by_loss: bool
    tried: tuple[Tried, ...]


@dataclass(frozen=True, eq=False)
class InputEvidence:
    """What is known of one tensor that linears read together. "After" is smoothed, rotated: as it is quantized.

    Attributes:
        linears: those that read it, by weight name.
        site: the site they are smoothed at, as in ``Plan.scales``; "" where they are at none.
        channels: K.
        tokens: of the calibration; 0 where nothing but the largest values is known.
        itemsize: bytes of a value of the weights.
        dead: how many channels were zero in all tokens.
        silent: how many were below a tenth of the median channel, but not zero.
        spikes: in words, that a few tokens are many times as large as the others; "" if none is.
        ratio: the largest channel over the median one that is not dead, before and after.
        clipped: share of sampled values beyond the largest that their scale stands for; None without a sample.
        zeros: share of sampled values, but those that are zero, that are rounded to zero; None without a sample.
        width: channels of a bucket of ``absmax``.
        absmax: bfloat16 [4, B], the largest value of each bucket: of activations before and after, of weights before and
            after. After a rotation, that of activations is of the sampled tokens alone.
        dead_in: uint8 [B], dead channels of each bucket, 255 for more.
        largest: int32 [n], the channels with the largest activations, the largest first; n is at most 16.
        values: float32 [4, n], their values, as in ``absmax``.
        cells: channels of a bucket of ``heat``.
        heat: uint8 [2, R, H], sampled tokens before and after, those with the largest values first; R is 0 without a
            sample. 255 is the largest value, ``tops``; 255 - d is d 12 / 254 octaves below it, and 0 all below.
        tops: the largest value of the heat map before, and after.
        codes: int32 [2, 51], how many sampled values of activations and of weights have codes in each bin: the first is of
            -127 .. -123, the middle one of -2 .. 2. Of FP8, as if 448 was 127.
        undivided: those of the linears whose weight absorbed 1/s of a site that was dropped when the plan was edited: what is
            known of weights after smoothing is of before that.
    """

    linears: tuple[str, ...]
    site: str
    channels: int
    tokens: int
    itemsize: int
    dead: int
    silent: int
    spikes: str
    ratio: tuple[float, float]
    clipped: float | None
    zeros: float | None
    width: int
    absmax: Tensor
    dead_in: Tensor
    largest: Tensor
    values: Tensor
    cells: int
    heat: Tensor
    tops: tuple[float, float]
    codes: Tensor
    undivided: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Evidence:
    """What is known beside the decisions of a plan.

    Attributes:
        model: the class of the model, as far as that is known.
        versions: of sqcompile and torch that made the plan.
        dtype: of the model's weights; "" where it is not known.
        bytes: of all tensors of the float graph.
        logits: whether the outputs have logits, so that losses are nats of KL divergence.
        curves: by site, what was tried.
        inputs: one entry for each tensor that linears read, in graph order.
    """

    model: str = ""
    versions: str = ""
    dtype: str = ""
    bytes: int = 0
    logits: bool = False
    curves: Mapping[str, Curve] = field(default_factory=dict)
    inputs: tuple[InputEvidence, ...] = ()

    def joined(self, other: Evidence) -> Evidence:
        """Of two graphs of one model; where both know a linear or a site, the first's."""
        known = {name for i in self.inputs for name in i.linears}
        more = tuple(i for i in other.inputs if known.isdisjoint(i.linears))
        return Evidence(
            self.model or other.model,
            self.versions or other.versions,
            self.dtype or other.dtype,
            max(self.bytes, other.bytes),
            self.logits or other.logits,
            {**other.curves, **self.curves},
            self.inputs + more,
        )
