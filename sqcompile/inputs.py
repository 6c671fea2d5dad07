"""Calls of a model: batches in every shape users have them, bound to the names of the model's own signature."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sqcompile.errors import CalibrationError, CaptureError, PlanError


@dataclass(frozen=True)
class Call:
    """One call of a model: keyword arguments by the forward's own names, and what only ``*args`` can hold."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def bind(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """The call in one canonical form, whichever way the user spelled it; arguments left at None are dropped.

    So is ``use_cache=False``, with which every model is captured that has such an argument (see `trace`).

    Raises:
        TypeError: as Python would for a call that does not fit the signature.
    """
    bound = signature.bind(*args, **kwargs)
    named: dict[str, Any] = {}
    rest: tuple[Any, ...] = ()
    for name, param in signature.parameters.items():
        if name not in bound.arguments:
            continue
        if param.kind is param.VAR_KEYWORD:
            named.update(bound.arguments[name])
        elif param.kind is param.VAR_POSITIONAL:
            rest = bound.arguments[name]
        else:
            named[name] = bound.arguments[name]
    if rest:  # named parameters before *args can only be passed by position
        positional = tuple(named.pop(n) for n in list(named) if n not in kwargs)
        rest = positional + rest
    # None means "not given" where that is the default; elsewhere it is a value of its own
    defaults = {n: p.default for n, p in signature.parameters.items()}
    named = {k: _sorted(v) for k, v in named.items() if v is not None or defaults.get(k) is not None}
    if named.get("use_cache") is False and "use_cache" in signature.parameters:
        del named["use_cache"]
    return Call(tuple(_sorted(v) for v in rest), named)


def _sorted(x: Any) -> Any:
    """Plain dicts with their keys in order, so that the order a caller writes them in does not matter."""
    return {k: _sorted(x[k]) for k in sorted(x, key=str)} if type(x) is dict else x


def as_call(model: nn.Module, batch: Any, index: int = 0) -> Call:
    """The call a calibration batch stands for: a tensor, a tuple or list of arguments, or a mapping of keywords.

    Raises:
        CalibrationError: if the batch does not fit the model's signature or holds no tensor, naming the batch.
    """
    signature = inspect.signature(model.forward)
    args: tuple[Any, ...] = (batch,)
    kwargs: dict[str, Any] = {}
    if isinstance(batch, Mapping):
        args, kwargs = (), dict(batch)
    elif isinstance(batch, (tuple, list)):
        args = tuple(batch)
    try:
        call = bind(signature, args, kwargs)
    except TypeError as e:
        names = ", ".join(signature.parameters)
        raise CalibrationError(
            f"calibration batch {index} ({type(batch).__name__}) does not fit {type(model).__name__}.forward({names}): {e}. "
            "Pass a tensor, a tuple of arguments or a dict of keyword arguments that the model accepts"
        ) from e
    leaves = pytree.tree_leaves((call.args, call.kwargs))
    if any(isinstance(leaf, Mapping) for leaf in leaves):
        kind = next(type(leaf).__name__ for leaf in leaves if isinstance(leaf, Mapping))
        raise CalibrationError(
            f"calibration batch {index} ({type(batch).__name__}) holds a {kind}, which capture cannot look into: pass "
            f"dict(...) of it there, or the {kind} itself as the batch, for a forward that takes its keys as arguments"
        )
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        raise CalibrationError(
            f"calibration batch {index} ({type(batch).__name__}) holds no tensor: convert lists to tensors "
            '(return_tensors="pt" of a tokenizer, dataset.with_format("torch")) and batch them, [batch, tokens]'
        )
    return call


def first_call(model: nn.Module, loader: Any) -> tuple[Call, Iterable[Any] | Callable[..., Any]]:
    """The first call in the calibration data, and the data with that call still in it.

    Raises:
        CalibrationError: for an empty loader, or one that is neither iterable nor callable.
    """
    if isinstance(loader, (Tensor, Mapping, str)):
        raise CalibrationError(
            f"calib_loader is a single {type(loader).__name__}: wrap it in a list, calib_loader=[batch]"
        )
    if isinstance(loader, Iterable):
        iterator = iter(loader)
        try:
            batch = next(iterator)
        except StopIteration:
            raise CalibrationError("the calibration loader is empty: pass at least one batch of real input") from None
        # never iterated anew: what wraps a generator, tqdm for one, goes on where it stood
        return as_call(model, batch), itertools.chain([batch], iterator)
    if callable(loader):
        calls: list[Call] = []
        run_callable(model, loader, lambda call: calls.append(call) if not calls else None)
        if not calls:
            raise CalibrationError("the calibration callable never called the model: call it on at least one batch")
        return calls[0], loader
    raise CalibrationError(f"calib_loader is a {type(loader).__name__}: pass an iterable of batches or a callable")


def length(loader: Any) -> int | None:
    """The number of batches, where the loader knows it."""
    try:
        return len(loader) if isinstance(loader, Sized) else None
    except TypeError:  # a DataLoader over an iterable dataset
        return None


def calls(model: nn.Module, loader: Iterable[Any]) -> Iterator[Call]:
    """The calls of an iterable loader, in order."""
    for i, batch in enumerate(loader):
        yield as_call(model, batch, i)


def run_callable(model: nn.Module, loader: Callable[..., Any], observe: Callable[[Call], Any]) -> None:
    """Runs ``loader(model)``, or ``loader()`` where it takes no argument, and shows each call of the model."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        observe(bind(inspect.signature(model.forward), args, kwargs))

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad():
            loader(model) if inspect.signature(loader).parameters else loader()
    finally:
        handle.remove()


