"""calibrate: run the captured graph on real input and keep raw statistics of every linear's input, and of attentions.

Raw means: nothing that depends on alpha or granularity, so that another recipe needs no second run. Memory is
O(channels): absmax per channel and a bounded sample of rows, never the activations. Of the first calls, arguments and
rows of the outputs are kept, 64 MB at most of a graph (`sample`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from sqcompile.capture.captured import flatten_like
from sqcompile.capture.inputs import Call, Reader
from sqcompile.errors import CalibrationError, CaptureError
from sqcompile.passes.attention.chains import Attention
from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.pieces import run_in_pieces
from sqcompile.passes.ir.placed import device_of_calls
from sqcompile.process.interrupts import each_at_once
from sqcompile.process.memory import limited
from sqcompile.process.progress import part
from sqcompile.process.ranks import ALONE, Ranks
from sqcompile.statistics.exchange import SAME_DATA, Digest, gather
from sqcompile.statistics.input_stats import InputStats
from sqcompile.statistics.observer import Observer
from sqcompile.statistics.sample import CALLS, LOOKS, Sample, is_random

_AHEAD = CALLS  # others' batches that rank 0 runs with its own for the sample, which mostly takes no more


@dataclass(frozen=True)
class Calibration:
    """Statistics by linear name (see `Linear.name`); linears that read one tensor share one InputStats.

    ``heads`` are those of attentions' queries, keys and values [.., H, S, D], by node: K is H D, head by head.
    ``sample`` holds the first calls, to run them again.
    """

    inputs: dict[str, InputStats]
    batches: int
    heads: dict[str, InputStats] = field(default_factory=dict)
    sample: Sample = field(default_factory=Sample)


def calibrate(
    gm: fx.GraphModule,
    model: nn.Module,
    loader: Iterable[Any] | Callable[..., Any],
    attentions: Sequence[Attention] = (),
    total: int | None = None,
    reader: Reader | None = None,
    observer: Observer | None = None,
    ranks: Ranks = ALONE,
) -> Calibration:
    """Runs a traced graph over the calibration data.

    Of several ranks, each runs the batches that it owns, and rank 0 those of the sample besides; the statistics on rank 0
    are then those of all batches. Elsewhere they are those of the rank's own.

    Args:
        gm: the traced graph; it is not changed.
        model: the module it was traced from, for its signature (and to be run, where ``loader`` is a callable).
        loader: batches, or a callable that runs the model itself. An ``attention_mask`` [batch, tokens] among the
            inputs excludes padding from the statistics, ``decoder_attention_mask`` that of a decoder's own tokens.
        attentions: those whose queries, keys and values are observed.
        total: number of batches, for those who wait.
        reader: of the batches, where it has read one of them before.
        observer: of the graph, where it keeps more than an `Observer` does.
        ranks: the processes that share the batches; each is given all of them.

    Raises:
        CalibrationError: for a batch the model refuses, or a non-finite activation (names the tensor and the batch); or
            where another rank has failed, or was given other batches.
    """
    observer = observer or Observer(gm, attentions)
    captured, reader = about(gm).calls, reader or Reader(model)
    numbers, digest = itertools.count(), Digest()
    # weights are then read once, and not for each batch; random numbers, and what shards say to each other, would come in
    # another order
    there = device_of_calls(gm)
    pieces = (limited() or there is not None) and not is_random(gm) and (ranks.shares or ranks.count == 1)
    observer.samples &= ranks.plans
    later: dict[int, list[Any]] = {}  # batches by their index, those that this rank may run

    def observe(call: Call) -> None:
        ranks.check()
        i = next(numbers)
        try:
            leaves = flatten_like(call if there is None else call.to(there), captured)
        except CaptureError as e:
            raise CalibrationError(f"calibration batch {i}: {e}") from e
        if ranks.count > 1:
            digest.add(leaves)
        if pieces:
            if ranks.owns(i) or (observer.samples and i < LOOKS):
                later[i] = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
            return  # they are counted when they are run
        if ranks.owns(i) or (observer.samples and not observer.sample.full):
            observer.batch(leaves, i, ranks.owns(i))
        done()

    with part(total=total) as done:
        if isinstance(loader, Iterable):
            for i, batch in enumerate(each_at_once(loader)):
                observe(reader.call(batch, i))
        else:
            reader.run(loader, observe)
        if later:
            with part("layers", 100) as percent:  # of the pieces of the graph, each of which all batches run through
                _observe_in_pieces(observer, later, ranks, percent)
    batches = next(numbers)
    if not batches:
        raise CalibrationError(
            "the calibration loader is empty: pass at least one batch of real input"
            if isinstance(loader, Iterable)
            else "the calibration callable made no call the second time: it is run twice, first to see what it passes"
        )
    if ranks.count > 1:
        ranks.agree({"more or fewer batches": (str(batches), SAME_DATA), "other batches": (digest.text(), SAME_DATA)})
    if ranks.shares:
        gather(gm, observer, ranks)
    return Calibration(observer.found(), batches, observer.heads, observer.sample)


def _observe_in_pieces(
    observer: Observer, batches: dict[int, list[Any]], ranks: Ranks, percent: Callable[[int], object]
) -> None:
    """Adds batches by their index to an observer's statistics, and to its sample, as one after the other."""
    now = {i: leaves for i, leaves in batches.items() if ranks.owns(i) or i < _AHEAD}
    calls = [observer.begin(leaves, i, ranks.owns(i)) for i, leaves in now.items()]

    def done(i: int, count: int) -> None:
        ranks.check()
        percent(100 * i // count)

    outs = run_in_pieces(calls, [*now.values()], done)
    own = iter(calls)
    for i, leaves in batches.items():
        if i in now:
            observer.end(next(own), leaves, next(outs))
        elif observer.samples and not observer.sample.full:
            observer.batch(leaves, i, counts=False)
