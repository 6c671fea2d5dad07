"""Graphs written as text, and passes shown as text: what the golden tests are made of.

A graph is written as `show` prints it, so that a test's input, its expected output and the example in a pass's docstring
are of one language, and node names do not depend on the version of torch.export:

    gm = graph('''
        %x: f32[2, 3, 4] = input
        %n = aten.layer_norm(%x, [4], %g)
        %q = aten.linear(%n, %wq)
        return %q
    ''', {"g": [4], "wq": [6, 4]})
"""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from sqcompile import Recipe
from sqcompile.kernels.cpu import x86
from sqcompile.kernels.targets import Target
from sqcompile.passes.ir.about import About, describe_as
from sqcompile.passes.ir.graph import clone, find_linears, set_tensor, value
from sqcompile.passes.ir.record import record
from sqcompile.passes.ir.text import _DTYPES, show
from sqcompile.passes.ir.verify import verify
from sqcompile.passes.rewrite.insert_qdq import insert_qdq
from sqcompile.plan.plan import LayerPlan, Plan

# What a symbolic size is in the capture, and in a run: sizes that no constant has.
SYMBOLS = {"s0": 5, "s1": 7, "s2": 11}
HAS_VNNI = x86.available()
ONE_STEP = 1 / 127  # of INT8, relative to the largest value
_DTYPE_OF = {short: dtype for dtype, short in _DTYPES.items()}
_WORDS = {str(d).removeprefix("torch."): d for d in _DTYPES} | {"inf": float("inf")}
_PYTHON = {"getitem": operator.getitem, "neg": operator.neg}


def graph(
    text: str, tensors: Mapping[str, Tensor | Sequence[int]] | None = None, device: str = "cpu"
) -> fx.GraphModule:
    """The graph that a text describes.

    Args:
        text: in the syntax of `show`; the types of calls may be left out, and strings stand in quotes. A size s0, s1 or
            s2 is symbolic.
        tensors: by qualified name, or a shape, which stands for random float32 values; every shape has values of its own.
        device: of the inputs; fake values need no such device.
    """
    gm = fx.GraphModule(torch.nn.Module(), fx.Graph())
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    describe_as(gm, About(mode))
    for i, (name, given) in enumerate((tensors or {}).items()):
        set_tensor(gm, name, given if isinstance(given, Tensor) else _random(given, i))
    nodes: dict[str, fx.Node] = {}

    def node(name: str) -> fx.Node:
        if name not in nodes:
            nodes[name] = gm.graph.get_attr(name)
            nodes[name].meta["val"] = mode.from_tensor(gm.get_buffer(name), static_shapes=True)
        return nodes[name]

    for line in filter(None, map(str.strip, text.splitlines())):
        left, _, right = line.partition(" = ")
        if line.startswith("return "):
            gm.graph.output(_arguments(line.removeprefix("return "), node)[0][0])
        elif right == "input":
            name, _, kind = left.removeprefix("%").partition(": ")
            nodes[name] = gm.graph.placeholder(name)
            nodes[name].meta["val"] = _fake(mode, kind, device)
        else:
            name, (target, _, rest) = left.removeprefix("%").partition(":")[0], right.partition("(")
            args, kwargs = _arguments(rest.removesuffix(")"), node)
            nodes[name] = gm.graph.create_node("call_function", _operator(target, args, kwargs), args, kwargs, name)
            record(gm, nodes[name])
            assert nodes[name].name == name, f"%{name} is a name that fx does not leave as it is"
    gm.graph.lint()
    gm.recompile()
    return gm


def before_after(rewrite: Callable[[fx.GraphModule], Any], gm: fx.GraphModule) -> tuple[str, fx.GraphModule]:
    """A rewrite as text, and the graph it made: in a copy, where the rewrite works in place."""
    before, given = show(gm), clone(gm)
    made = rewrite(given)
    if not isinstance(made, fx.GraphModule):
        made = given
        made.graph.eliminate_dead_code()
        made.recompile()
    made.graph.lint()
    return f"before:\n{before}\nafter:\n{show(made)}\n", made


def only_after(text: str) -> str:
    """The second half of what `before_after` gives."""
    return text.partition("after:\n")[2]


def inputs_of(gm: fx.GraphModule, seed: int = 0) -> list[Tensor]:
    """Random inputs of the graph's dtypes, on the CPU: floats, and numbers 0 to 7."""
    generator, found = torch.Generator().manual_seed(seed), []
    for n in gm.graph.find_nodes(op="placeholder"):
        v = value(n)
        shape = [s.node.hint if isinstance(s, torch.SymInt) else s for s in v.shape]
        if v.dtype.is_floating_point:
            found.append(torch.randn(shape, generator=generator).to(v.dtype))
        else:
            found.append(torch.randint(0, 2 if v.dtype == torch.bool else 8, shape, generator=generator).to(v.dtype))
    return found


def difference(a: fx.GraphModule, b: fx.GraphModule, inputs: Sequence[Tensor] | None = None) -> float:
    """The largest difference of what two graphs give, relative to the largest value; they write to no input."""
    x = inputs_of(a) if inputs is None else inputs
    with torch.no_grad():
        ours, theirs = (pytree.tree_leaves(gm(*[t.clone() for t in x])) for gm in (a, b))
    worst = 0.0
    for y, z in zip(ours, theirs, strict=True):
        assert y.shape == z.shape and y.dtype == z.dtype
        worst = max(worst, float((y.double() - z.double()).abs().max() / y.double().abs().max()))
    return worst


