"""call_spec: the call that a model was captured with, as a plan keeps it: shapes, dtypes and constants, no values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sqcompile.capture.inputs import Call
from sqcompile.errors import CaptureError, PlanError

# Those that a tensor of a model has, by their names in files.
DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (
        torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
        torch.float32, torch.float64, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2,
    )
}  # fmt: skip
_NAMES = {"positional", "ignored"}  # of a call's arguments
_MOST_ELEMENTS = 2**31  # of a call's tensors together, which are made again as zeros
MOST_DIMS = 16
_MOST_NESTING = 16  # of a call's tuples, lists and dicts


def to_spec(call: Call) -> Any:
    """The call as JSON-able data: shapes and dtypes of its tensors, no values."""

    def leaf(x: Any) -> Any:
        if isinstance(x, Tensor):
            return {"shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch.")}
        if isinstance(x, Mapping):
            return {"dict": {k: leaf(v) for k, v in x.items()}}
        if isinstance(x, (tuple, list)):
            return {"tuple" if isinstance(x, tuple) else "list": [leaf(v) for v in x]}
        if x is None or isinstance(x, (bool, int, float, str)):
            return {"const": x}
        raise CaptureError(
            f"an argument of type {type(x).__name__} cannot be kept in a plan: pass tensors or constants"
        )

    kwargs = {k: leaf(v) for k, v in call.kwargs.items()}
    names = {n: list(getattr(call, n)) for n in sorted(_NAMES)}  # one order in all processes
    return {"args": [leaf(a) for a in call.args], "kwargs": kwargs, **names}


def check_spec(spec: Any) -> None:
    """Checks that a spec is one that `to_spec` could have made.

    Raises:
        PlanError: if it is not, or would take too much memory.
    """
    elements = 0

    def check(x: Any, depth: int) -> bool:
        nonlocal elements
        kind: Any
        inner: Any
        kind, inner = next(iter(x.items())) if isinstance(x, dict) and x else (None, None)
        if kind == "shape" and x.keys() == {"shape", "dtype"}:
            good = (
                isinstance(inner, list)
                and len(inner) <= MOST_DIMS
                and all(type(n) is int and 0 <= n <= _MOST_ELEMENTS for n in inner)
            )
            elements += math.prod(inner) if good else 0
            return good and isinstance(x["dtype"], str) and x["dtype"] in DTYPES
        if not isinstance(x, dict) or len(x) != 1 or depth > _MOST_NESTING:
            return False
        if kind == "const":
            number = inner is None or isinstance(inner, (bool, int)) or (isinstance(inner, float) and inner == inner)
            return number or isinstance(inner, str)
        if kind == "dict":
            return named(inner, depth)
        return kind in ("tuple", "list") and isinstance(inner, list) and all(check(v, depth + 1) for v in inner)

    def named(values: Any, depth: int) -> bool:
        return isinstance(values, dict) and all(isinstance(k, str) and check(v, depth + 1) for k, v in values.items())

    good = isinstance(spec, dict) and spec.keys() - _NAMES == {"args", "kwargs"} and isinstance(spec["args"], list)
    good = good and all(
        isinstance(names := spec.get(n, []), list) and all(isinstance(name, str) for name in names) for n in _NAMES
    )
    if not good or not all(check(v, 0) for v in spec["args"]) or not named(spec["kwargs"], 0):
        raise PlanError(
            "the plan's call is none: tensors by shape and dtype, constants, and dicts with strings as keys"
        )
    if elements > _MOST_ELEMENTS:
        raise PlanError(f"the plan's call has tensors of {elements} elements: calibrate with a smaller first batch")


def from_spec(spec: Any, device: torch.device) -> Call:
    """A call of zeros with the shapes and dtypes of a spec; capture looks at nothing else."""

    def leaf(x: Any) -> Any:
        if "shape" in x:
            return torch.zeros(x["shape"], dtype=DTYPES[x["dtype"]], device=device)
        if "dict" in x:
            return {k: leaf(v) for k, v in x["dict"].items()}
        if "tuple" in x:
            return tuple(leaf(v) for v in x["tuple"])
        if "list" in x:
            return [leaf(v) for v in x["list"]]
        return x["const"]

    args, kwargs = tuple(leaf(a) for a in spec["args"]), {k: leaf(v) for k, v in spec["kwargs"].items()}
    return Call(args, kwargs, **{n: tuple(spec.get(n, ())) for n in _NAMES})
