"""regions: a lowered graph as calls of its repeated blocks, so that one block is compiled for all of its kind.

    %n0 = rms_norm(%x, [4], %g0)
    %y0 = linear(%n0, %w0)
    %h0 = add(%x, %y0)
    %n1 = rms_norm(%h0, [4], %g1)
    %y1 = linear(%n1, %w1)
    %h1 = add(%h0, %y1)
->
    %region_0 = region_0(%x)                                # with g0 and w0
    %getitem = getitem(%region_0, 0)
    %region_1 = region_1(%getitem)                          # the same code, with g1 and w1
    %getitem_1 = getitem(%region_1, 0)
->                                                          # that code
    %n0 = rms_norm(%input_0, [4], %constant_0)
    %y0 = linear(%n0, %constant_1)
    %h0 = add(%input_0, %y0)

Blocks are found by what the nodes do, not by the modules they came from: the longest stretch of the graph that goes on
as it did p nodes before. It is cut where the fewest tensors pass. What is before and after stays as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.errors import StageError
from sqcompile.passes.ir.about import About, about, copy_about, describe_as
from sqcompile.passes.ir.graph import add_op, aten, get_tensor, set_tensor, value
from sqcompile.passes.ir.sizes import conditions
from sqcompile.pytorch.core import LazyGraphModule


@dataclass(frozen=True)
class Region:
    """A part of a graph, as a graph of its own.

    Attributes:
        gm: takes ``inputs``, then ``constants``; gives a list of ``outputs``.
        inputs, outputs: nodes of the whole graph.
        constants: tensors lifted to inputs, because parts of the same key differ only in them; empty for a part that holds its own.
        key: equal for parts that differ in the values of their constants alone; None for a part that holds its own.
    """

    gm: fx.GraphModule
    inputs: list[fx.Node]
    outputs: list[fx.Node]
    constants: list[Tensor]
    key: str | None


class Part(torch.nn.Module):
    """What the whole graph calls: a region's graph, or what it was compiled to, and its constants."""

    def __init__(self, region: Region, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run, self._constants = run, tuple(region.constants)

    def forward(self, *inputs: Any) -> Any:
        return self.run(*inputs, *self._constants)


def find_repeats(gm: fx.GraphModule) -> list[list[fx.Node]]:
    """The repeated blocks, in order: lists of calls, one after the other in the graph; none if nothing repeats."""
    nodes = _calls(gm)
    does = [_does(n) for n in nodes]
    best = (0, 0, 0)  # nodes covered, minus the period, where it begins
    for anchor in {len(nodes) * i // 8 for i in range(1, 8)}:
        for period in (j - anchor for j in range(anchor + 1, len(nodes)) if does[j] == does[anchor]):
            start, length = _longest(does, period)
            if length >= period:
                best = max(best, (length + period, -period, start))
    length, period, start = best[0], -best[1], best[2]
    if not length:
        return []
    shift = min(range(period), key=lambda i: (_crossing(nodes[start + i : start + i + period]), i))
    first, end = start + shift, start + length
    return [nodes[i : i + period] for i in range(first, end - period + 1, period)]


def _calls(gm: fx.GraphModule) -> list[fx.Node]:
    """All calls but those that read the size of an input, which any part can be given."""
    return [n for n in gm.graph.nodes if n.op == "call_function" and not _reads_input_size(n)]


def _reads_input_size(n: fx.Node) -> bool:
    return n.target == aten.sym_size.int and n.all_input_nodes[0].op == "placeholder"


def _does(node: fx.Node) -> Hashable:
    """What a call computes, whatever it reads: operator, numbers among its arguments, dtypes and fixed sizes."""
    args = fx.node.map_arg((node.args, node.kwargs), lambda n: "constant" if n.op == "get_attr" else "data")
    data = (n for n in node.all_input_nodes if n.op != "get_attr")
    return str(node.target), repr(args), _like(value(node)), *(_like(value(n)) for n in data)


def _like(v: Any) -> Hashable:
    if isinstance(v, (tuple, list)):
        return tuple(map(_like, v))
    return (v.dtype, tuple(n if isinstance(n, int) else None for n in v.shape)) if isinstance(v, Tensor) else None


def _longest(does: Sequence[Hashable], period: int) -> tuple[int, int]:
    """Where the longest run of ``does[i] == does[i + period]`` begins, and its length."""
    best, start = (0, 0), 0
    for i in range(len(does) - period + 1):
        if i == len(does) - period or does[i] != does[i + period]:
            best, start = max(best, (start, i - start), key=lambda r: r[1]), i + 1
    return best


def _crossing(block: list[fx.Node]) -> int:
    """How many of a block's results are read behind it; those that the graph returns count for nothing.

    An operator of several results is not cut from its results, which is more than any number.
    """
    inside = set(block)
    crossing = [n for n in block if any(u not in inside and u.op != "output" for u in n.users)]
    return sum(len(block) if isinstance(value(n), (tuple, list)) else 1 for n in crossing)


def cut(gm: fx.GraphModule, blocks: list[list[fx.Node]]) -> tuple[fx.GraphModule, dict[str, Region]]:
    """A graph that calls parts of the given one, and these parts by the name of the submodule that is called.

    Args:
        gm: with flat inputs and a flat tuple of outputs; it is not changed but for sizes that are read from inputs.
        blocks: stretches of calls, one after the other: each becomes a region whose constants are inputs. What is before
            and after them becomes one each, which keeps its constants. No blocks: all is one region without constants.

    Raises:
        StageError: for a symbolic size that no input has, which depends on values.
    """
    sizes = _sizes(gm)
    calls = _calls(gm)
    if blocks:
        first, last = calls.index(blocks[0][0]), calls.index(blocks[-1][-1]) + 1
        parts = [(calls[:first], False), *((b, True) for b in blocks), (calls[last:], False)]
    else:
        parts = [(calls, True)]
    root, graph = torch.nn.Module(), fx.Graph()
    env: dict[fx.Node, fx.Node] = {n: graph.node_copy(n) for n in gm.graph.find_nodes(op="placeholder")}
    regions: dict[str, Region] = {}

    def outer(n: fx.Node) -> fx.Node:
        if n not in env:  # the size of an input, or a constant that is returned as it is
            if n.op == "get_attr":
                set_tensor(root, str(n.target), get_tensor(gm, str(n.target)))
            env[n] = graph.node_copy(n, outer)
        return env[n]

    for nodes, lift in parts:
        if not nodes:
            continue
        name = f"region_{len(regions)}"
        region = regions[name] = _extract(gm, nodes, lift, sizes)
        root.add_module(name, Part(region, region.gm))
        call = graph.call_module(name, tuple(outer(n) for n in region.inputs))
        for i, n in enumerate(region.outputs):
            env[n] = graph.call_function(operator.getitem, (call, i))
            env[n].meta["val"] = value(n)
    [output] = gm.graph.find_nodes(op="output")
    graph.output(fx.node.map_arg(output.args[0], outer))
    result = fx.GraphModule(root, graph)
    copy_about(gm, result)
    return result, regions


def _extract(gm: fx.GraphModule, nodes: list[fx.Node], lift: bool, sizes: dict[Any, fx.Node]) -> Region:
    """Some calls as a graph of their own."""
    inside = set(nodes)
    inputs: dict[fx.Node, None] = {}
    held: dict[fx.Node, None] = {}
    for n in nodes:
        for a in n.all_input_nodes:
            if a not in inside:
                (held if a.op == "get_attr" else inputs)[a] = None
    bound = _plain_symbols(inputs)
    for s in sorted({s for n in inputs for s in _symbols(value(n))} - bound - sizes.keys(), key=str):
        raise StageError(f"the size {s} depends on values, and a region cannot be told it: leave regional out")
    wanted = {s: None for n in (*inputs, *nodes) for s in sorted(_symbols(value(n)), key=str)}
    for s in wanted:
        if s in sizes and s not in bound:  # others come to be in this part
            inputs[sizes[s]] = None
    outputs = [n for n in nodes if any(u not in inside for u in n.users)]
    root, graph, env, mode = torch.nn.Module(), fx.Graph(), {}, about(gm).fake_mode
    for i, n in enumerate(inputs):
        env[n] = graph.placeholder(f"input_{i}")
        env[n].meta["val"] = value(n)
    constants = [get_tensor(gm, str(n.target)) for n in held]
    for i, (n, tensor) in enumerate(zip(held, constants, strict=True)):
        if lift:
            env[n] = graph.placeholder(f"constant_{i}")
            # what the tensor is, which need not be as it was recorded: a copy of a view is dense
            env[n].meta["val"] = tensor if tensor.is_mkldnn else mode.from_tensor(tensor, static_shapes=True)
        else:
            set_tensor(root, str(n.target), tensor)
            env[n] = graph.node_copy(n)
    for n in nodes:
        env[n] = graph.node_copy(n, env.__getitem__)
    graph.output([env[n] for n in outputs])
    part = LazyGraphModule(root, graph)  # of equal ones, one is compiled
    describe_as(part, About(mode, conditions=conditions(gm)))
    return Region(part, list(inputs), outputs, constants if lift else [], _key(part) if lift else None)


def _key(gm: fx.GraphModule) -> str:
    """A graph in words, without names: equal graphs have one code. Symbols are numbered as they appear.

    Inputs are in it with sizes, strides, and what is known of their symbols: ranges and conditions, which Inductor makes use of.
    """
    env = about(gm).fake_mode.shape_env
    ranges = env.var_to_range if env else {}
    number = {n: f"%{i}" for i, n in enumerate(gm.graph.nodes)}
    symbols: dict[Any, Any] = {}
    lines: list[str] = []

    def size(x: Any) -> str:
        expression = x.node.expr if isinstance(x, (torch.SymInt, torch.SymFloat, torch.SymBool)) else x
        for s in sorted(getattr(expression, "free_symbols", ()), key=str):
            if s not in symbols:
                symbols[s] = type(s)(f"d{len(symbols)}", integer=True)
                lines.append(f"{symbols[s]} in {ranges.get(s)}")
        return str(expression.xreplace(symbols)) if hasattr(expression, "xreplace") else str(expression)

    def like(v: Any) -> str:
        if isinstance(v, Tensor) and v.is_mkldnn:
            return f"packed {v.dtype} {list(v.shape)}"
        if isinstance(v, Tensor):
            return f"{v.dtype} {v.device} {[size(n) for n in v.shape]} {[size(n) for n in v.stride()]}"
        return str([like(x) for x in v]) if isinstance(v, (list, tuple)) else size(v)

    for n in gm.graph.nodes:
        args = fx.node.map_aggregate(
            (n.args, n.kwargs),
            lambda a: number[a] if isinstance(a, fx.Node) else size(a) if isinstance(a, torch.SymInt) else a,
        )
        target = "" if n.op == "placeholder" else n.target
        lines.append(f"{n.op} {target} {args!r} {like(value(n)) if n.op != 'output' else ''}")
    known = [c for c in conditions(gm) if c.free_symbols and c.free_symbols <= symbols.keys()]
    lines += sorted(str(c.xreplace(symbols)) for c in known)
    return "\n".join(lines)


def _sizes(gm: fx.GraphModule) -> dict[Any, fx.Node]:
    """Nodes that hold the symbolic sizes of a graph's inputs; made from an input's shape where there is none."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    known = {value(n).node.expr: n for n in placeholders if isinstance(value(n), torch.SymInt)}
    for n in gm.graph.nodes:
        if _reads_input_size(n):
            known.setdefault(value(n).node.expr, n)
    for n in placeholders:
        for d, size in enumerate(value(n).shape if isinstance(value(n), Tensor) else ()):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol and size.node.expr not in known:
                with gm.graph.inserting_after(placeholders[-1]):
                    known[size.node.expr] = add_op(gm, aten.sym_size.int, n, d)
    return known


def _symbols(v: Any) -> set[Any]:
    if isinstance(v, (list, tuple)):
        return {s for x in v for s in _symbols(x)}
    if isinstance(v, Tensor):
        return set() if v.is_mkldnn else _symbols([*v.shape, *v.stride(), v.storage_offset()])
    return v.node.expr.free_symbols if isinstance(v, (torch.SymInt, torch.SymFloat, torch.SymBool)) else set()


def _plain_symbols(nodes: Iterable[fx.Node]) -> set[Any]:
    """Symbols that are a size of one of the tensors, or one of the numbers, as they are."""
    found = set()
    for n in nodes:
        v = value(n)
        for size in v.shape if isinstance(v, Tensor) else (v,):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                found.add(size.node.expr)
    return found
