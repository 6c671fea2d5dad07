"""exchange: statistics as bytes, for another process, and what two processes must have in common to share them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor, fx, nn

from sqcompile.capture.inputs import Call
from sqcompile.passes.ir.graph import nodes_by_name, value
from sqcompile.process.interrupts import checkpoint
from sqcompile.process.ranks import Ranks
from sqcompile.pytorch.core import is_wrapper_subclass, pytree
from sqcompile.statistics.input_stats import InputStats
from sqcompile.version import VERSION

if TYPE_CHECKING:
    from sqcompile.statistics.observer import Observer

SAME_DATA = "pass every rank the same loader, with all batches in one order (no DistributedSampler, and one seed where it shuffles)"
_LARGE = 2**16  # values of a tensor
_AT_ONCE = 4  # statistics that are sent at once, each of some megabytes


def gather(gm: fx.GraphModule, observer: Observer, ranks: Ranks) -> None:
    """Adds what all other ranks have seen of a traced graph to rank 0's statistics."""
    nodes = nodes_by_name(gm)
    # by names that every rank has for them
    inputs = {f"input {l.name}": key for key, l in observer.reads.items()}
    heads = {f"head {node}": node for found in observer.operands.values() for node in found}
    every = {name: observer.stats[key] for name, key in inputs.items() if key in observer.stats}
    every |= {name: observer.heads[node] for name, node in heads.items() if node in observer.heads}
    names = [*inputs, *heads]
    for some in (names[i : i + _AT_ONCE] for i in range(0, len(names), _AT_ONCE)):
        for data in ranks.to_first(encoded({name: every[name] for name in some if name in every})):
            for name, parts in decoded(data).items():
                device = value(nodes[inputs[name][0] if name in inputs else heads[name]]).device
                there: dict[str, Any] = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in parts.items()}
                found = InputStats(**there)
                every[name] = every[name].merged(found) if name in every else found
    observer.stats = {key: every[name] for name, key in inputs.items() if name in every}
    observer.heads = {node: every[name] for name, node in heads.items() if name in every}


def encoded(stats: Mapping[str, InputStats]) -> bytes:
    """Statistics by name, as the bytes of a safetensors file."""
    tensors = {
        f"{name}.{field}": torch.as_tensor(found).cpu().contiguous()
        for name, one in stats.items()
        for field, found in vars(one).items()
    }
    return safetensors.torch.save(tensors)


def decoded(data: bytes) -> dict[str, dict[str, Any]]:
    """By name, the fields of the statistics that `encoded` was given, on the CPU."""
    found: dict[str, dict[str, Any]] = {}
    for key, tensor in safetensors.torch.load(data).items():
        name, _, field = key.rpartition(".")
        found.setdefault(name, {})[field] = int(tensor) if field == "count" else tensor
    return found


class Digest:
    """Tells models, and batches, from others: a SHA-256 of their values, of large tensors of an even sample of them."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, values: Iterable[Any]) -> None:
        """Takes tensors and plain values; of anything else the type."""
        for x in values:
            if not isinstance(x, Tensor):
                plain = isinstance(x, (bool, int, float, str, type(None)))  # the text of others may be an address
                self._hash.update(f"{x!r}\n".encode() if plain else f"{type(x).__name__}\n".encode())
                continue
            self._hash.update(f"{x.dtype} {tuple(x.shape)}\n".encode())
            if x.layout == torch.strided and not x.is_quantized and not is_wrapper_subclass(x):
                step = math.ceil(x.numel() / _LARGE) | 1  # odd, to meet all columns
                some = x.detach().resolve_conj().resolve_neg().reshape(-1)[::step]
                self._hash.update(some.cpu().contiguous().view(torch.uint8).numpy().tobytes())

    def text(self) -> str:
        return self._hash.hexdigest()


def digest_of_model(model: nn.Module) -> str:
    """Of the names and values of a model's parameters and buffers."""
    digest = Digest()
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        digest.add((name, x))
        checkpoint()  # all of a mapped model is read here
    return digest.text()


def in_common(
    model: nn.Module, call: Call, scales: Mapping[str, Tensor] | None, recipe: object
) -> dict[str, tuple[str, str]]:
    """What ranks that calibrate together must have in common, as `Ranks.agree` takes it.

    Args:
        model: with its weights.
        call: that it is captured with.
        scales: largest values by linear, in the place of data.
        recipe: of the plan.
    """
    first, largest = Digest(), Digest()
    first.add(pytree.tree_leaves((call.args, call.kwargs)))
    for name, x in (scales or {}).items():
        largest.add((name, x))
    return {
        "another version": (f"sqcompile {VERSION}, torch {torch.__version__}", "install the same on every machine"),
        "another recipe": (repr(recipe), "pass every rank the same"),
        "another model": (digest_of_model(model), "load the same model with the same weights on every rank"),
        "other data": ("batches" if scales is None else f"scales {largest.text()}", "pass every rank the same"),
        "another first batch": (first.text(), SAME_DATA),
    }
