"""evidence_file: a plan's evidence as JSON and a few tensors, and back. What is read is checked field by field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sqcompile.kernels.rotation import BLOCKS
from sqcompile.plan.checks import is_text, need, number, said
from sqcompile.plan.evidence import (
    BINS,
    LARGEST,
    MOST_BUCKETS,
    MOST_CELLS,
    MOST_ROWS,
    Curve,
    Evidence,
    InputEvidence,
    Tried,
)

_TENSORS = {
    "absmax": torch.bfloat16, "dead_in": torch.uint8, "largest": torch.int32, "values": torch.float32,
    "heat": torch.uint8, "codes": torch.int32,
}  # fmt: skip
_PLAIN = (
    "linears", "site", "channels", "tokens", "itemsize", "dead", "silent", "spikes", "ratio", "clipped", "zeros", "width",
    "cells", "tops",
)  # fmt: skip
_KEYS = {*_PLAIN, "sizes"}  # sizes: B, n, R, H
_EDITED = "undivided"  # of an edited plan
_ABOUT = ("model", "versions", "dtype", "bytes", "logits")
_LONGEST = 10_000  # characters of a text
_MOST = 2**53
_MOST_TRIED = 1000
_HUGE = torch.finfo(torch.float32).max


def encoded(found: Evidence) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """JSON, and one tensor for each kind: those of all inputs, one behind the other."""
    inputs = [
        {n: getattr(i, n) for n in _PLAIN}
        | {"sizes": [i.absmax.shape[1], len(i.largest), i.heat.shape[1], i.heat.shape[2]]}
        | ({_EDITED: i.undivided} if i.undivided else {})
        for i in found.inputs
    ]
    curves = {
        site: [c.by_loss, [[t.alpha, t.rotation, t.dynamic, t.cost] for t in c.tried]]
        for site, c in found.curves.items()
    }
    meta = {n: getattr(found, n) for n in _ABOUT} | {"curves": curves, "inputs": inputs}
    tensors = {
        n: torch.cat([getattr(i, n).detach().cpu().flatten() for i in found.inputs])
        for n in (_TENSORS if found.inputs else ())
    }
    return meta, tensors


def decoded(meta: Any, tensors: Mapping[str, Tensor]) -> Evidence:
    """What `encoded` was given.

    Raises:
        PlanError: if it was given something else.
    """
    need(isinstance(meta, dict) and set(meta) == {*_ABOUT, "curves", "inputs"}, f"its evidence is {said(meta)}")
    need(isinstance(meta["curves"], dict) and isinstance(meta["inputs"], list), "its evidence has no curves and inputs")
    kinds = {n: t.dtype for n, t in tensors.items()}
    need(
        kinds == (_TENSORS if meta["inputs"] else {}), f"its evidence has the tensors {sorted(kinds)}, or other dtypes"
    )
    need(all(t.dim() == 1 for t in tensors.values()), "its evidence has tensors of several dims")
    at = dict.fromkeys(_TENSORS, 0)
    inputs = tuple(_input(i, tensors, at) for i in meta["inputs"])
    need(all(at[n] == len(t) for n, t in tensors.items()), "its evidence has more values than it speaks of")
    curves = {site: _curve(c) for site, c in meta["curves"].items()}
    return Evidence(**{n: meta[n] for n in _ABOUT}, curves=curves, inputs=inputs)


def _input(found: Any, tensors: Mapping[str, Tensor], at: dict[str, int]) -> InputEvidence:
    need(isinstance(found, dict) and set(found) - {_EDITED} == _KEYS, f"an input of its evidence is {said(found)}")
    sizes = found["sizes"]
    good = isinstance(sizes, list) and len(sizes) == 4 and all(type(n) is int and 0 <= n <= MOST_BUCKETS for n in sizes)
    need(good, f"the sizes of an input of its evidence are {said(sizes)}")
    b, n, r, h = sizes
    shapes = {
        "absmax": (4, b),
        "dead_in": (b,),
        "largest": (n,),
        "values": (4, n),
        "heat": (2, r, h),
        "codes": (2, BINS),
    }
    parts: dict[str, Any] = {}
    for name, shape in shapes.items():
        end = at[name] + math.prod(shape)
        need(end <= len(tensors[name]), f"its evidence has too few values of {name!r}")
        parts[name] = tensors[name][at[name] : end].view(shape)
        at[name] = end
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items() if k != "sizes"}
    return InputEvidence(**plain, **parts)


def _curve(found: Any) -> Curve:
    good = isinstance(found, list) and len(found) == 2 and isinstance(found[1], list) and len(found[1]) <= _MOST_TRIED
    good = good and all(isinstance(t, list) and len(t) == 4 for t in found[1])
    need(good, f"a curve of its evidence is {said(found)}")
    return Curve(found[0], tuple(Tried(*t) for t in found[1]))


def check_evidence(found: Any) -> None:
    """Checks types, shapes and ranges of evidence; None is none. What a plan has no linears for is allowed: nobody shows it.

    Raises:
        PlanError: names the field and its value.
    """
    if found is None:
        return
    need(isinstance(found, Evidence), f"its evidence is {said(found)}")
    for name in ("model", "versions", "dtype"):
        _line(getattr(found, name), f"evidence: {name}")
    need(isinstance(found.logits, bool), f"evidence: logits is {said(found.logits)}, not True or False")
    _count(found.bytes, "evidence: bytes")
    for site, curve in found.curves.items():
        _line(site, "evidence: a site")
        what = f"evidence of {site!r}"
        need(isinstance(curve.by_loss, bool), f"{what}: by_loss is {said(curve.by_loss)}, not True or False")
        for t in curve.tried:
            need(isinstance(t.dynamic, bool), f"{what}: dynamic is {said(t.dynamic)}, not True or False")
            known = t.rotation is None or (type(t.rotation) is int and t.rotation in BLOCKS)
            need(known, f"{what}: rotation is {said(t.rotation)}")
            if t.alpha is not None:
                number(t.alpha, f"{what}: alpha", 0.0, 1.0)
            number(t.cost, f"{what}: cost", 0.0, _HUGE)
    for i in found.inputs:
        _check_input(i)
    names = [name for i in found.inputs for name in i.linears]
    need(len(set(names)) == len(names), "evidence: a linear is there twice")


def _check_input(i: InputEvidence) -> None:
    need(isinstance(i.linears, tuple) and len(i.linears) > 0, f"evidence: linears are {said(i.linears)}")
    for name in (*i.linears, i.site, i.spikes):
        _line(name, "evidence: a name")
    known = isinstance(i.undivided, tuple) and all(name in i.linears for name in i.undivided)
    need(known, f"evidence: undivided is {said(i.undivided)}, not some of the linears")
    what = f"evidence of {i.linears[0]!r}"
    for name in ("channels", "tokens", "itemsize", "dead", "silent", "width", "cells"):
        _count(getattr(i, name), f"{what}: {name}")
    need(i.itemsize in (1, 2, 4, 8), f"{what}: itemsize is {said(i.itemsize)}, not 1, 2, 4 or 8 bytes")
    need(i.dead + i.silent <= i.channels, f"{what}: more channels are dead or silent than there are")
    for name in ("ratio", "tops"):
        pair = getattr(i, name)
        need(isinstance(pair, tuple) and len(pair) == 2, f"{what}: {name} is {said(pair)}, not two numbers")
        for x in pair:
            number(x, f"{what}: {name}", 0.0, _HUGE)
    for name in ("clipped", "zeros"):
        if (share := getattr(i, name)) is not None:
            number(share, f"{what}: {name}", 0.0, 1.0)
    k = i.channels
    need(
        k > 0 and _buckets(k, i.width) == i.absmax.shape[-1] <= MOST_BUCKETS,
        f"{what}: its buckets are not of {k} channels",
    )
    rows, cells = i.heat.shape[-2:] if i.heat.dim() == 3 else (0, 0)
    fits = rows == 0 or _buckets(k, i.cells) == cells
    need(fits and rows <= MOST_ROWS and cells <= MOST_CELLS, f"{what}: its heat map is not of {k} channels")
    n, b = min(LARGEST, k), i.absmax.shape[-1]
    shapes = {
        "absmax": (4, b),
        "dead_in": (b,),
        "largest": (n,),
        "values": (4, n),
        "heat": (2, rows, cells),
        "codes": (2, BINS),
    }
    for name, shape in shapes.items():
        t = getattr(i, name)
        good = isinstance(t, Tensor) and t.dtype == _TENSORS[name] and tuple(t.shape) == shape
        need(good, f"{what}: {name} is not {_TENSORS[name]} {shape}")
        if name in ("absmax", "values"):
            need(bool(((t >= 0) & t.isfinite()).all()), f"{what}: {name} is not finite, or less than 0")
    need(bool(((i.largest >= 0) & (i.largest < k)).all()), f"{what}: largest is no channel of {k}")
    need(bool((i.codes >= 0).all()), f"{what}: codes has counts below 0")


def _buckets(channels: int, width: int) -> int:
    return -(-channels // width) if width > 0 else 0


def _count(x: Any, what: str) -> None:
    need(type(x) is int and 0 <= x <= _MOST, f"{what} is {said(x)}, not a count")


def _line(x: Any, what: str) -> None:
    need(is_text(x) and len(x) <= _LONGEST, f"{what} is {said(x)}, not a line of text")
