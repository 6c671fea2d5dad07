"""pieces: all calls run through one part of a graph after the other, so that each weight is read once, not once a call.

    piece 1: %a = linear(%x, %w1), ...      call 0, call 1, ..., call N
    piece 2: %b = linear(%a, %w9), ...      call 0, call 1, ..., call N

What lives where the graph is cut is carried from one piece to the next, for every call. What of that is much is in a
temporary file, mapped into memory. Weights that are made when they are asked for (`About.lazy`) are made once, and dropped
with their piece. The values are those of one call after the other, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import LINEARS, constants, get_tensor, value
from sqcompile.process.spool import Spool

PIECE = 8  # linears of a piece: a decoder layer has 4 to 7
MADE = 2**30  # bytes of a piece's weights that are made, unless one has more
MOST = 2**28  # bytes at a cut, of all calls, that are kept in memory; of a GPU's, a quarter of what is left free
_SMALL = 2**16  # bytes of a tensor that is not worth a place in a file


class Stepped(fx.Interpreter):
    """One call of a graph, which is run piece by piece."""

    def refusing(self) -> AbstractContextManager[None]:
        """What is around each piece of the call: it may give errors other words."""
        return nullcontext()


def run_in_pieces(
    calls: Sequence[Stepped],
    arguments: Sequence[Sequence[Any]],
    done: Callable[[int, int], object] = lambda i, n: None,
) -> Iterator[Any]:
    """Runs calls of one graph through all pieces but the last.

    Args:
        calls: one of each call, of a graph without random numbers.
        arguments: of each call one for each placeholder.
        done: is told how many pieces of how many have been run.

    Returns:
        What the graph returns, call by call: each is run through the last piece when it is asked for.
    """
    gm = calls[0].module
    assert isinstance(gm, fx.GraphModule)
    pieces, const = _cut(gm), constants(gm)
    for call, given in zip(calls, arguments, strict=True):
        call.env, call.args_iter = {}, iter(given)
    common: dict[fx.Node, Any] = {}  # values of constants
    kept: dict[tuple[int, fx.Node], Tensor] = {}
    for i, piece in enumerate(pieces[:-1]):
        carried = _Carried(kept)
        for k, call in enumerate(calls):
            _run(call, piece, const, common)
            carried.add(k, call, const)
        carried.give()
        alive = {n for call in calls for n in call.env}
        common = {n: x for n, x in common.items() if n in alive}
        done(i + 1, len(pieces))
    return _last(calls, pieces[-1], const, common)


def _last(
    calls: Sequence[Stepped], piece: Sequence[fx.Node], const: set[fx.Node], common: dict[fx.Node, Any]
) -> Iterator[Any]:
    for call in calls:
        out = [_run(call, piece, const, common)]
        call.env = {}
        yield out.pop()  # it is the caller's alone


def _cut(gm: fx.GraphModule) -> list[list[fx.Node]]:
    # each of the tensors that are made together asks for all of them: the first one is where they are made
    together = {name: (of, *lazy.beside) for of, lazy in about(gm).lazy.items() for name in (of, *lazy.beside)}
    pieces: list[list[fx.Node]] = [[]]
    linears = size = 0
    for n in gm.graph.nodes:
        made = together.get(str(n.target), ()) if n.op == "get_attr" else ()
        if n.target in LINEARS or made:
            for name in made:
                del together[name]
            new = sum(get_tensor(gm, name).nbytes for name in made)
            linears, size = linears + 1, size + new
            if linears > PIECE or (size > MADE and linears > 1):
                pieces.append([])
                linears, size = 1, new
        pieces[-1].append(n)
    return pieces


def _run(call: Stepped, piece: Sequence[fx.Node], const: set[fx.Node], common: dict[fx.Node, Any]) -> Any:
    """Runs a piece, as `fx.Interpreter.run` does the whole, and gives what its last node gives."""
    out = None
    with call.refusing():
        call.env = {n: _back(n, x) for n, x in call.env.items()}
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


def _back(n: fx.Node, x: Any) -> Any:
    """A value on the device where it was made: what is read from a file is on the CPU."""
    v = value(n)
    return (
        x.to(v.device)
        if isinstance(x, Tensor) and isinstance(v, Tensor) and x.device.type == "cpu" != v.device.type
        else x
    )


class _Carried:
    """What calls carry over a cut: as much of it as is little in memory, the rest in a file."""

    def __init__(self, kept: dict[tuple[int, fx.Node], Tensor]) -> None:
        """``kept``: what is in a file already, by the index of the call."""
        self._kept, self._bytes = kept, 0
        self._spool: Spool | None = None
        self._places: list[tuple[tuple[int, fx.Node], Stepped, int, Tensor]] = []

    def add(self, index: int, call: Stepped, const: set[fx.Node]) -> None:
        """Takes what a call has, so that it need not lie in memory while the others run."""
        for n, x in call.env.items():
            if n in const or not _is_spilled(x):
                continue
            if (index, n) in self._kept:
                call.env[n] = self._kept[index, n]
                continue
            self._bytes += x.nbytes
            if self._bytes > _most(x.device):
                self._spool = self._spool or Spool(None)
                place = self._spool.room(x.dtype, x.shape)
                self._spool.write(place, x, x.dtype)
                self._places.append(((index, n), call, place, x.to("meta")))
                call.env[n] = None
        for key in [key for key in self._kept if key[0] == index and key[1] not in call.env]:
            del self._kept[key]

    def give(self) -> None:
        """Gives the calls what they carry, now that all of them have been run."""
        mapped = None if self._spool is None else self._spool.map()
        for (index, n), call, place, like in self._places:
            assert mapped is not None
            call.env[n] = self._kept[index, n] = mapped.tensor(place, like.dtype, like.shape)


def _most(device: torch.device) -> int:
    """Bytes at a cut that are kept in a device's memory."""
    if device.type != "cuda":
        return MOST
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by PyTorch, of what was freed
    return (torch.cuda.mem_get_info(device)[0] + kept) // 4


def _is_spilled(x: Any) -> bool:
    """Whether a value is written to a file where there is much."""
    return isinstance(x, Tensor) and x.is_contiguous() and x.nbytes >= _SMALL