def token_mask(call: Call, name: str = "attention_mask") -> Tensor | None:
    """The call's attention mask as bool [batch, tokens]: True where a token is real; None where there is none."""
    mask = call.kwargs.get(name)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    if mask.dtype.is_floating_point and not bool(((mask == 0) | (mask == 1)).all()):
        return None  # an additive mask of some kind
    return mask.bool()


def real_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of x [..., K] that are no padding: [T, K]. A tensor without a row per token keeps all its rows."""
    rows = x.reshape(-1, x.shape[-1])
    if mask is None:
        return rows
    mask = mask.to(x.device)
    if x.shape[:-1] == mask.shape or (x.dim() == 2 and len(x) == mask.numel()):
        return rows[mask.flatten()]
    if x.shape[:-1] == mask.t().shape:  # [tokens, batch, K]
        return rows[mask.t().flatten()]
    return rows


# Those that an argument of a model has, by their names in a plan.
_DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (
        torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
        torch.float32, torch.float64, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2,
    )
}  # fmt: skip
_MOST_ELEMENTS = 2**31  # of a call's tensors together, which are made again as zeros
_MOST_DIMS = 16
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

    return {"args": [leaf(a) for a in call.args], "kwargs": {k: leaf(v) for k, v in call.kwargs.items()}}


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
                and len(inner) <= _MOST_DIMS
                and all(type(n) is int and 0 <= n <= _MOST_ELEMENTS for n in inner)
            )
            elements += math.prod(inner) if good else 0
            return good and isinstance(x["dtype"], str) and x["dtype"] in _DTYPES
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

    good = isinstance(spec, dict) and spec.keys() == {"args", "kwargs"} and isinstance(spec["args"], list)
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
            return torch.zeros(x["shape"], dtype=_DTYPES[x["dtype"]], device=device)
        if "dict" in x:
            return {k: leaf(v) for k, v in x["dict"].items()}
        if "tuple" in x:
            return tuple(leaf(v) for v in x["tuple"])
        if "list" in x:
            return [leaf(v) for v in x["list"]]
        return x["const"]

    return Call(tuple(leaf(a) for a in spec["args"]), {k: leaf(v) for k, v in spec["kwargs"].items()})
