"""dealt: blocks of a checkpoint's tensors, made by several ranks and given to the first one, which writes the checkpoint.

    rank 0    block 0    reads block 1    block 2    reads block 3
    rank 1    block 1                     block 3

What another rank makes is in a file of the new directory until rank 0 has read it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from sqcompile.files.directory import writers
from sqcompile.files.safetensors_files import WeightFile
from sqcompile.files.weights import write_weights
from sqcompile.process.ranks import Ranks

Block = Callable[[], dict[str, Tensor]]


def dealt(folder: str, blocks: Sequence[Block], ranks: Ranks) -> Iterator[dict[str, Tensor]]:
    """The tensors of each block in their order, on rank 0; nothing elsewhere. Each rank calls it, and takes all it gives.

    Args:
        folder: the new directory.
        blocks: gives the tensors of each one; the same ones on every rank.
        ranks: the processes.

    Raises:
        OSError: if a file cannot be written.
        ArtifactError: if one cannot be read.
        CalibrationError: where another rank has failed or is dead.
    """
    able = writers(ranks, folder)
    for start in range(0, len(blocks), len(able)):
        turn = dict(zip(able, range(start, len(blocks)), strict=False))
        own = blocks[turn[ranks.rank]]() if ranks.rank in turn else {}
        if own and not ranks.first:
            write_weights(os.path.join(folder, _file(turn[ranks.rank])), own)
        names = [json.loads(text) for text in ranks.tell("block of weights", json.dumps([*own]))]
        for rank, i in turn.items() if ranks.first else ():
            if rank == ranks.rank:
                yield own
            elif names[rank]:
                file = WeightFile(folder, _file(i))
                yield {name: file.tensor(name) for name in names[rank]}
                os.unlink(os.path.join(folder, _file(i)))


def _file(block: int) -> str:
    return f"block-{block}.safetensors"
