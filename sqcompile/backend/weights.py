"""weights: which values a model's tensors have, and freeing them. Known by tensor, whatever graph or session asks."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sqcompile.errors import StageError
from sqcompile.passes.ir.graph import state
from sqcompile.process.samples import sample
from sqcompile.pytorch.core import StorageWeakRef, WeakIdKeyDictionary, version


@dataclass(frozen=True)
class Freed:
    """A parameter whose float values are gone: its name, what it was, and how it is left."""

    name: str
    source: Hashable
    left: tuple[int, int]


_known: Any = WeakIdKeyDictionary()  # of a tensor: a number of its values, its storage, and a sample of them
_freed: Any = WeakIdKeyDictionary()
_numbers = itertools.count()


def states(tensors: list[Tensor]) -> tuple[list[int], list[int]]:
    """`state` of each tensor: versions and addresses."""
    try:
        versions = list(map(version, tensors))
    except RuntimeError:  # one was made in inference mode; to ask each is slow
        versions = [state(t)[0] for t in tensors]
    return versions, [t.data_ptr() for t in tensors]


def source(tensor: Tensor, name: str) -> Hashable:
    """Which values a tensor has now: changes when it is written to or moved.

    Raises:
        StageError: if its float values were freed and it has been written to since.
    """
    freed = _freed.get(tensor)
    if freed is not None:
        if state(tensor) != freed.left:
            raise StageError(
                f"{name} was written to or moved after its float values were freed (free_float=True): load the model "
                "again and compile that one"
            )
        return freed.source
    now, bytes_ = state(tensor), sample(tensor)
    number, then, storage, had = _known.get(tensor, (None, None, None, None))
    gone = storage is not None and storage.expired()
    if number is None or gone or (then == now and had != bytes_):  # or there is no trace of what has happened to it
        number = next(_numbers)
    _known[tensor] = number, now, storage_of(tensor), bytes_
    return number, *now


def storage_of(tensor: Tensor) -> StorageWeakRef | None:
    """The tensor's storage, without keeping it: as long as this is there, no other storage is at the same place.

    Assigning to ``.data`` may give a tensor other memory at the address that the freed one had, with the same version.
    """
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):  # a tensor without one
        return None


def is_freed(tensor: Tensor) -> bool:
    return tensor in _freed


def check_not_freed(key: Hashable) -> None:
    """Before an INT8 weight is made of what ``key`` says (nested tuples that hold sources).

    Raises:
        StageError: if the float values of one of its tensors were freed.
    """
    names = {f.source: f.name for f in _freed.values()}
    todo = [key]
    while todo:
        part = todo.pop()
        if part in names:
            raise StageError(
                f"{names[part]} is needed in float to be quantized in another way than before (a graph that folds other "
                "scales into it, a recompilation, or other options), and free_float=True has freed it: load the model "
                "again, or compile without free_float"
            )
        todo += part if isinstance(part, tuple) else ()


def touch(tensors: Iterable[Tensor]) -> None:
    """Counts a write to each tensor that counts writes; those of inference mode, which do not, get other memory instead.

    Not to those whose float values are freed, unless somebody has written values where there are none.
    """
    todo = [t for t in tensors if not (is_freed(t) and bool(t.isnan().all()))]
    torch.autograd.graph.increment_version([t for t in todo if not t.is_inference()])
    for t in todo:
        if t.is_inference():
            with torch.inference_mode():
                t.data = t.data.clone()


class Blocks:
    """Blocks of NaN that freed parameters are views of, one of each dtype and device."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def free(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Frees the values of parameters: each becomes a view of a block of NaN, of the same sizes and strides."""
        for name, p in named:
            if is_freed(p):
                continue
            was, key = source(p, name), (p.dtype, p.device)
            size = 1 + sum((n - 1) * s for n, s in zip(p.shape, p.stride(), strict=True))
            if key not in self._blocks or len(self._blocks[key]) < size:
                self._blocks[key] = torch.full((size,), float("nan"), dtype=p.dtype, device=p.device)
            p.data = self._blocks[key].as_strided(p.shape, p.stride())
            _freed[p] = Freed(name, was, state(p))
