"""traced: a graph in standard operators as an ExportedProgram, from named tensors to a dict of named tensors.

    program.module()(input_ids=ids, attention_mask=mask)["logits"]

Inputs have the names of the model's arguments, and parts of them ``past_key_values_0``, in their order; constants of the
captured call are built in. What the capture took for granted about sizes is asked again here, so that the program refuses
what the model would.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.capture.captured import NAMESPACE, Captured, Input
from sqcompile.errors import ArtifactError, first_line
from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.flat import flatten
from sqcompile.passes.ir.graph import add_op, aten, get_tensor, set_tensor, value
from sqcompile.pytorch.core import check_sizes, hollow, pytree

_SIZES = (3, 5, 7, 11, 13, 17, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 4096, 16384)
_MOST_TRIED = 100_000


@dataclass(frozen=True)
class Traced:
    """A program.

    Attributes:
        inputs: the tensors that it takes, by name, in order.
        outputs: the names of those that it gives, in order.
        conditions: on the sizes of inputs, in words: ``"x.shape[1] <= 512"``.
    """

    program: torch.export.ExportedProgram
    inputs: dict[str, Input]
    outputs: tuple[str, ...]
    conditions: tuple[str, ...]

    def __str__(self) -> str:
        inputs = (f"{name} {x}" for name, x in self.inputs.items())
        return f"takes {', '.join(inputs)}; gives {', '.join(self.outputs)}"


def program_of(gm: fx.GraphModule, apart: bool = False) -> Traced:
    """Traces a graph once more.

    Args:
        gm: a graph of a captured model, in standard operators (`standard`).
        apart: whether each output is a value of its own, with a name that no input has, as ONNX needs.

    Raises:
        ArtifactError: if torch.export refuses it.
    """
    calls = about(gm).calls
    flat, used = flatten(gm)
    sizes = example_sizes(calls, _hints(flat, calls, used))
    names = _unique([calls.path(i) for i in used])
    arguments, dims = {}, {}
    for n, name, i in zip(flat.graph.find_nodes(op="placeholder"), names, used, strict=True):
        n.target = name
        like = calls.leaves[i]
        shape = [sizes[s] if isinstance(s, str) else s for s in like.shape]
        arguments[name] = torch.zeros(shape, dtype=like.dtype, device=like.device)
        dims[name] = {d: torch.export.Dim.AUTO for d, s in enumerate(like.shape) if isinstance(s, str)}
    _ask(flat, calls, used)
    outputs = _name_outputs(flat, about(gm).out_spec, names if apart else None)
    _own_storage(flat)
    flat.graph.lint()
    flat.recompile()
    try:
        with torch.no_grad():
            program = torch.export.export(flat, (), arguments, dynamic_shapes=dims, strict=False)
    except Exception as e:
        raise ArtifactError(
            f"torch.export cannot trace the quantized graph ({type(e).__name__}: {first_line(e)}): save the model natively, with "
            "compiled.save"
        ) from e
    inputs = {name: calls.leaves[i] for name, i in zip(names, used, strict=True)}
    return Traced(program, inputs, outputs, tuple(map(calls.in_words, calls.conditions)))


def _hints(flat: fx.GraphModule, calls: Captured, used: list[int]) -> dict[str, int]:
    """By symbol, what its size was in the captured call."""
    found: dict[str, int] = {}
    for n, i in zip(flat.graph.find_nodes(op="placeholder"), used, strict=True):
        for symbol, size in zip(calls.leaves[i].shape, value(n).shape, strict=True):
            if isinstance(symbol, str):
                known = isinstance(size, torch.SymInt) and size.node.has_hint()
                found.setdefault(symbol, int(size.node.hint) if known else 1)
    return found


def example_sizes(calls: Captured, hints: dict[str, int]) -> dict[str, int]:
    """Sizes that a call may have, none of them 0 or 1, which torch.export takes for fixed; ``hints`` where there are no others."""
    symbols = list(hints)
    ways = [[hints[s]] if hints[s] > 1 else _SIZES for s in symbols]
    for ways_ in (ways, [_SIZES] * len(symbols)):
        for sizes in itertools.islice(itertools.product(*ways_), _MOST_TRIED):
            chosen = dict(zip(symbols, sizes, strict=True))
            if _holds(calls, chosen):
                return chosen
    return hints


def _holds(calls: Captured, sizes: dict[str, int]) -> bool:
    try:
        return calls.code is None or bool(eval(calls.code, NAMESPACE, sizes))
    except (ZeroDivisionError, NameError):  # of a remainder; of a size of what the graph does not read
        return False


def _ask(flat: fx.GraphModule, calls: Captured, used: list[int]) -> None:
    """Has the graph ask for each condition whose sizes are those of its inputs; first which of them are equal. In place."""
    inputs = flat.graph.find_nodes(op="placeholder")
    where: dict[str, tuple[fx.Node, int]] = {}
    # of inputs that agree; torch.export would find out at the end, and meanwhile write both into what it asks for
    equal: list[tuple[fx.Node, int, fx.Node, int]] = []
    for n, i in zip(inputs, used, strict=True):
        for dim, symbol in enumerate(calls.leaves[i].shape):
            if isinstance(symbol, str):
                first = where.setdefault(symbol, (n, dim))
                equal += [(*first, n, dim)] if first != (n, dim) else []
    with flat.graph.inserting_after(inputs[-1]):
        for condition in reversed(calls.conditions):
            symbols = sorted(set(re.findall(r"\bs\d+\b", condition)))
            if all(s in where for s in symbols):
                flat.graph.call_function(
                    _check, (condition, calls.in_words(condition), symbols, [where[s] for s in symbols])
                )
        for places in reversed(equal):
            x, dim, y, other = places
            words = f"the model takes {x.target}.shape[{dim}] == {y.target}.shape[{other}]"
            flat.graph.call_function(_check_equal, (*places, words))


def _check_equal(x: Tensor, dim: int, y: Tensor, other: int, words: str) -> None:
    check_sizes(x.shape[dim] == y.shape[other], lambda: words)


def _check(condition: str, words: str, symbols: list[str], places: list[tuple[Tensor, int]]) -> None:
    sizes = {symbol: x.shape[dim] for symbol, (x, dim) in zip(symbols, places, strict=True)}
    check_sizes(eval(condition, NAMESPACE, sizes), lambda: f"the model takes {words}")


def _name_outputs(flat: fx.GraphModule, spec: Any, apart: list[str] | None) -> tuple[str, ...]:
    """Has the graph return a dict: tensors by their names in what the model returns, which are given. In place.

    ``apart``: names of inputs that no output may have; each output is a value of its own then.
    """
    output = next(iter(flat.graph.find_nodes(op="output")))
    found = list(output.args[0])
    paths = [path for path, _ in pytree.tree_flatten_with_path(hollow(spec)[0])[0]]
    names = _unique([pytree.keystr(path) or "output" for path in paths], apart or ())
    if apart is not None:
        with flat.graph.inserting_before(output):
            found = [
                add_op(flat, aten.clone.default, n)
                if isinstance(n, fx.Node) and (n.op != "call_function" or n in found[:i])
                else n
                for i, n in enumerate(found)
            ]
    tensors = {name: n for name, n in zip(names, found, strict=True) if isinstance(n, fx.Node)}
    output.args = (tensors,)
    return tuple(tensors)


def _own_storage(flat: fx.GraphModule) -> None:
    """Copies tensors that are parts of larger ones, which would be written whole. In place."""
    for n in flat.graph.find_nodes(op="get_attr"):
        tensor = get_tensor(flat, str(n.target))
        if tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size():
            set_tensor(flat, str(n.target), tensor.clone())


def _unique(paths: list[str], taken: Collection[str] = ()) -> list[str]:
    """Names for paths such as ``pair[0]`` and ``['logits']``: identifiers, each another, and none that is taken."""
    names: list[str] = []
    for path in paths:
        base = re.sub(r"\W+", "_", path).strip("_")
        base = base if base.isidentifier() else f"output_{base}"
        name = next(n for k in itertools.count(1) if (n := base if k == 1 else f"{base}_{k}") not in (*names, *taken))
        names.append(name)
    return names
