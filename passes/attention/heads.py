"""heads: the queries, keys and values behind merged batches and repeated heads. Analysis only.

    %ks = cat([%past, %k], -2)
    %k5 = unsqueeze(%ks, 2)
    %kw = expand(%k5, [2, 2, 2, 8, 8])
    %k4 = reshape(%kw, [2, 4, 8, 8])
    %k3 = reshape(%k4, [8, 8, 8])
->
    %k4 repeats %ks                         # [B, G R, S, D]: each head of [B, G, S, D] R times
    %k3 merges batch and heads of %k4       # [B H, S, D]
    %ks has from this call %k               # behind a KV cache
"""

from __future__ import annotations

import sys
from typing import Any

from torch import fx

from sqcompile.kernels.ops import sqcompile_ops
from sqcompile.passes.ir.graph import aten, value
from sqcompile.passes.ir.operators import named
from sqcompile.passes.ir.symbols import statically_known_true

# What stands between a cache and its readers, and between the values written to one and their computation.
_READS = {aten.slice.Tensor, sqcompile_ops.dequantize_tokens.default, sqcompile_ops.quantize.default}
# What writes (dst, .., src) into a cache; the position of src among the arguments.
_WRITES = named("writes")


def head_count(x: fx.Node) -> int | None:
    """H of x [B, H, S, D], None where it varies from call to call; 1 of x [N, S, D]."""
    size = value(x).shape[1] if value(x).dim() == 4 else 1
    return size if isinstance(size, int) else None


def same_batch(q: fx.Node, k: fx.Node, v: fx.Node) -> bool:
    """Whether queries, keys and values surely have one batch size: none of them broadcasts."""
    sizes = [value(t).shape[0] for t in (q, k, v)]
    return all(statically_known_true(size == sizes[0]) for size in sizes)


def unmerged(x: fx.Node) -> fx.Node | None:
    """The [B, H, S, D] that x [B H, S, D] merges batch and heads of, or None."""
    x = _skip_copies(x)
    if x.target != aten.reshape.default or value(_source(x)).dim() != 4:
        return None
    old, new = value(_source(x)).shape, value(x).shape
    same = all(statically_known_true(a == b) for a, b in zip((old[0] * old[1], old[2], old[3]), new, strict=True))
    return _source(x) if same and isinstance(old[1], int) else None


def unrepeated(x: fx.Node) -> fx.Node | None:
    """The [B, G, S, D] that x [B, G R, S, D] repeats R times head by head, or None."""
    if x.target == aten.repeat_interleave.self_int and x.args[2:] == (1,):
        return _source(x)
    if x.target != aten.reshape.default:
        return None
    wide = _skip_copies(_source(x))
    if wide.target != aten.expand.default:
        return None
    narrow = _source(wide)
    old, new = value(narrow).shape, value(wide).shape
    if len(new) != 5 or not statically_known_true(old[2] == 1):
        return None
    kept = (0, 1, 3, 4)
    same = all(statically_known_true(old[i] == new[i]) for i in kept)
    merged = (new[0], new[1] * new[2], new[3], new[4])
    if not same or not all(statically_known_true(a == b) for a, b in zip(value(x).shape, merged, strict=True)):
        return None
    narrow = _skip_copies(narrow)
    if narrow.target != aten.unsqueeze.default or narrow.args[1] not in (2, -3):
        return None
    return _skip_copies(_source(narrow))


def unrepeated_pair(k: fx.Node, v: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Keys and values before their heads are repeated; as they are unless both are, from the same number of heads."""
    once = unrepeated(k), unrepeated(v)
    same = once[0] is not None and once[1] is not None and head_count(once[0]) == head_count(once[1])
    return once if same else (k, v)  # type: ignore[return-value]


def brought(x: fx.Node) -> fx.Node:
    """The keys or values [B, G, S, D] that this call adds to the cache that x is read from; x itself without a cache."""
    new, written = x, False
    while True:
        if new.target in _READS:
            new = _source(new)
            continue
        behind = _written(new)
        if behind is None:
            break
        new, written = behind, True
    same = value(new).dim() == value(x).dim() and value(new).shape[1] == value(x).shape[1]
    return new if written and same else x


def _written(x: fx.Node) -> fx.Node | None:
    """What is written, where x is the new content of a cache."""
    if x.target == aten.cat.default:
        parts: Any = x.args[0]
        new = [p for p in parts if not _is_old(p)]
        return new[0] if len(new) == 1 < len(parts) else None
    if x.target in _WRITES and _is_old(_source(x)):
        return x.args[_WRITES[x.target]]
    return None


def _is_old(x: fx.Node) -> bool:
    """Whether x was there before the call: an input, a constant, or room that has just been made."""
    return x.op != "call_function" or x.target in (aten.lift_fresh_copy.default, aten.zeros.default)


def _skip_copies(x: fx.Node) -> fx.Node:
    """The input of copies, and of slices that keep everything, ``x[:, :]``."""
    while x.target in (aten.contiguous.default, aten.clone.default) or (
        x.target == aten.slice.Tensor and tuple(x.args[2:]) in ((), (None,), (0,), (0, sys.maxsize), (None, None))
    ):
        x = _source(x)
    return x


def _source(x: fx.Node) -> fx.Node:
    source = x.args[0]
    assert isinstance(source, fx.Node)
    return source
