"""arguments: what the nodes of a graph are called with, as JSON and back.

    linear(%x, %w, None), to(%y, torch.float32), slice(%z, -1, 0, 9223372036854775807)
->
    [{"node": "x"}, {"node": "w"}, null]    [{"node": "y"}, {"dtype": "float32"}]    [{"node": "z"}, -1, 0, 9223372036854775807]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from sqcompile.capture.call_spec import DTYPES
from sqcompile.errors import ArtifactError

_LAYOUTS = {"strided": torch.strided}
_MEMORY = {
    str(m).removeprefix("torch."): m
    for m in (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d)
}
GROUP = "the group of the model's processes"  # stands for the name that the group of a collective has in a process
_LARGEST = 2**63
_MOST_NESTING = 8


def to_json(x: Any) -> Any:
    """An argument as JSON.

    Raises:
        ArtifactError: for one of a kind that has none.
    """
    if isinstance(x, fx.Node):
        return {"node": x.name}
    if x is None or isinstance(x, (bool, int, str)):
        return x
    if isinstance(x, float):
        return x if math.isfinite(x) else {"float": str(x)}
    if isinstance(x, complex):
        return {"complex": [to_json(x.real), to_json(x.imag)]}
    if isinstance(x, torch.dtype):
        return {"dtype": str(x).removeprefix("torch.")}
    if isinstance(x, torch.device):
        return {"device": str(x)}
    if isinstance(x, torch.layout) and x == torch.strided:
        return {"layout": "strided"}
    if isinstance(x, torch.memory_format):
        return {"memory_format": str(x).removeprefix("torch.")}
    if isinstance(x, slice):
        return {"slice": [to_json(x.start), to_json(x.stop), to_json(x.step)]}
    if isinstance(x, tuple):
        return {"tuple": [to_json(v) for v in x]}
    if isinstance(x, list):
        return [to_json(v) for v in x]
    raise ArtifactError(f"an operator is called with a {type(x).__name__}, which cannot be saved")


def from_json(found: Any, nodes: Mapping[str, fx.Node], device: Callable[[str], torch.device], depth: int = 0) -> Any:
    """The argument that JSON is.

    Args:
        found: any JSON.
        nodes: those that were made before, by name.
        device: what a device of the file is here.
        depth: how deep the argument lies in others.

    Raises:
        ArtifactError: for JSON that `to_json` does not make.
    """
    if depth > _MOST_NESTING:
        raise ArtifactError("an argument in it is nested too deeply")
    if found is None or isinstance(found, (bool, str)):
        return found
    if isinstance(found, (int, float)):
        if isinstance(found, int) and not -_LARGEST <= found < _LARGEST:
            raise ArtifactError(f"it has the integer {found}, which is none of 64 bits")
        return found
    if isinstance(found, list):
        return [from_json(v, nodes, device, depth + 1) for v in found]
    kind, inner = next(iter(found.items())) if isinstance(found, dict) and len(found) == 1 else (None, None)
    if kind in ("tuple", "slice") and isinstance(inner, list) and (kind == "tuple" or len(inner) == 3):
        parts = [from_json(v, nodes, device, depth + 1) for v in inner]
        return tuple(parts) if kind == "tuple" else slice(*parts)
    if kind == "complex" and isinstance(inner, list) and len(inner) == 2:
        real, imag = (from_json(v, nodes, device, depth + 1) for v in inner)
        if all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (real, imag)):
            return complex(real, imag)
    known: Mapping[str, Any] = {
        "node": nodes, "dtype": DTYPES, "layout": _LAYOUTS, "memory_format": _MEMORY,
        "float": {"inf": math.inf, "-inf": -math.inf, "nan": math.nan},
    }.get(kind or "", {})  # fmt: skip
    if isinstance(inner, str) and kind == "device":
        return device(inner)
    if not isinstance(inner, str) or inner not in known:
        raise ArtifactError(f"it has {str(found)[:100]!r} where an operator's argument should be")
    return known[inner]
