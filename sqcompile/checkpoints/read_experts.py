"""read_experts: a tensor [E, N, K] of the model, of the matrices that a checkpoint has one by one.

    experts.0.gate_proj.weight [I, K], experts.0.up_proj.weight [I, K], experts.1.gate_proj.weight, ...
->
    experts.gate_up_proj [E, 2 I, K]

Which rows of which matrix they are is asked of transformers: it takes a tensor of row numbers apart as it would the weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sqcompile.checkpoints.names import CheckpointNames
from sqcompile.errors import ArtifactError


@dataclass(frozen=True, eq=False)
class Part:
    """One tensor of a checkpoint: its name, and which of the E N rows it has, int64 [n]."""

    name: str
    rows: Tensor


def parts_of(names: CheckpointNames, name: str) -> list[Part]:
    """The matrices that a tensor [E, N, K] is made of.

    Raises:
        ArtifactError: if they are not whole rows of it, each in one of them.
    """
    t = names.every[name]
    unread = f"{name} is made of several tensors of a checkpoint in a way that is not read"
    if t.dim() != 3:
        raise ArtifactError(unread)
    count = t.shape[0] * t.shape[1]
    numbers = torch.arange(count).view(t.shape[0], t.shape[1], 1)
    found = names.convert_rows({name: numbers})
    whole = names.convert({name: torch.empty_like(t, device="meta")})
    fits = found.keys() == whole.keys() and all(
        rows.dim() == 2
        and rows.shape[1] == 1
        and tuple(whole[n].shape) == (len(rows), t.shape[2])
        and n.endswith(".weight")
        for n, rows in found.items()
    )
    if not fits or sorted(torch.cat([rows.flatten() for rows in found.values()]).tolist()) != list(range(count)):
        raise ArtifactError(unread)
    return [Part(n, rows.flatten()) for n, rows in found.items()]


def together(parts: list[Part], shape: torch.Size, read: Callable[[str, int], Tensor]) -> Tensor:
    """The tensor of its parts.

    Args:
        parts: of `parts_of`.
        shape: [E, N, K], or [E, N] of scales.
        read: gives a tensor by its name, [n, K] or [n], of so many rows.
    """
    out: Tensor | None = None
    for part in parts:
        rows = read(part.name, len(part.rows))
        if out is None:
            out = torch.empty((math.prod(shape[:2]), *rows.shape[1:]), dtype=rows.dtype)
        out[part.rows] = rows
    assert out is not None
    return out.view(shape)
