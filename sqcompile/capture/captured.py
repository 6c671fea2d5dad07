"""captured: which calls a graph serves, and the check of each call. No compiled code looks at its inputs itself.

A size is a number, or a symbol that every argument with it must agree on. What else the capture took for granted about
sizes (``if x.shape[1] <= 8``, ``table[:, : x.shape[1]]``, ``x[:, -8:]``) are conditions on symbols, by torch.export's guards.
"""

from __future__ import annotations

import functools
import math
import re
import types
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.capture.inputs import Call, Forward
from sqcompile.errors import CaptureError
from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import value
from sqcompile.pytorch.core import has_tangent, has_tangents, pytree

NAMESPACE = {"math": math, "torch": torch}  # of conditions as PythonPrinter writes them


@dataclass(frozen=True)
class Input:
    """A tensor of a captured call; a size that is a string is the symbol of that name."""

    dtype: torch.dtype
    device: torch.device
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return (
            f"{self.dtype} [{', '.join('any' if isinstance(s, str) else str(s) for s in self.shape)}] on {self.device}"
        )


@dataclass(frozen=True)
class Captured:
    """What a graph was captured with.

    Attributes:
        spec: the structure of the call.
        leaves: for each leaf of the call an `Input`, or a constant.
        conditions: on the sizes, in Python over their symbols: ``"s27 <= 512"``.
        ignored: keyword arguments that a call may have besides.
    """

    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    conditions: tuple[str, ...]
    ignored: tuple[str, ...] = ()

    def on(self, device: torch.device) -> Captured:
        """The same of calls whose tensors are on a device."""
        leaves = tuple(replace(x, device=device) if isinstance(x, Input) else x for x in self.leaves)
        return replace(self, leaves=leaves)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Of the keyword arguments, in the captured order."""
        return tuple(self.spec.unflatten([None] * self.spec.num_leaves)[1])

    @functools.cached_property
    def flat(self) -> tuple[int, int] | None:
        """How many arguments there are, by position and by keyword, where each is a leaf; else None."""
        args, kwargs = self.spec.unflatten(range(self.spec.num_leaves))
        return (len(args), len(kwargs)) if all(type(x) is int for x in (*args, *kwargs.values())) else None

    @functools.cached_property
    def code(self) -> types.CodeType | None:
        """All conditions."""
        return compile(" and ".join(f"({c})" for c in self.conditions), "<sizes>", "eval") if self.conditions else None

    def path(self, leaf: int) -> str:
        """A leaf as the user knows it: ``input_ids``, ``pair[0]``."""
        path: Any
        path, _ = pytree.tree_flatten_with_path(self.spec.unflatten(range(self.spec.num_leaves)))[0][leaf]
        name = path[1].key if isinstance(path[1], pytree.MappingKey) else f"argument {path[1].idx}"
        return name + pytree.keystr(path[2:])

    def where(self, symbol: str) -> tuple[int, int]:
        """The first leaf with a symbol among its sizes, and the dimension."""
        inputs = ((i, x.shape) for i, x in enumerate(self.leaves) if isinstance(x, Input))
        return next((i, shape.index(symbol)) for i, shape in inputs if symbol in shape)

    def in_words(self, condition: str) -> str:
        """A condition with sizes as the user writes them: ``x.shape[1] <= 512``."""

        def size(found: re.Match[str]) -> str:
            leaf, dim = self.where(found[0])
            return f"{self.path(leaf)}.shape[{dim}]"

        return re.sub(r"\bs\d+\b", size, condition)


def captured(spec: pytree.TreeSpec, given: list[Any], fakes: list[Any], env: Any, dims: Any) -> Captured:
    """What a graph serves whose example call had the leaves ``given``, of which export made ``fakes``.

    Args:
        env: the capture's ShapeEnv, or None where all sizes are numbers.
        dims: ``dynamic_shapes`` as the user gave it.
    """
    import sympy  # here, as it takes its time

    from sqcompile.capture.conditions import bounds, decides, printed
    from sqcompile.pytorch.symbolic import own_expression

    leaves, conditions = [], []
    for have, fake in zip(given, fakes, strict=True):
        if not isinstance(have, Tensor):
            leaves.append(have)
            continue
        shape: list[int | str] = []
        for size in fake.shape:
            expr = size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)
            if not expr.is_number and not expr.is_Symbol:  # a multiple of another size, say
                conditions.append(sympy.Eq(own_expression(size), expr))
                expr = own_expression(size)
            shape.append(int(expr) if expr.is_number else str(expr))
        leaves.append(Input(fake.dtype, fake.device, tuple(shape)))
    symbols = {s for x in leaves if isinstance(x, Input) for s in x.shape if isinstance(s, str)}
    if env is not None:
        conditions += [env.replace(g.expr) for g in env.guards if decides(g)]
        conditions += bounds(env, dims)
    known = [c for c in conditions if {str(s) for s in c.free_symbols} <= symbols and c != sympy.true]
    return Captured(spec, tuple(leaves), tuple(dict.fromkeys(map(printed, known))))


def unread(gm: fx.GraphModule, forward: Forward) -> set[str]:
    """Tensors that the captured call passes through ``**kwargs``, and that nothing in the graph reads."""
    spec = about(gm).calls.spec
    named: dict[str, Any] = spec.unflatten(gm.graph.find_nodes(op="placeholder"))[1]
    passed = {n: pytree.tree_leaves(v) for n, v in named.items() if n not in forward.signature.parameters}
    return {
        n for n, found in passed.items() if found and all(isinstance(value(x), Tensor) and not x.users for x in found)
    }


def contiguous(leaves: Iterable[Any]) -> list[Any]:
    """Leaves with tensors laid out as those of the captured call were: compiled code does not look."""
    return [x.contiguous() if isinstance(x, Tensor) else x for x in leaves]


def flatten_like(call: Call, like: Captured) -> list[Any]:
    """The call's leaves in the order of the captured call.

    Raises:
        CaptureError: if the call has other arguments, constants, dtypes, devices or static sizes than the captured one,
            or sizes that the capture does not serve.
    """
    if like.ignored:
        call = replace(call, kwargs={k: v for k, v in call.kwargs.items() if k not in like.ignored})
    ordered = {k: call.kwargs[k] for k in like.names if k in call.kwargs}
    leaves = [*call.args, *ordered.values()]
    tensors = all(type(x) is Tensor for x in leaves)
    if not tensors or (len(call.args), len(ordered)) != like.flat or len(ordered) != len(call.kwargs):
        leaves, got = pytree.tree_flatten((call.args, ordered))
        if len(ordered) != len(call.kwargs) or got != like.spec:
            raise CaptureError(_misshapen(call, like))
    sizes: dict[str, int] = {}
    for i, (have, want) in enumerate(zip(leaves, like.leaves, strict=True)):
        if not _fits(have, want, sizes):
            raise CaptureError(_misfit(i, leaves, like))
    try:
        holds = like.code is None or eval(like.code, NAMESPACE, sizes)
    except ZeroDivisionError:  # of a condition about parts of an empty tensor
        holds = False
    if not holds:
        raise CaptureError(_broken(sizes, like))
    return leaves


def _fits(have: Any, want: Any, sizes: dict[str, int]) -> bool:
    """Whether a leaf is what was captured; takes down the size of each symbol that it is the first to have."""
    if not isinstance(want, Input) or not isinstance(have, Tensor):
        return type(have) is type(want) and have == want
    return (
        have.dim() == len(want.shape)
        and have.dtype == want.dtype
        and have.device == want.device
        and all(
            h == (w if isinstance(w, int) else sizes.setdefault(w, h))
            for h, w in zip(have.shape, want.shape, strict=True)
        )
    )


def _misfit(i: int, leaves: list[Any], like: Captured) -> str:
    have, want, name = leaves[i], like.leaves[i], like.path(i)
    if isinstance(have, Tensor) and isinstance(want, Input) and _fits(have, want, {}):
        dim, first = next(
            (dim, at)
            for dim, (h, w) in enumerate(zip(have.shape, want.shape, strict=True))
            if isinstance(w, str) and leaves[(at := like.where(w))[0]].shape[at[1]] != h
        )
        other = f"{like.path(first[0])}.shape[{first[1]}]"
        return (
            f"{name}.shape[{dim}] is {have.shape[dim]} and {other} is {leaves[first[0]].shape[first[1]]}, which were equal in "
            "the capture, and the model reads them as equal: pass equal sizes (expand the smaller), or compile with "
            "example_inputs= that has the sizes to be used"
        )
    both = isinstance(have, Tensor) and isinstance(want, Input)
    alike = both and (have.dtype, have.device, have.dim()) == (want.dtype, want.device, len(want.shape))
    dims = (
        ", or with dynamic_shapes= that leave this dim open (torch.export.Dim.AUTO); what the model itself fixes, by a loop "
        "say, torch.compile(model, backend='smoothquant') compiles again for"
        if alike
        else ""
    )
    spelled = f"{have.dtype} {list(have.shape)} on {have.device}" if isinstance(have, Tensor) else repr(have)
    return (
        f"argument {name} was captured as {want}, this call has {spelled}: sizes that are numbers, dtypes, devices and "
        f"constants are fixed by the capture; compile with example_inputs= like this{dims}"
    )


def _broken(sizes: dict[str, int], like: Captured) -> str:
    def holds(condition: str) -> bool:
        try:
            return bool(eval(condition, NAMESPACE, sizes))
        except ZeroDivisionError:
            return False

    condition = next(c for c in like.conditions if not holds(c))
    have = ", ".join(f"{like.in_words(s)} = {sizes[s]}" for s in dict.fromkeys(re.findall(r"\bs\d+\b", condition)))
    return (
        f"the model was captured with sizes for which {like.in_words(condition)}, and does something else for others: this "
        f"call has {have}. Call it with such sizes, or compile with example_inputs= of the sizes to be used (and "
        "dynamic_shapes=None, which fixes them)"
    )


def _misshapen(call: Call, like: Captured) -> str:
    """What to say of a call with other arguments than the captured ones, or others inside of those."""
    spec = like.spec
    have, want = _arguments(pytree.tree_structure((call.args, call.kwargs))), _arguments(spec)
    remedy = "call it with the captured ones, or compile with example_inputs= that has these"
    if sorted(have) != sorted(want):
        beyond, missing = [n for n in call.kwargs if n not in want], [n for n in want if n not in have]
        parts = [f"leave {', '.join(_spelled(n, call.kwargs[n]) for n in beyond)} out"] if beyond else []
        parts += [f"pass {', '.join(missing)}"] if missing else []
        return (
            f"the model was captured with the arguments ({', '.join(want)}), this call has ({', '.join(have)}): "
            f"{' and '.join(parts) or 'call it with the captured ones'}, compile with example_inputs= that has these, or use "
            "torch.compile(model, backend='smoothquant'), which serves calls with any arguments"
        )
    captured = spec.unflatten([None] * spec.num_leaves)
    pairs = [*zip(call.args, captured[0], strict=False), *((call.kwargs[k], v) for k, v in captured[1].items())]
    for name, (x, y) in zip(want, pairs, strict=True):
        if pytree.tree_structure(x) != pytree.tree_structure(y):
            paths = [[name + pytree.keystr(p) for p, _ in pytree.tree_flatten_with_path(t)[0]] for t in (y, x)]
            if paths[0] == paths[1]:  # the same names in containers of another kind
                paths = [[f"{name}: a {type(t).__name__}"] for t in (y, x)]
            was, now = (", ".join(p) or f"an empty {name}" for p in paths)
            return f"the model was captured with {was}, this call has {now}: {remedy}"
    return f"the call is nested in another way than the captured one: {remedy}"


def _spelled(name: str, value: Any) -> str:
    """An argument as the call has it, ``use_cache=True``; by its name alone where it is no constant."""
    return f"{name}={value!r}" if isinstance(value, (bool, int, float, str)) else name


def _arguments(spec: pytree.TreeSpec) -> list[str]:
    args, kwargs = spec.unflatten([None] * spec.num_leaves)
    return [f"argument {i}" for i in range(len(args))] + list(kwargs)


def asks_for_gradients(tensors: Iterable[Any]) -> bool:
    """Whether a gradient is asked for, by ``requires_grad``, or by a tangent that goes forward with a tensor (``torch.func.jvp``)."""
    backward, forward = torch.is_grad_enabled(), has_tangents()
    if not backward and not forward:
        return False
    return any(
        isinstance(t, Tensor) and ((backward and t.requires_grad) or (forward and has_tangent(t))) for t in tensors
    )
