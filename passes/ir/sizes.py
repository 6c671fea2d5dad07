"""sizes: two choices of a graph's symbolic sizes. What holds at both depends on channel sizes only.

    %x: f32[s0, s1, 4] = input
->
    %x: [2, 3, 4], then [3, 5, 4]
    %x: [2, 3, 4], then [16, 24, 4], then [24, 40, 4]       # where a size must be a multiple of 8: one run failed
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from sqcompile.errors import CaptureError, InternalError, first_line
from sqcompile.passes.ir.about import Sizes, about
from sqcompile.passes.ir.explain import fixed_sizes, unlogged
from sqcompile.passes.ir.graph import value

_Result = TypeVar("_Result")


def at_two_sizes(gm: fx.GraphModule, run: Callable[[Sizes], _Result]) -> tuple[_Result, _Result]:
    """Runs something at two choices of batch and sequence sizes.

    Args:
        gm: a traced graph; ``About.sizes`` may hold two choices that it is known to serve, see `vary`.
        run: takes a size for each free symbol of the graph's placeholders.

    Raises:
        CaptureError: if the graph cannot be run at two sizes of batch and sequence.
    """
    symbols = free_symbols(gm)
    alike = list(dict.fromkeys(symbols.values()))
    primes = [2, 3, 5, 7, 11, 13, 17, 19, 23]
    # each size apart; then those together that were equal in the capture, for models that need it where no guard says so
    orders = [{s: i for i, s in enumerate(symbols)}, {s: alike.index(size) for s, size in symbols.items()}]
    pairs: list[tuple[Sizes, ...]] = [
        tuple({s: unit * primes[(i + k) % len(primes)] for s, i in order.items()} for k in (0, 1))
        for order in orders[: 1 + (len(alike) < len(symbols))]
        for unit in (1, 8, 32)  # multiples, for models whose sizes must divide by something
    ]
    # about as long as in the capture, for convolutions that read thousands of samples
    long = {s: 2 ** (was.bit_length() - 1) if isinstance(was, int) and was > 1 else 1 for s, was in symbols.items()}
    pairs += [
        tuple({s: long[s] * size for s, size in sizes.items()} for sizes in pairs[i]) for i in range(0, len(pairs), 3)
    ]
    known = [pair] if (pair := about(gm).sizes) else []
    allowed = conditions(gm)
    likely = [all(_holds(allowed, sizes) for sizes in pair) for pair in pairs]
    ordered = [p for p, l in zip(pairs, likely, strict=True) if l]
    ordered += known + [p for p, l in zip(pairs, likely, strict=True) if not l]
    error: Exception | None = None
    for first, second in ordered:
        try:
            with unlogged():
                return run(first), run(second)
        except InternalError:
            raise
        except Exception as e:
            error = e
    assert error is not None
    raise CaptureError(
        f"the captured graph does not run at other batch or sequence sizes: {first_line(error)}. To fix them, "
        f"{fixed_sizes(gm)}"
    ) from error


def free_symbols(gm: fx.GraphModule) -> dict[Any, Any]:
    """The symbolic sizes of the graph's inputs, in order of appearance, each with what it was in the capture."""
    found: dict[Any, Any] = {}
    for n in gm.graph.find_nodes(op="placeholder"):
        v = value(n)
        for size in v.shape if isinstance(v, Tensor) else [v]:
            if isinstance(size, torch.SymInt):
                node = size.node
                for symbol in sorted(node.expr.free_symbols, key=str):
                    was = node.hint if node.expr.is_Symbol and node.has_hint() else None
                    found.setdefault(symbol, symbol if was is None else was)
    return found


def conditions(gm: fx.GraphModule) -> list[Any]:
    """What the sizes of a traced graph fulfil, as expressions of its symbols.

    In ``About.conditions`` where it is known for good: Inductor adds conditions of its own.
    """
    known = about(gm).conditions
    return known if known is not None else _of(about(gm).fake_mode.shape_env)


def vary(inputs: Iterable[Any], shape_env: Any) -> tuple[Sizes, Sizes]:
    """The sizes of the call at hand, and others that a graph of Dynamo serves, each symbol another if it can be.

    A size that every condition of the graph holds at its value of now is fixed: Dynamo then guards it.

    Args:
        inputs: what the graph takes, the symbolic sizes among them.
        shape_env: with the conditions of the graph.
    """
    known = [v for v in inputs if isinstance(v, torch.SymInt) and v.node.has_hint()]
    given = {v.node.expr: v for v in known if v.node.expr.is_symbol}
    hints: Sizes = {symbol: int(v.node.hint) for symbol, v in given.items()}
    others, allowed = dict(hints), _of(shape_env)
    moves = (lambda n: 2 * n, lambda n: n + 1, lambda n: n - 1, lambda n: n + 2, lambda n: 3 * n, lambda n: n // 2,
             lambda n: n + 8, lambda n: 4 * n)  # fmt: skip
    for group in (*_tied(hints, allowed), *([symbol] for symbol in hints)):
        if all(others[symbol] == hints[symbol] for symbol in group):
            new = ({symbol: move(hints[symbol]) for symbol in group} for move in moves)
            choices = (
                others | sizes for sizes in new if all(m > 1 and m != hints[symbol] for symbol, m in sizes.items())
            )
            others = next((c for c in choices if _holds(allowed, c)), others)
    for symbol, v in given.items():
        if others[symbol] == hints[symbol]:
            int(v)  # Dynamo guards what is asked for
    return hints, others


def _tied(hints: Sizes, allowed: list[Any]) -> Iterator[list[Any]]:
    """Sizes that vary together, the larger groups first: equal ones, and those that a condition ties.

    A size that Dynamo knows twice is equal: of a tensor, and as a number from before a graph break. A mask is as long as a
    cache and the new tokens: a condition.
    """
    import networkx as nx  # here, as it takes its time

    graph = nx.Graph()
    graph.add_nodes_from(hints)
    by_size: dict[int, Any] = {}
    graph.add_edges_from((by_size.setdefault(n, symbol), symbol) for symbol, n in hints.items())
    equal = [sorted(group, key=str) for group in nx.connected_components(graph)]
    for condition in allowed:
        symbols = [s for s in condition.free_symbols if s in hints]
        graph.add_edges_from(itertools.pairwise(symbols))
    yield from (sorted(group, key=str) for group in nx.connected_components(graph))
    yield from equal


def _of(shape_env: Any) -> list[Any]:
    import sympy

    found = dict.fromkeys(shape_env.replace(g.expr) for g in shape_env.guards) if shape_env else {}
    return [c for c in found if c not in (sympy.true, True)]


def _holds(allowed: list[Any], sizes: Sizes) -> bool:
    """Whether no condition is known to be broken; one with other symbols may be."""
    import sympy

    try:
        return all(c.xreplace(sizes) not in (sympy.false, False) for c in allowed)
    except ZeroDivisionError:  # a remainder
        return False
