"""conversion: which tensors of a checkpoint a tensor in memory is made of, and how. It is asked of transformers itself.

    model.layers.0.block_sparse_moe.experts.0.w1.weight [I, K], ...experts.0.w3.weight [I, K], ...experts.1.w1.weight, ...
->
    model.layers.0.mlp.experts.gate_up_proj [E, 2 I, K]: rows 0 to I-1 of the first, of the second, ...

Where transformers does nothing but move rows, it is given their numbers instead of their values. So no more than one matrix of
a checkpoint is needed at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sqcompile.checkpoints.shards import Stored
from sqcompile.errors import ArtifactError
from sqcompile.files.regular import said

# What moves whole rows, whatever is in them.
_MOVES = {"Chunk", "Concatenate", "MergeModulelist", "SplitModulelist", "Split"}


@dataclass(eq=False)
class Group:
    """Tensors of a checkpoint that belong together.

    Attributes:
        name: of the first tensor in memory that is made of them.
        converter: transformers' own; None for a tensor that is as it is.
        sources: (pattern, name in the files) of each.
    """

    name: str
    converter: Any = None
    sources: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Move:
    """Rows of one tensor of a checkpoint that stand one after the other in a tensor in memory, and in it."""

    source: str
    first: int
    to: int
    count: int


class Conversion:
    """The groups of a checkpoint.

    Attributes:
        groups: in the order of transformers.
        left: names in the files that the model has no place for, and what they would be called.
        used: transformers' renamings and converters that had something to do.
    """

    def __init__(self, model: Any, files: Iterable[str]) -> None:
        """Sorts names of files by what a model makes of them."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        self.model, self.groups, self.left = model, dict[str, Group](), dict[str, str]()
        every = get_model_conversion_mapping(model)
        renamings = [x for x in every if isinstance(x, WeightRenaming)]
        converters = [x for x in every if isinstance(x, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        prefix, have = model.base_model_prefix, model.state_dict()
        for name in sorted(files, key=dot_natural_key):
            new, pattern = rename_source_key(name, renamings, converters, prefix, have)
            if new not in have and name in have:
                new, pattern = rename_source_key(name, [], [], prefix, have)
            if new not in have:
                self.left[name] = new
                continue
            converter = None if pattern is None else by_pattern[pattern]
            self.groups.setdefault(new, Group(new, converter)).sources.append((pattern or name, name))
        self.used = [x for x in every if not hasattr(x, "was_used") or x.was_used()]

    def moves(
        self, group: Group, files: Mapping[str, Stored], shapes: Mapping[str, Any]
    ) -> dict[str, list[Move]] | None:
        """By tensor in memory, the rows that it is made of; None where more is done than to move them.

        Args:
            group: one with a converter.
            files: by name.
            shapes: tensors of these sizes, by their names in memory.
        """
        kinds = {type(operation).__name__ for operation in group.converter.operations}
        dims = {len(files[name].shape) for _, name in group.sources}
        if not kinds <= _MOVES or len(dims) != 1 or 0 in dims:
            return None
        numbers, starts, count = {}, [], 0
        for _, name in group.sources:
            length, *rest = files[name].shape
            numbers[name] = torch.arange(count, count + length).view(length, *(1 for _ in rest))
            starts.append(count)
            count += length
        inner = dims.pop() - 1
        found = {}
        for name, rows in self.convert(group, numbers).items():
            want = tuple(shapes[name].shape) if name in shapes else ()
            if tuple(rows.shape) != (*want[: len(want) - inner], *(1 for _ in range(inner))):
                return None
            if any(files[n].shape[1:] != want[len(want) - inner :] for _, n in group.sources):
                return None
            found[name] = _runs(rows.flatten(), [n for _, n in group.sources], starts)
        return found

    def convert(self, group: Group, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What transformers makes of tensors in the place of a group's.

        Raises:
            ArtifactError: if it fails.
        """
        converter = copy.deepcopy(group.converter)
        for pattern, name in group.sources:
            converter.add_tensor(group.name, name, pattern, tensors[name])
        try:
            found = converter.convert(group.name, model=self.model, config=self.model.config)
        except Exception as e:
            raise ArtifactError(
                f"transformers cannot make {group.name!r} of {group.sources[0][1]!r} and its neighbours ({said(e)}): try "
                "another version of transformers, or copy the directory again"
            ) from e
        return {name: t[0] if isinstance(t, list) else t for name, t in found.items()}


def _runs(rows: Tensor, names: list[str], starts: list[int]) -> list[Move]:
    """Rows by their numbers, int64 [R], as few moves."""
    new = torch.ones_like(rows, dtype=torch.bool)
    edges = torch.tensor(starts)
    source = torch.searchsorted(edges, rows, right=True) - 1
    new[1:] = (rows[1:] != rows[:-1] + 1) | (source[1:] != source[:-1])
    firsts = new.nonzero().flatten().tolist()
    return [
        Move(names[int(source[a])], int(rows[a]) - starts[int(source[a])], a, b - a)
        for a, b in zip(firsts, [*firsts[1:], len(rows)], strict=True)
    ]
