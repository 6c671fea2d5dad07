"""capture: a graph of Dynamo becomes one of ATen operators with parameters under their own names, as `trace` makes it.

    def forward(self, L_self_modules_fc_parameters_weight_, L_x_):
        y = torch.nn.functional.linear(L_x_, L_self_modules_fc_parameters_weight_);  L_cache_.copy_(y)
->
    %y = aten.linear(%x, %fc.weight);  return [%y]          # what the call writes to its inputs comes first
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.backend.scalars import take_floats, tensors_of_floats
from sqcompile.capture.sharded import local_calls
from sqcompile.capture.trace import refuse_nested, tidy
from sqcompile.capture.untouched import assigned_to, written_to
from sqcompile.errors import CaptureError, first_line
from sqcompile.passes.canonical.canonicalize import canonicalize
from sqcompile.passes.ir.about import About, about, attached, describe_as
from sqcompile.passes.ir.explain import source
from sqcompile.passes.ir.graph import aten, clone, finish, get_tensor, set_tensor, value
from sqcompile.passes.ir.operators import LAYOUT
from sqcompile.passes.ir.sizes import conditions, vary
from sqcompile.passes.ir.verify import verify
from sqcompile.passes.labels.rules import behind
from sqcompile.pytorch.core import TracingContext
from sqcompile.pytorch.dynamo import (
    aot_export_module,
    functorch_interpreters,
    get_data,
    pop_functorch_interpreter,
    set_grad_enabled,
)

_FAST_PATH = ("aten._transformer_encoder_layer_fwd.default", "aten._native_multi_head_attention.default")


@dataclass(frozen=True)
class Template:
    """A captured graph whose parameters are still inputs.

    Attributes:
        graph: of ATen operators, functional; a placeholder for each argument of Dynamo's call, then for each tensor
            that Dynamo's graph holds itself.
        held: those tensors.
        updates: the argument that each of the first outputs is written back to.
        fake_mode: of the recorded values.
    """

    graph: fx.GraphModule
    held: tuple[Tensor, ...]
    updates: tuple[int, ...]
    fake_mode: Any


def capture(gm: fx.GraphModule, sharded: bool = False) -> Template:
    """Lowers Dynamo's graph to ATen operators as torch.export would: whole linears, norms and attention.

    Args:
        gm: as Dynamo hands it to a backend, while it compiles; it is not changed.
        sharded: whether it computes with DTensors inside.

    Raises:
        CaptureError: for what the passes cannot work with: nested graphs, training mode, arguments that are no tensors.
    """
    context = TracingContext.try_get()
    mode = context.fake_mode if context else None
    placeholders = gm.graph.find_nodes(op="placeholder")
    fakes = [n.meta["example_value"] for n in placeholders]
    if mode is None or any(not isinstance(f, (Tensor, torch.SymInt)) for f in fakes):
        kinds = sorted({type(f).__name__ for f in fakes if not isinstance(f, (Tensor, torch.SymInt))})
        raise CaptureError(f"the graph takes arguments of type {', '.join(kinds)}: pass tensors and numbers")
    own = fx.GraphModule(gm, fx.Graph())
    own.graph.output(own.graph.graph_copy(gm.graph, {}))
    taken = take_floats(own.graph, fakes)
    for n in list(own.graph.nodes):
        if n.target is set_grad_enabled:  # there are no gradients anyway
            own.graph.erase_node(n)
        elif n.target is get_data:
            n.target = torch.detach  # it shares memory, too, and torch 2.11 cannot lower x.data
    own.recompile()
    for n in own.graph.nodes:
        refuse_nested(n)
        if n.op != "placeholder" and getattr(n.target, "__name__", n.target) == "set_":
            raise assigned_to(source(n))
    try:
        with torch.no_grad(), mode, _transforms_left(), local_calls() if sharded else contextlib.nullcontext():
            exported: Any
            exported, signature = aot_export_module(
                own, taken, trace_joint=False, pre_dispatch=not _has_vmap(own), decompositions={}
            )
    except Exception as e:
        raise CaptureError(
            f"a graph of the model cannot be lowered to ATen operators: {type(e).__name__}: {first_line(e)}"
        ) from e
    describe_as(exported, About(mode))
    _warn_of_fast_path(exported)
    tensors_of_floats(exported)
    about(exported).sizes = vary(fakes, mode.shape_env)
    about(exported).conditions = conditions(exported)
    names = [n.name for n in exported.graph.find_nodes(op="placeholder")]
    held = names[: len(names) - len(fakes)]  # aot_export_module puts what the module holds before its arguments
    tensors = tuple(get_tensor(gm, (signature.inputs_to_parameters | signature.inputs_to_buffers)[n]) for n in held)
    if signature.buffers_to_mutate or signature.parameters_to_mutate:
        output, name = next(iter((signature.parameters_to_mutate | signature.buffers_to_mutate).items()))
        where = next(source(n) for n in exported.graph.nodes if n.name == output)
        raise written_to(name, bool(signature.parameters_to_mutate), where)
    arguments = names[len(held) :]
    updates = tuple(arguments.index(name) for name in signature.user_inputs_to_mutate.values())
    return Template(exported, tensors, updates, mode)


def _warn_of_fast_path(gm: fx.GraphModule) -> None:
    """Says that PyTorch's own operator of a whole encoder layer is left as it is."""
    if any(str(n.target) in _FAST_PATH for n in gm.graph.nodes):
        warnings.warn(
            "nn.TransformerEncoder or nn.MultiheadAttention runs as one operator of PyTorch here, whose linears stay in FLOAT: "
            "call torch.backends.mha.set_fastpath_enabled(False) before the model is compiled",
            stacklevel=2,
        )


