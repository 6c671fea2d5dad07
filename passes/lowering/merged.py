"""merged: the INT8 weights of linears that share an input as one, packed where a target's kernels want it; now, or later."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, fx

from sqcompile.kernels.targets import Target
from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import get_tensor, value
from sqcompile.passes.rewrite.weight_store import Lazy, Merged, Shared


def merged(
    gm: fx.GraphModule, weights: Sequence[tuple[fx.Node, fx.Node]], experts: bool, shared: Shared | None, target: Target
) -> Merged:
    """Weights, each with its scale, as one: shared between graphs if asked for."""
    merge = _experts if experts else _linears
    if shared is None:
        return merge([tuple(get_tensor(gm, str(n.target)) for n in pair) for pair in weights], target)
    lazy: list[Lazy] = [about(gm).lazy[str(weight.target)] for weight, _ in weights]
    key = target.name, *(l.key for l in lazy)
    return shared.get(gm, key, lambda: merge([l.make() for l in lazy], target))


def stand_in(weights: Sequence[fx.Node], experts: bool, target: Target) -> Merged:
    """What `merged` would give, without values: on the meta device, as if packing changed nothing."""
    shapes, dtype = [tuple(value(w).shape) for w in weights], value(weights[0]).dtype
    empty = partial(torch.empty, device="meta")
    if not experts:
        rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
        sums = empty((rows,), dtype=torch.int32) if target.pack is not None else None
        return Merged(empty((rows, columns), dtype=dtype), empty((rows,), dtype=torch.float32), sums)
    [(count, rows, columns)] = shapes
    scale = empty((count, rows), dtype=torch.float32)
    if target.pack is None or not target.packs_experts:
        return Merged(empty((count, rows, columns), dtype=dtype), scale)
    each = [empty((rows, columns), dtype=dtype) for _ in range(count)]
    return Merged(each, scale, empty((count, rows), dtype=torch.int32))


def made_later(
    gm: fx.GraphModule,
    weights: Sequence[fx.Node],
    experts: bool,
    target: Target,
    static: Tensor | None,
    held: Sequence[str],
) -> dict[str, Lazy]:
    """How what stands in is made, by the name of the first one.

    Args:
        gm: a graph whose ``weights`` are lazy.
        weights, experts, target: as of `stand_in`.
        static: by which the scales are multiplied.
        held: the names of what stands in: the weight, or each expert's, then the scales, then the sums if they are read.
    """
    parts: list[Lazy] = [about(gm).lazy[str(w.target)] for w in weights]

    def make() -> tuple[Tensor, ...]:
        found = (_experts if experts else _linears)([l.make() for l in parts], target)
        every = [*found.w] if isinstance(found.w, list) else [found.w]
        every.append(found.scale if static is None else found.scale * static)
        if found.beside is not None:
            every.append(found.beside)
        return tuple(every[: len(held)])

    return {held[0]: Lazy(None, make, tuple(held[1:]))}


def _linears(parts: Sequence[tuple[Tensor, ...]], target: Target) -> Merged:
    w_int8 = parts[0][0] if len(parts) == 1 else torch.cat([w for w, _ in parts])  # no copy of a large one
    scale = torch.cat([scale.expand(len(w)) for w, scale in parts])
    if target.pack is None:
        return Merged(w_int8, scale)
    w, beside = target.pack(w_int8)
    return Merged(w, scale, beside)


def _experts(parts: Sequence[tuple[Tensor, ...]], target: Target) -> Merged:
    [(w_int8, scale)] = parts
    scale = scale.expand(w_int8.shape[:2]).contiguous()
    if target.pack is None or not target.packs_experts:
        return Merged(w_int8, scale)
    packed, beside = zip(*(target.pack(matrix) for matrix in w_int8), strict=True)
    return Merged([*packed], scale, torch.stack(beside))