def planned(gm: fx.GraphModule, scales: dict[str, Tensor] | None = None, **changes: Any) -> Plan:
    """A plan that quantizes every linear, and smooths nothing but what it has scales for."""
    layers = tuple(LayerPlan(l.name, "linear", True, "none", "", shape=l.shape) for l in find_linears(gm))
    return Plan(**{"recipe": Recipe(), "call": None, "scales": scales or {}, "layers": layers, **changes})


def quantized(gm: fx.GraphModule, plan: Plan) -> str:
    """`insert_qdq` as text; the result is near that in float: four steps of INT8, of sums of a few products."""
    text, made = before_after(lambda g: verify(insert_qdq(g, plan), "quantized"), gm)
    assert 0 < difference(gm, made) <= 4 * ONE_STEP
    return text


def expression(gm: fx.GraphModule) -> str:
    """What a small graph returns as one nested expression, without namespaces."""
    lines = dict(re.findall(r"%(\w+): .+? = (.+)", show(gm)))

    def spell(text: str) -> str:
        return re.sub(r"%([\w.]+)", lambda m: m[0] if lines.get(m[1], "input") == "input" else spell(lines[m[1]]), text)

    return spell(show(gm).splitlines()[-1].removeprefix("return ")).replace("aten.", "")


def said(x: Any) -> str:
    """Data as text: of a dataclass what is not as by default, nodes with a %, tensors as lists."""
    if dataclasses.is_dataclass(x):
        changed = [f for f in dataclasses.fields(x) if not _is_default(f, getattr(x, f.name))]
        return f"{type(x).__name__}({', '.join(f'{f.name}={said(getattr(x, f.name))}' for f in changed)})"
    if isinstance(x, Tensor):
        return said(x.tolist())
    if isinstance(x, (list, tuple)):
        return "[" + ", ".join(map(said, x)) + "]"
    if isinstance(x, dict):
        return "{" + ", ".join(f"{k}: {said(v)}" for k, v in x.items()) + "}"
    return f"%{x.name}" if isinstance(x, fx.Node) else f"{x:.6g}" if isinstance(x, float) else str(x)


def _is_default(f: dataclasses.Field[Any], x: Any) -> bool:
    default = f.default_factory() if callable(f.default_factory) else f.default
    return type(x) is type(default) and bool(x == default)


def untrue(module: ModuleType, text: str) -> list[str]:
    """The lines of the example in a module's docstring that a golden text does not have.

    A line that is indented further continues the one before; comments are not compared.
    """
    short = re.sub(r"(%\w+?)_(default|tensor|dtype|int|dim|self)(?=_\d+\b|\b)", r"\1", text)  # %mul_tensor_1: %mul_1
    have = {_brief(line) for line in short.splitlines()}
    whole = re.sub(r"\n {8,}", " ", str(module.__doc__))
    example = [line for line in whole.splitlines() if line.startswith("    ")]
    told = [_brief(line) for line in example if re.search(r"%|\[[:c]|\w\(", line) and "diag(" not in line]
    assert told, f"{module.__name__} has no example"
    return [line for line in told if line not in have]


def _brief(line: str) -> str:
    """A line without types, namespaces and comment."""
    line = re.sub(r"\s+# .*", "", line.strip()).replace("aten.", "")
    return " ".join(re.sub(r"^(%[\w.]+): .+? = ", r"\1 = ", line).split())


def target_for(machine: str) -> Target:
    """A target of each kind: "reference" without INT8 kernels, "x86" with VNNI, or "gpu"."""
    target = Target.named({"reference": "reference", "x86": "x86-vnni", "gpu": "cuda-sm90"}[machine])
    if machine == "x86" and not HAS_VNNI:  # the text needs no packed weight
        return dataclasses.replace(target, pack=lambda w: (w, w.sum(dim=1, dtype=torch.int32)))
    return target


def int8(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(2), dtype=torch.int8)


def scales(*shape: int) -> Tensor:
    """float32, 0.1 to 1.1."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3)) + 0.1


def _random(shape: Sequence[int], seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(100 + seed))


def _arguments(text: str, node: Callable[[str], fx.Node]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    source = re.sub(r"%([\w.]+)", r"_node('\1')", text)
    return eval(f"_both({source})", {**_WORDS, "_node": node, "_both": lambda *args, **kwargs: (args, kwargs)})


def _operator(target: str, args: Any, kwargs: Any) -> Any:
    """The overload that PyTorch would choose for these arguments."""
    if target in _PYTHON:
        return _PYTHON[target]
    namespace, _, name = target.partition(".")
    packet = getattr(getattr(torch.ops, namespace), name)
    if len(packet.overloads()) == 1:
        return getattr(packet, packet.overloads()[0])
    values, named = fx.node.map_arg((args, kwargs), value)
    return getattr(packet, torch._C._jit_resolve_packet(packet._qualified_op_name, *values, **named) or "default")


def _fake(mode: FakeTensorMode, kind: str, device: str) -> Any:
    dtype, _, rest = kind.partition("[")
    sizes = [s for s in rest.removesuffix("]").split(", ") if s]
    real = torch.empty([SYMBOLS.get(s) or int(s) for s in sizes], dtype=_DTYPE_OF[dtype], device="meta")
    dims = [DimDynamic.DUCK if s in SYMBOLS else DimDynamic.STATIC for s in sizes]
    with mode:
        on_device = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device=device)
    if not SYMBOLS.keys() & set(sizes):
        return on_device
    return mode.from_tensor(
        torch.empty(real.shape, dtype=real.dtype), symbolic_context=StatelessSymbolicContext(dynamic_sizes=dims)
    )
