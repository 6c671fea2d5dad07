"""calls: how a model is called, as JSON and back: its signature, and the calls that its capture serves.

Defaults of arguments are kept where they are constants; of another, that there is one.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from sqcompile.artifact import structures
from sqcompile.artifact.expressions import checked
from sqcompile.capture.call_spec import DTYPES, MOST_DIMS
from sqcompile.capture.captured import Captured, Input
from sqcompile.capture.inputs import Forward
from sqcompile.errors import ArtifactError

_KINDS = {
    k.name: k
    for k in (
        inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_POSITIONAL,
        inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD,
    )
}  # fmt: skip
_MOST_PARAMETERS, _MOST_LEAVES, _MOST_CONDITIONS = 1000, 10_000, 10_000


class _Kept:
    """In place of a default that is no constant: calls leave it open, as they did before."""

    def __repr__(self) -> str:
        return "..."


_KEPT = _Kept()


def forward_to_json(call: Forward) -> Any:
    """A signature as JSON."""
    parameters = [
        {"name": p.name, "kind": p.kind.name} | ({} if p.default is p.empty else {"default": _constant(p.default)})
        for p in call.signature.parameters.values()
    ]
    implied = {n: _constant(v) for n, v in call.implied.items() if _is_constant(v)}
    return {"name": call.name, "parameters": parameters, "implied": implied}


def forward_from_json(found: Any) -> Forward:
    """The signature that JSON is.

    Raises:
        ArtifactError: for JSON that `forward_to_json` does not make.
    """
    try:
        if len(found["parameters"]) > _MOST_PARAMETERS:
            raise ValueError("too many parameters")
        parameters = [
            inspect.Parameter(
                p["name"],
                _KINDS[p["kind"]],
                default=_value(p["default"]) if "default" in p else inspect.Parameter.empty,
            )
            for p in found["parameters"]
        ]
        implied = {_text(n): _value(v) for n, v in found["implied"].items()}
        return Forward(inspect.Signature(parameters), implied, None, _text(found["name"]))
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise ArtifactError(f"its signature is none ({e})") from e


def captured_to_json(calls: Captured) -> Any:
    """The calls that a capture serves as JSON.

    Raises:
        ArtifactError: for calls with a class that could not be made again.
    """
    leaves = [
        {"dtype": str(x.dtype).removeprefix("torch."), "device": str(x.device), "shape": list(x.shape)}
        if isinstance(x, Input)
        else {"constant": _constant(x)}
        for x in calls.leaves
    ]
    bad = [x for x in calls.leaves if not isinstance(x, Input) and not _is_constant(x)]
    if bad:
        raise ArtifactError(f"the model was captured with a {type(bad[0]).__name__} as argument, which cannot be saved")
    spec, conditions = structures.to_json(calls.spec), list(calls.conditions)
    return {"spec": spec, "leaves": leaves, "conditions": conditions, "ignored": list(calls.ignored)}


def captured_from_json(found: Any, device: Callable[[str], torch.device]) -> Captured:
    """The calls that JSON is.

    Raises:
        ArtifactError: for JSON that `captured_to_json` does not make.
    """
    try:
        spec = structures.from_json(found["spec"])
        if len(found["leaves"]) != spec.num_leaves or spec.num_leaves > _MOST_LEAVES:
            raise ValueError("its arguments are not as many as its structure has")
        leaves = tuple(_leaf(x, device) for x in found["leaves"])
        symbols = {s: 2 for x in leaves if isinstance(x, Input) for s in x.shape if isinstance(s, str)}
        if len(found["conditions"]) > _MOST_CONDITIONS:
            raise ValueError("too many conditions")
        conditions = tuple(checked(c, symbols) for c in found["conditions"])
        calls = Captured(spec, leaves, conditions, tuple(_text(n) for n in found["ignored"]))
        if not all(isinstance(n, str) for n in calls.names):
            raise ValueError("its arguments have no names")
        return calls
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        raise e if isinstance(e, ArtifactError) else ArtifactError(f"its calls are none ({e})") from e


def _leaf(x: Any, device: Callable[[str], torch.device]) -> Any:
    if "constant" in x:
        return _value(x["constant"])
    if len(x["shape"]) > MOST_DIMS:
        raise ValueError("an argument of too many dimensions")
    return Input(DTYPES[x["dtype"]], device(x["device"]), tuple(_size(s) for s in x["shape"]))


def _size(s: Any) -> int | str:
    if isinstance(s, str) and s.isidentifier() and len(s) < 40:
        return s
    if type(s) is not int or not 0 <= s < 2**48:
        raise ValueError(f"{s!r} is no size")
    return s


def _is_constant(x: Any) -> bool:
    return x is None or isinstance(x, (bool, int, str)) or (isinstance(x, float) and math.isfinite(x))


def _constant(x: Any) -> Any:
    return {"value": x} if _is_constant(x) else {"kept": type(x).__name__}


def _value(found: Mapping[str, Any]) -> Any:
    if "kept" in found:
        return _KEPT
    if not _is_constant(found["value"]):
        raise ValueError(f"{found['value']!r} is no constant")
    return found["value"]


def _text(x: Any) -> str:
    if not isinstance(x, str) or len(x) > 1000:
        raise ValueError(f"{x!r} is no name")
    return x