def _has_vmap(gm: fx.GraphModule) -> bool:
    return any("vmap_increment_nesting" in getattr(n.target, "__name__", "") for n in gm.graph.nodes)


@contextlib.contextmanager
def _transforms_left() -> Iterator[None]:
    """Leaves the transforms (vmap) that a graph enters and, where it fails between, does not leave: Dynamo guards them."""
    before = len(functorch_interpreters())
    try:
        yield
    finally:
        for _ in functorch_interpreters()[before:]:
            pop_functorch_interpreter()


def refuse_writes(template: Template, examples: Sequence[Any], name: Callable[[int], str]) -> None:
    """Refuses a graph that writes to a parameter, or to what shares storage with one.

    Args:
        template: the captured graph.
        examples: the arguments of Dynamo's call.
        name: of the argument at a position.

    Raises:
        CaptureError: naming the parameter and the line.
    """
    home = {x.untyped_storage().data_ptr(): i for i, x in enumerate(examples) if isinstance(x, torch.nn.Parameter)}
    results = next(iter(reversed(template.graph.graph.nodes))).args[0]
    for position, new in zip(template.updates, results, strict=False):
        found = home.get(examples[position].untyped_storage().data_ptr())
        if found is not None:
            raise written_to(name(found), True, source(new))


def attach(template: Template, constants: dict[int, tuple[str, Tensor]], aliases: Any) -> fx.GraphModule:
    """A traced graph, as the passes want it, with tensors in place of some arguments.

    Args:
        template: the captured graph.
        constants: qualified name and tensor by position of the argument; held tensors follow the arguments.
        aliases: all names of each tensor of the model, see `trace`.

    Returns:
        A GraphModule; ``About.arguments`` are the positions of the arguments that are left, ``About.updates`` the
        placeholder that each of the first outputs is written back to.
    """
    graph: Any = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(template.graph.graph, env))
    root = torch.nn.Module()
    for n in graph.find_nodes(op="get_attr"):  # numbers that the model's code makes tensors of
        tensor = get_tensor(template.graph, str(n.target)).detach()
        set_tensor(root, str(n.target), tensor)
        n.meta["val"] = template.fake_mode.from_tensor(tensor, static_shapes=True)
    placeholders = template.graph.graph.find_nodes(op="placeholder")
    held = len(template.held)
    order = placeholders[held:] + placeholders[:held]  # arguments first
    left = []
    for i, old in enumerate(order):
        node = env[old]
        if i not in constants:
            left.append((i, node))
            continue
        name, tensor = constants[i]
        set_tensor(root, name, tensor)
        with graph.inserting_before(node):
            get = graph.get_attr(name)
        get.meta["val"] = value(old)
        node.replace_all_uses_with(get)
        graph.erase_node(node)
    gm = fx.GraphModule(root, graph)
    left_over, updates = [i for i, _ in left], [env[order[i]].name for i in template.updates]
    describe_as(gm, attached(about(template.graph), aliases=aliases, arguments=left_over, updates=updates))
    tidy(gm)
    canonicalize(gm)
    tidy(gm)  # casts that canonicalize has spelled as such
    gm.graph.eliminate_dead_code()
    return verify(finish(clone(gm)), "traced")  # before anything runs it


def write_back(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph with what it writes to its inputs written, and the other outputs left. Changes it in place.

    A value is written as soon as nothing reads the old one: a KV cache in the block whose keys it gets.
    """
    updates = about(gm).updates
    nodes = {n.name: n for n in gm.graph.find_nodes(op="placeholder")}
    output = next(iter(reversed(gm.graph.nodes)))
    results = list(output.args[0])
    written: dict[fx.Node, fx.Node] = {}
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    for name, new in zip(updates, results, strict=False):
        early = new.op == "call_function" and _last_read(nodes[name], order) <= order[new]
        with gm.graph.inserting_after(new) if early else gm.graph.inserting_before(output):
            written[new] = gm.graph.call_function(aten.copy_.default, (nodes[name], new))
            written[new].meta["val"] = value(nodes[name])
    with gm.graph.inserting_before(output):
        output.args = (tuple(_view_of_written(gm, r, written) for r in results[len(updates) :]),)
    gm.recompile()
    return gm


def _last_read(node: fx.Node, order: dict[fx.Node, int]) -> int:
    """The position of the last call that reads a node, or a view of it."""
    reads = [-1]
    for u in node.users:
        if u in order:  # not a write that was added
            reads.append(max(order[u], _last_read(u, order) if u.target in LAYOUT else -1))
    return max(reads)


def _view_of_written(gm: fx.GraphModule, result: Any, written: dict[fx.Node, fx.Node]) -> Any:
    """An output that is a view of a new value, as a view of the input which holds that value now."""
    if not isinstance(result, fx.Node) or result in written:
        return written.get(result, result) if isinstance(result, fx.Node) else result
    if behind(result, LAYOUT) not in written:
        return result
    new = gm.graph.node_copy(result)
    new.update_arg(0, _view_of_written(gm, result.args[0], written))
    return new
