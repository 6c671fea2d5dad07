"""Calls of a model, bound to the names of the model's own signature, whichever way the user spelled them."""

from __future__ import annotations

import functools
import inspect
import itertools
import warnings
from collections.abc import Callable, Container, Iterable, Mapping, Sized
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sqcompile.capture.batches import is_dataset, split, with_batch_dim, without_targets
from sqcompile.errors import CalibrationError, SQCompileError
from sqcompile.process.interrupts import at_once, deferred, each_at_once
from sqcompile.pytorch.core import pytree

# Where a call has the values of what only ``*args`` can hold, and of what has a name: a position, or a keyword; and the
# names of what it passes by position.
_Way = tuple[tuple[int | str, ...], tuple[tuple[str, int | str], ...], tuple[str, ...]]


@dataclass(frozen=True)
class Call:
    """One call of a model: keyword arguments by the forward's own names, and what only ``*args`` can hold.

    ``positional`` are the names, in order, of what the caller passed by position: hooks on the model see the difference.
    ``ignored`` are other keyword arguments that the model takes and does not read.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    positional: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def to(self, device: torch.device) -> Call:
        """The same call with its tensors on a device."""
        args, kwargs = pytree.tree_map_only(Tensor, lambda x: x.to(device), (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)


@dataclass(frozen=True)
class Forward:
    """How a model is called.

    Attributes:
        signature: of its forward.
        implied: the value that an argument has where it is left open, for arguments that are no tensors.
        config: the model's configuration, as transformers' have one; None without one.
        name: of the model's class.
    """

    signature: inspect.Signature
    implied: Mapping[str, Any]
    config: Any = None
    name: str = ""

    @staticmethod
    def of(model: nn.Module) -> Forward:
        """What an argument's default leaves open, the model's configuration says, as in transformers."""
        signature, config = inspect.signature(model.forward), getattr(model, "config", None)
        implied = {n: p.default for n, p in signature.parameters.items() if p.default is not p.empty}
        if "use_cache" in implied:
            implied["use_cache"] = False  # with which every model is captured that has such an argument (see `trace`)
        for name in ("return_dict", "output_attentions", "output_hidden_states"):
            if implied.get(name) is None and isinstance(getattr(config, name, None), bool):
                implied[name] = getattr(config, name)
        return Forward(signature, implied, config, type(model).__name__)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """The call in one canonical form, whichever way the user spelled it; what says what is implied is dropped.

        Raises:
            TypeError: as Python would for a call that does not fit the signature.
        """
        key = len(args), tuple(kwargs)
        way = self._ways.get(key)
        if way is None:
            way = self._ways[key] = self._way(*key)
        rest, named, positional = way
        found: dict[str, Any] = {}
        for name, at in named:
            value = args[at] if isinstance(at, int) else kwargs[at]
            if not self._says_nothing(name, value):
                found[name] = _sorted(value)
        return Call(tuple(_sorted(args[at] if isinstance(at, int) else kwargs[at]) for at in rest), found, positional)

    @functools.cached_property
    def _ways(self) -> dict[tuple[int, tuple[str, ...]], _Way]:
        """How calls of so many positional arguments and these keywords are bound: `inspect` takes its time."""
        return {}

    def _way(self, count: int, keywords: tuple[str, ...]) -> _Way:
        bound = self.signature.bind(*range(count), **{k: k for k in keywords})  # where each value stands, for the value
        named: dict[str, int | str] = {}
        rest: tuple[int | str, ...] = ()
        for name, param in self.signature.parameters.items():
            if name not in bound.arguments:
                continue
            if param.kind is param.VAR_KEYWORD:
                named.update(bound.arguments[name])
            elif param.kind is param.VAR_POSITIONAL:
                rest = bound.arguments[name]
            else:
                named[name] = bound.arguments[name]
        positional = () if rest else tuple(named)[:count]
        if rest:  # named parameters before *args can only be passed by position
            rest = tuple(named.pop(n) for n in list(named) if n not in keywords) + rest
        return rest, tuple(named.items()), positional

    def _says_nothing(self, name: str, value: Any) -> bool:
        """Whether an argument might as well be left open."""
        param = self.signature.parameters.get(name)
        if value is None:  # a value of its own where it is not the default
            return param is None or param.default is None
        implied = self.implied.get(name)
        return isinstance(value, (bool, int, float, str)) and type(value) is type(implied) and value == implied


def _sorted(x: Any) -> Any:
    """Plain dicts with their keys in order, so that the order a caller writes them in does not matter."""
    return {k: _sorted(x[k]) for k in sorted(x, key=str)} if type(x) is dict else x


class Reader:
    """Reads the batches of calibration data, or of other data, as calls of a model.

    Attributes:
        rows: whether the batches are samples without a batch dim.
    """

    def __init__(
        self,
        model: nn.Module,
        kept: Container[str] = (),
        forward: Forward | None = None,
        what: str = "calibration batch",
        error: type[SQCompileError] = CalibrationError,
    ) -> None:
        """For a model.

        Args:
            model: whose batches they are.
            kept: arguments that calls keep though only a loss needs them.
            forward: how the model is called, where its own signature does not say so.
            what: what messages call a batch.
            error: what is raised in place of CalibrationError for other data.
        """
        self.model, self.forward = model, forward or Forward.of(model)
        self._what, self._error = what, error
        self.rows = False
        self._kept = kept
        self._said: set[str] = set()

    def call(self, batch: Any, index: int = 0) -> Call:
        """The call a batch stands for: a tensor, a tuple or list of arguments, or a mapping of keywords.

        Raises:
            CalibrationError: if the batch does not fit the model's signature or holds no tensor, naming the batch.
        """
        signature = self.forward.signature
        args, kwargs, beyond = split(signature, batch)
        of = f"{self._what} {index} ({type(batch).__name__})"
        names = f"{type(self.model).__name__}.forward({', '.join(signature.parameters)})"
        try:
            if beyond and not args and not kwargs:
                raise TypeError(f"got {', '.join(beyond)} alone")
            call = self.of_model(args, with_batch_dim(kwargs, self.rows))
        except TypeError as e:
            raise self._error(
                f"{of} does not fit {names}: {e}. Pass a tensor, a tuple of arguments or a dict of keyword arguments that "
                f"the model accepts{'; it has no ' + ', '.join(beyond) if beyond else ''}"
            ) from e
        if beyond:
            self._say(f"{', '.join(beyond)} of each {self._what} is left out: {names} takes no such argument")
        leaves = pytree.tree_leaves((call.args, call.kwargs))
        if any(isinstance(leaf, Mapping) for leaf in leaves):
            kind = next(type(leaf).__name__ for leaf in leaves if isinstance(leaf, Mapping))
            raise self._error(
                f"{of} holds a {kind}, which capture cannot look into: pass dict(...) of it there, or the {kind} itself as "
                "the batch, for a forward that takes its keys as arguments"
            )
        if not any(isinstance(leaf, Tensor) for leaf in leaves):
            raise self._error(
                f'{of} holds no tensor: convert lists to tensors (return_tensors="pt" of a tokenizer, '
                'dataset.with_format("torch")) and batch them, [batch, tokens]'
            )
        return call

    def of_model(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """A call of the model itself, without what only a loss needs.

        Raises:
            TypeError: as Python would for a call that does not fit the signature.
        """
        call = self.forward.bind(args, kwargs)
        return replace(call, kwargs=without_targets(self.model, self.forward.signature, call.kwargs, self._kept))

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            warnings.warn(text, stacklevel=2)

    def first(self, loader: Any) -> tuple[Call, Iterable[Any] | Callable[..., Any]]:
        """The first call in the calibration data, and the data with that call still in it.

        Raises:
            CalibrationError: for an empty loader, or one that is neither iterable nor callable.
        """
        if isinstance(loader, (Tensor, Mapping, str)):
            raise CalibrationError(
                f"calib_loader is a single {type(loader).__name__}: wrap it in a list, calib_loader=[batch]"
            )
        if isinstance(loader, Iterable):
            self.rows = is_dataset(loader)
            iterator = each_at_once(loader)
            try:
                batch = next(iterator)
            except StopIteration:
                raise CalibrationError(
                    "the calibration loader is empty: pass at least one batch of real input"
                ) from None
            # never iterated anew: what wraps a generator, tqdm for one, goes on where it stood
            return self.call(batch), itertools.chain([batch], iterator)
        if callable(loader):
            calls: list[Call] = []
            self.run(loader, lambda call: calls.append(call) if not calls else None)
            if not calls:
                raise CalibrationError("the calibration callable never called the model: call it on at least one batch")
            return calls[0], loader
        raise CalibrationError(f"calib_loader is a {type(loader).__name__}: pass an iterable of batches or a callable")

    def run(self, loader: Callable[..., Any], observe: Callable[[Call], Any]) -> None:
        """Runs ``loader(model)``, or ``loader()`` where it takes no argument, and shows each call of the model.

        Raises:
            CalibrationError: where what the caller passes cannot be seen.
        """
        if type(self.model).__call__ is not nn.Module.__call__:
            raise CalibrationError(
                f"{type(self.model).__name__} has a __call__ of its own, inside which a calibration callable's calls are "
                "other ones than the callable makes: pass batches instead"
            )

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            with deferred():
                observe(self.of_model(args, kwargs))

        # before the user's own hooks, which are captured with the model
        handle = self.model.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
        try:
            with torch.no_grad(), at_once():
                loader(self.model) if inspect.signature(loader).parameters else loader()
        finally:
            handle.remove()


def as_call(model: nn.Module, batch: Any) -> Call:
    """The call a batch stands for, see `Reader.call`."""
    return Reader(model).call(batch)


def length(loader: Any) -> int | None:
    """The number of batches, where the loader knows it."""
    try:
        return len(loader) if isinstance(loader, Sized) else None
    except TypeError:  # a DataLoader over an iterable dataset
        return None
