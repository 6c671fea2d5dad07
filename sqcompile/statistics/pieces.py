"""pieces: all batches run through one part of a graph after the other, so that each weight is read once, not once a batch.

    piece 1: %a = linear(%x, %w1), ...      batch 0, batch 1, ..., batch N
    piece 2: %b = linear(%a, %w9), ...      batch 0, batch 1, ..., batch N

What lives where the graph is cut is carried from one piece to the next, for every batch. Where that is much, it is in a
temporary file, mapped into memory. The statistics are those of one batch after the other, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from sqcompile.passes.ir.graph import LINEARS, constants
from sqcompile.process.spool import Spool

if TYPE_CHECKING:
    from sqcompile.statistics.observer import Observer

PIECE = 8  # linears of a piece: a decoder layer has 4 to 7
MOST = 2**28  # bytes at a cut, of all batches, that are kept in memory
_SMALL = 2**16  # bytes of a tensor that is not worth a place in a file


def observe_in_pieces(
    observer: Observer, batches: Sequence[Sequence[Any]], done: Callable[[int, int], object] = lambda i, n: None
) -> None:
    """Adds batches to an observer's statistics.

    Args:
        observer: of a graph without random numbers.
        batches: of each an argument for each placeholder.
        done: is told how many pieces of how many have been run.

    Raises:
        CalibrationError: as `Observer.batch`, for the first piece that a batch fails in.
    """
    pieces, const = _cut(observer.gm.graph), constants(observer.gm)
    calls = [observer.begin(leaves) for leaves in batches]
    for call, leaves in zip(calls, batches, strict=True):
        call.env, call.args_iter = {}, iter(leaves)
    common: dict[fx.Node, Any] = {}  # values of constants
    kept: set[fx.Node] = set(const)  # and what is in a file already
    for i, piece in enumerate(pieces):
        for call, leaves in zip(calls, batches, strict=True):
            out = _run(call, piece, const, common)
            if piece is pieces[-1]:
                observer.end(call, leaves, out)
                call.env = {}
        alive = {n for call in calls for n in call.env}
        common = {n: x for n, x in common.items() if n in alive}
        if piece is not pieces[-1]:
            _spill(calls, kept)
        done(i + 1, len(pieces))


def _cut(graph: fx.Graph) -> list[list[fx.Node]]:
    pieces: list[list[fx.Node]] = [[]]
    linears = 0
    for n in graph.nodes:
        if n.target in LINEARS:
            linears += 1
            if linears > PIECE:
                pieces.append([])
                linears = 1
        pieces[-1].append(n)
    return pieces


def _run(call: Observer, piece: Sequence[fx.Node], const: set[fx.Node], common: dict[fx.Node, Any]) -> Any:
    """Runs a piece, as `fx.Interpreter.run` does the whole, and gives what its last node gives."""
    out = None
    with call.refusing():
        for n in piece:
            if n in common:
                out = common[n]
            else:
                out = call.run_node(n)
            if n in const:
                common[n] = out
            call.env[n] = out
            for old in call.user_to_last_uses.get(n, ()):
                del call.env[old]
    return out


def _spill(calls: Sequence[Observer], kept: set[fx.Node]) -> None:
    """Moves what the calls carry on to a file, if it is much."""
    found = [
        (call, n, x)
        for call in calls
        for n, x in call.env.items()
        if n not in kept
        and isinstance(x, Tensor)
        and x.device.type == "cpu"
        and x.is_contiguous()
        and x.nbytes >= _SMALL
    ]
    if sum(x.nbytes for *_, x in found) <= MOST:
        return
    spool, places = Spool(None), []
    for _, _, x in found:
        places.append(spool.room(x.dtype, x.shape))
        spool.write(places[-1], x, x.dtype)
    mapped = spool.map()
    assert mapped is not None
    for (call, n, x), place in zip(found, places, strict=True):
        call.env[n] = mapped.tensor(place, x.dtype, x.shape)
        kept.add(n)
