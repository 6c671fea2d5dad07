"""graphs: the graph of the quantized stage as JSON and back.

    %x: f32[s0, 4] = input
    %w: i8[8, 4] = tensor fc.weight_int8
    %to = aten.to.dtype(%w, torch.float32)
->
    {"name": "x", "op": "input", "dtype": "float32", "device": "cpu", "size": ["s0", 4]}
    {"name": "w", "op": "tensor", "target": "fc.weight_int8", "device": "cpu"}
    {"name": "to", "op": "call", "target": "aten.to.dtype", "args": [{"node": "w"}, {"dtype": "float32"}]}

What calls give is not kept: it is computed again from the inputs, so that no size in a file is taken on trust.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from sqcompile.artifact import arguments
from sqcompile.artifact.expressions import checked, evaluated
from sqcompile.artifact.operators import name_of, operator_of
from sqcompile.capture.call_spec import DTYPES, MOST_DIMS
from sqcompile.capture.captured import Captured
from sqcompile.capture.names import fault, is_argument
from sqcompile.errors import ArtifactError
from sqcompile.files.regular import said
from sqcompile.passes.ir.about import About, about, describe_as
from sqcompile.passes.ir.graph import FOLD_CAST, finish, set_tensor, value
from sqcompile.passes.ir.operators import MEETINGS
from sqcompile.passes.ir.origin import PLANNED
from sqcompile.passes.ir.record import record
from sqcompile.process.parallel import ALONE, Parallel
from sqcompile.pytorch.core import FakeTensorMode, codegen, pytree, schema, tree_codegen
from sqcompile.pytorch.distributed import group_name

_MARKS = {"planned": (PLANNED, str), "fold_cast": (FOLD_CAST, bool)}
_MOST_NODES = 2_000_000
_NODE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,999}")
_LONGEST = 10_000  # characters of a tensor's name
_OPS = ("input", "tensor", "call", "output")


def to_json(gm: fx.GraphModule) -> dict[str, Any]:
    """A graph as JSON: its nodes, and the symbols of its inputs' sizes.

    Raises:
        ArtifactError: for an operator or an argument that cannot be saved.
    """
    from sqcompile.pytorch.symbolic import symbols_of

    inputs = [value(n) for n in gm.graph.find_nodes(op="placeholder")]
    env = about(gm).fake_mode.shape_env
    symbols = {} if env is None else symbols_of(env, inputs)
    return {
        "symbols": symbols,
        "nodes": [_node(n) for n in gm.graph.nodes],
        "arguments": codegen(gm.graph).pytree_info.orig_args,
    }


def _node(n: fx.Node) -> dict[str, Any]:
    found: dict[str, Any] = {"name": n.name}
    if n.op == "placeholder":
        return found | {"op": "input"} | _described(value(n))
    if n.op == "get_attr":
        return found | {"op": "tensor", "target": str(n.target), "device": str(value(n).device)}
    if n.op == "output":
        return found | {"op": "output", "args": [arguments.to_json(a) for a in n.args]}
    args = (*n.args[:-1], arguments.GROUP) if n.target in MEETINGS else n.args
    found |= {"op": "call", "target": name_of(n.target), "args": [arguments.to_json(a) for a in args]}
    if n.kwargs:
        found["kwargs"] = {k: arguments.to_json(v) for k, v in n.kwargs.items()}
    marks = {name: n.meta[key] for name, (key, _) in _MARKS.items() if n.meta.get(key)}
    return found | ({"marks": marks} if marks else {})


def _described(v: Any) -> dict[str, Any]:
    from sqcompile.capture.conditions import printed
    from sqcompile.pytorch.symbolic import named_expression

    if not isinstance(v, Tensor):
        return {"constant": True}
    sizes = [printed(named_expression(s)) if isinstance(s, torch.SymInt) else s for s in v.shape]
    return {"dtype": str(v.dtype).removeprefix("torch."), "device": str(v.device), "size": sizes}


def from_json(
    found: Any,
    like: Mapping[str, Tensor],
    calls: Captured,
    out_spec: Any,
    device: Callable[[str], torch.device],
    parallel: Parallel = ALONE,
) -> fx.GraphModule:
    """The graph that JSON is, with recorded values, over tensors without data: they are set later, on the recorded devices.

    Args:
        found: any JSON.
        like: by name, the tensors that the graph may read, on the meta device.
        calls, out_spec: what the graph serves and returns.
        device: what a device of the file is here.
        parallel: the processes that the graph's collectives are of.

    Raises:
        ArtifactError: for JSON that `to_json` does not make.
    """
    from sqcompile.pytorch.symbolic import ShapeEnv, new_symbols

    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    symbols = new_symbols(env, _ranges(found.get("symbols")))
    for condition in calls.conditions:
        if not evaluated(condition, symbols):
            raise ArtifactError(f"its example has sizes for which {condition} does not hold")
    root, graph = nn.Module(), fx.Graph()
    gm = fx.GraphModule(root, graph)
    graph = gm.graph
    describe_as(gm, About(mode, captured=calls, out_spec=out_spec, parallel=parallel))
    nodes: dict[str, fx.Node] = {}
    output: fx.Node | None = None  # which may have the name of an argument
    listed = found.get("nodes")
    if (
        not isinstance(listed, list)
        or len(listed) > _MOST_NODES
        or len(calls.leaves) != sum(_is_input(n) for n in listed)
    ):
        raise ArtifactError("its graph has no list of nodes, or another number of inputs than its calls")
    for n in listed:
        name, op = n.get("name"), n.get("op")
        if (
            op not in _OPS
            or not isinstance(name, str)
            or not _NODE.fullmatch(name)
            or name in nodes
            or output is not None
        ):
            raise ArtifactError(f"its graph has the node {str(n)[:100]}, which is none")
        if op == "input":
            new = graph.create_node("placeholder", name, name=name)
            new.meta["val"] = None if n.get("constant") else _input(n, mode, symbols, device)
        elif op == "tensor":
            target = n.get("target")
            if not isinstance(target, str) or target not in like or len(target) > _LONGEST or fault(target):
                raise ArtifactError(f"its graph reads {str(target)[:100]!r}, which is none of its tensors")
            new = _tensor(gm, name, target, like[target], device(n.get("device")))
        elif op == "output":
            [result] = (arguments.from_json(a, nodes, device) for a in n["args"])
            new = output = graph.output(result)
        else:
            new = _call(gm, n, nodes, device)
        if new.name != name:
            raise ArtifactError(f"its graph has a node of the name {name!r}, which none can have")
        nodes[name] = new
    if output is None or len(pytree.tree_leaves(output.args)) != out_spec.num_leaves:
        raise ArtifactError("its graph returns another number of values than the model does")
    names = found.get("arguments")
    if (
        not isinstance(names, list)
        or not all(isinstance(x, str) and is_argument(x) for x in names)
        or len({*names}) < len(names)
    ):
        raise ArtifactError("its arguments have no names")
    graph.set_codegen(tree_codegen(names, calls.spec, out_spec))
    return finish(gm)


def _is_input(n: Any) -> bool:
    return isinstance(n, dict) and n.get("op") == "input"


def _ranges(found: Any) -> dict[str, tuple[int, int, int | None]]:
    """By symbol, its example, its least and its largest value."""
    good = isinstance(found, dict) and all(
        _NODE.fullmatch(s)
        and isinstance(r, list)
        and [type(x) for x in r[:2]] == [int, int]
        and len(r) == 3
        and (r[2] is None or type(r[2]) is int)
        and 0 <= r[1] <= r[0] < 2**31
        and (r[2] is None or r[0] <= r[2])
        for s, r in found.items()
    )
    if not good:
        raise ArtifactError("its symbols are none")
    return {s: tuple(r) for s, r in found.items()}


def _input(n: Any, mode: Any, symbols: Mapping[str, Any], device: Callable[[str], torch.device]) -> Tensor:
    sizes, dtype = n.get("size"), n.get("dtype")
    if (
        not isinstance(sizes, list)
        or len(sizes) > MOST_DIMS
        or dtype not in DTYPES
        or not isinstance(n.get("device"), str)
    ):
        raise ArtifactError(f"its graph has the input {str(n)[:100]}, which is none")
    shape = [evaluated(checked(s, symbols), symbols) if isinstance(s, str) else s for s in sizes]
    if not all(isinstance(s, torch.SymInt) or (type(s) is int and 0 <= s < 2**48) for s in shape):
        raise ArtifactError(f"its graph has an input of the sizes {sizes}")
    with mode:
        return torch.empty(shape, dtype=DTYPES[dtype], device=device(n["device"]))


def _tensor(gm: fx.GraphModule, name: str, target: str, like: Tensor, device: torch.device) -> fx.Node:
    if hasattr(fx.GraphModule, target.partition(".")[0]):
        raise ArtifactError(f"its graph reads {target!r}, a name that a graph's module has for itself")
    set_tensor(gm, target, like)
    new = gm.graph.create_node("get_attr", target, name=name)
    with about(gm).fake_mode:
        new.meta["val"] = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
    return new


def _call(gm: fx.GraphModule, n: Any, nodes: Mapping[str, fx.Node], device: Callable[[str], torch.device]) -> fx.Node:
    args, kwargs, marks = n.get("args"), n.get("kwargs", {}), n.get("marks", {})
    if not isinstance(args, list) or not isinstance(kwargs, dict) or not all(map(str.isidentifier, kwargs)):
        raise ArtifactError(f"its graph has the call {str(n)[:100]}, which is none")
    if not isinstance(marks, dict) or any(k not in _MARKS or not isinstance(v, _MARKS[k][1]) for k, v in marks.items()):
        raise ArtifactError(f"%{n['name']} of its graph has marks that are none")
    given = [arguments.from_json(a, nodes, device) for a in args]
    named = {k: arguments.from_json(v, nodes, device) for k, v in kwargs.items()}
    target = operator_of(n.get("target"))
    if target in MEETINGS:
        given = _in_group(given, named, target, about(gm).parallel)
    new = gm.graph.create_node("call_function", target, tuple(given), named, name=n["name"])
    new.meta |= {_MARKS[k][0]: v for k, v in marks.items()}
    try:
        record(gm, new)
    except ArtifactError:
        raise
    except Exception as e:
        raise ArtifactError(f"%{n['name']} = {n['target']} of its graph cannot be computed ({said(e)})") from e
    return new


def _in_group(given: list[Any], named: dict[str, Any], target: Any, parallel: Parallel) -> list[Any]:
    """The arguments of a collective, in the group that the graph is loaded for: a file names none."""
    if parallel.count == 1:
        raise ArtifactError("its graph asks other processes: load it in all of them, with device_mesh")
    names = [a.name for a in schema(target).arguments]
    sized = "group_size" not in names or given[names.index("group_size") : -1] == [parallel.count]
    if len(given) != len(names) or named or given[-1] != arguments.GROUP or not sized:
        raise ArtifactError(f"its graph calls {target} in another group than that of its processes")
    return [*given[:-1], group_name(parallel.group)]
