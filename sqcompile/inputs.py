"""Calls of a model: batches in every shape users have them, bound to the names of the model's own signature."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sqcompile.errors import CalibrationError, CaptureError


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
    named = {k: v for k, v in named.items() if v is not None}
    if named.get("use_cache") is False:
        del named["use_cache"]
    return Call(rest, named)


def as_call(model: nn.Module, batch: Any, index: int = 0) -> Call:
    """The call a calibration batch stands for: a tensor, a tuple or list of arguments, or a mapping of keywords.

    Raises:
        CalibrationError: if the batch does not fit the model's signature, naming the batch and the reason.
    """
    signature = inspect.signature(model.forward)
    try:
        if isinstance(batch, Mapping):
            return bind(signature, (), dict(batch))
        if isinstance(batch, (tuple, list)):
            return bind(signature, tuple(batch), {})
        return bind(signature, (batch,), {})
    except TypeError as e:
        names = ", ".join(signature.parameters)
        raise CalibrationError(
            f"calibration batch {index} ({type(batch).__name__}) does not fit {type(model).__name__}.forward({names}): {e}. "
            "Pass a tensor, a tuple of arguments or a dict of keyword arguments that the model accepts"
        ) from e


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
        rest = loader if iterator is not loader else itertools.chain([batch], iterator)
        return as_call(model, batch), rest
    if callable(loader):
        calls: list[Call] = []
        run_callable(model, loader, lambda call: calls.append(call) if not calls else None)
        if not calls:
            raise CalibrationError("the calibration callable never called the model: call it on at least one batch")
        return calls[0], loader
    raise CalibrationError(f"calib_loader is a {type(loader).__name__}: pass an iterable of batches or a callable")


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


def flatten_like(call: Call, spec: pytree.TreeSpec) -> list[Any]:
    """The call's leaves in the order of the captured signature.

    Raises:
        CaptureError: if the call has other arguments than the captured one; the message names both.
    """
    captured = spec.unflatten([None] * spec.num_leaves)[1]
    kwargs = {k: v for k, v in call.kwargs.items() if k in captured}
    extra = [k for k in call.kwargs if k not in captured]
    missing = [k for k in captured if k not in call.kwargs]
    leaves, got = pytree.tree_flatten((call.args, {k: kwargs[k] for k in captured if k in kwargs}))
    if extra or missing or got != spec:
        raise CaptureError(
            f"the model was captured with the arguments ({describe(spec)}), this call has "
            f"({describe(pytree.tree_structure((call.args, call.kwargs)))}): call it with the captured ones, or "
            "compile with example_inputs= that has these"
        )
    return leaves


def describe(spec: pytree.TreeSpec) -> str:
    """The argument names of a captured call, for messages."""
    args, kwargs = spec.unflatten([None] * spec.num_leaves)
    return ", ".join([f"argument {i}" for i in range(len(args))] + list(kwargs))


def token_mask(call: Call) -> Tensor | None:
    """The call's attention mask as bool [batch * tokens]: True where a token is real, None where all are."""
    mask = call.kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and not mask.dtype.is_floating_point:
        return mask.bool().flatten()
    return None


def to_spec(call: Call) -> Any:
    """The call as JSON-able data: shapes and dtypes of its tensors, no values."""

    def leaf(x: Any) -> Any:
        if isinstance(x, Tensor):
            return {"shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch.")}
        if isinstance(x, Mapping):
            return {"dict": {k: leaf(v) for k, v in x.items()}}
        if isinstance(x, (tuple, list)):
            return {"list": [leaf(v) for v in x]}
        if x is None or isinstance(x, (bool, int, float, str)):
            return {"const": x}
        raise CaptureError(
            f"an argument of type {type(x).__name__} cannot be kept in a plan: pass tensors or constants"
        )

    return {"args": [leaf(a) for a in call.args], "kwargs": {k: leaf(v) for k, v in call.kwargs.items()}}


def from_spec(spec: Any, device: torch.device) -> Call:
    """A call of zeros with the shapes and dtypes of a spec; capture looks at nothing else."""

    def leaf(x: Any) -> Any:
        if "shape" in x:
            return torch.zeros(x["shape"], dtype=getattr(torch, x["dtype"]), device=device)
        if "dict" in x:
            return {k: leaf(v) for k, v in x["dict"].items()}
        if "list" in x:
            return [leaf(v) for v in x["list"]]
        return x["const"]

    return Call(tuple(leaf(a) for a in spec["args"]), {k: leaf(v) for k, v in spec["kwargs"].items()})
