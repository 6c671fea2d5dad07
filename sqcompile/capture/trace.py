"""trace: nn.Module -> GraphModule of ATen ops, whole as torch.export leaves them (linear, layer_norm, attention).

Before:  class Net(nn.Module): forward = lambda self, x: self.fc(x)
After:   %y = aten.linear(%x, %fc_weight, %fc_bias)

The graph's tensors are detached aliases of the model's own: same storage, never written to by any pass.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from sqcompile.capture.captured import captured
from sqcompile.capture.containers import refuse_containers, register_kv_cache_pytree
from sqcompile.capture.dynamic_axes import dims_of, find_lengths, grown, pinned
from sqcompile.capture.inputs import Call
from sqcompile.capture.names import refuse_arguments, refuse_names
from sqcompile.capture.sharded import as_local, parallel_of
from sqcompile.capture.untouched import keeps_parameters, kept_from_writes, left_alone, refuse_writes, written_to
from sqcompile.errors import CaptureError
from sqcompile.passes.canonical.canonicalize import canonicalize, drops
from sqcompile.passes.canonical.functionalize import functionalize
from sqcompile.passes.ir.about import About, about, describe_as
from sqcompile.passes.ir.explain import check_shapes, export_error, nested_hint, one_error, source
from sqcompile.passes.ir.graph import aten, clone, finish, is_mutable, set_tensor, value
from sqcompile.passes.ir.operators import DROPOUTS
from sqcompile.passes.ir.verify import verify
from sqcompile.pytorch.core import HigherOrderOperator, codegen, pytree

# What export leaves to check at run time; none of it computes anything.
_CHECKS = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten._assert_async.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}


def trace(model: nn.Module, call: Call, dynamic_shapes: Any = "auto") -> fx.GraphModule:
    """Captures the model as called.

    Args:
        model: any module torch.export can capture, in eval mode.
        call: an example call; only shapes, dtypes and constants matter.
        dynamic_shapes: ``"auto"`` makes batch and sequence of every input dynamic where the model allows it, None
            makes every shape static, anything else goes to torch.export as it is.

    Returns:
        A GraphModule with the model's own signature and output type. Its record (`About`) says what calls it serves, and
        what the pytree of its result is.

    Raises:
        CaptureError: if the model cannot be exported (names the operation, the line and what to try), or if it
            is in training mode with dropout or batch statistics.
    """
    register_kv_cache_pytree()
    refuse_containers(call)
    refuse_arguments(call.kwargs)
    given = [x for x in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(x, Tensor)]
    if sparse := [x.layout for x in given if x.layout != torch.strided]:
        raise CaptureError(f"an argument is a tensor of the layout {sparse[0]}: pass it dense, x.to_dense()")
    if not all(x.is_contiguous() for x in given):
        args, kwargs = pytree.tree_map_only(Tensor, Tensor.contiguous, (call.args, call.kwargs))
        call = replace(call, args=args, kwargs=kwargs)
    exported = _export(model, call, dynamic_shapes)
    _refuse_training(exported.graph)
    gm = _module(exported)
    if any(is_mutable(n.target) for n in exported.graph.nodes):
        refuse_writes(exported)
        if not functionalize(gm):
            gm = _module(_decomposed(exported))
    info = codegen(gm.graph).pytree_info
    given = pytree.tree_leaves((call.args, call.kwargs))
    inputs = [value(n) for n in gm.graph.find_nodes(op="placeholder")]
    found = captured(info.in_spec, given, inputs, about(gm).fake_mode.shape_env, dynamic_shapes)
    about(gm).captured = replace(found, ignored=call.ignored)
    if (env := about(gm).fake_mode.shape_env) is not None:
        env.tracked_fakes = []  # for guards, which are made: fake tensors keep their ShapeEnv, in a way Python cannot see
    about(gm).out_spec = info.out_spec
    about(gm).aliases, about(gm).parallel = aliases(model), parallel_of(model)
    canonicalize(gm)
    gm.graph.eliminate_dead_code()
    return verify(finish(clone(gm)), "traced")  # before anything runs it


def _module(exported: torch.export.ExportedProgram) -> fx.GraphModule:
    """The program as a module with tensors of its own, detached aliases, and with recorded values.

    Raises:
        CaptureError: if it reads what is no tensor, or takes none, or for names that it cannot have.
    """
    refuse_names([*exported.state_dict, *exported.constants])
    gm = exported.module(check_guards=False)
    tidy(gm)
    check_shapes(gm)
    gm = fx.GraphModule(gm, gm.graph)  # drops export's input checks, which pin what the example had
    for n in gm.graph.find_nodes(op="get_attr"):
        obj: Any = gm
        for part in str(n.target).split("."):
            obj = getattr(obj, part)
        if not isinstance(obj, Tensor):
            raise CaptureError(
                f"the graph reads a {type(obj).__name__} at {source(next(iter(n.users)))}. What to try: compute it outside "
                "forward, or compile a submodule"
            )
        set_tensor(gm, str(n.target), obj.detach())
    fakes = [value(n) for n in gm.graph.find_nodes(op="placeholder") if isinstance(value(n), Tensor)]
    if not fakes:
        raise CaptureError("the model takes no tensor: pass example_inputs with at least one")
    describe_as(gm, About(fakes[0].fake_mode))
    for n in gm.graph.find_nodes(op="get_attr"):
        n.meta["val"] = fakes[0].fake_mode.from_tensor(gm.get_buffer(str(n.target)), static_shapes=True)
    return gm


def tidy(gm: fx.GraphModule) -> None:
    """Removes run-time checks, casts to the dtype there is and views of the shape there is, in place.

    Raises:
        CaptureError: for a nested graph, or a model in training mode.
    """
    for n in list(gm.graph.nodes):
        if n.target in _CHECKS:
            gm.graph.erase_node(n)
        elif n.target == aten.to.dtype and value(n).dtype == value(n.args[0]).dtype and len(n.args) == 2:
            n.replace_all_uses_with(n.args[0])  # a cast to the dtype it has
        elif n.target == aten.view_as.default and n.args[0] is n.args[1]:
            n.replace_all_uses_with(n.args[0])  # how autograd leaves a tensor as it is, such as DTensor.to_local
        else:
            refuse_nested(n)
    _refuse_training(gm.graph)


def refuse_nested(n: fx.Node) -> None:
    """Raises CaptureError for a node that is a graph of its own."""
    if "wrap_with" in str(n.target) or isinstance(n.target, HigherOrderOperator):
        raise CaptureError(
            f"{n.target} is a nested graph, which sqcompile does not enter, at {source(n)}. What to try: "
            f"{nested_hint(str(n.target))}"
        )


def _export(model: nn.Module, call: Call, dynamic_shapes: Any) -> torch.export.ExportedProgram:
    if not isinstance(dynamic_shapes, str) or dynamic_shapes != "auto":
        return _attempts(model, call, [(call, lambda _: dynamic_shapes)])
    lengths = find_lengths(model, call)
    if lengths:
        example = grown(call, lengths)
        with contextlib.suppress(CaptureError):
            exported = _attempts(model, call, [(example, functools.partial(dims_of, call=example, lengths=lengths))])
            fixed = pinned(exported, lengths)
            if not fixed:
                return exported
            lengths -= fixed
    # Sizes of the model's own choosing are tried last: some models accept no other.
    examples = (grown(call, lengths), grown(call, lengths, across=True), call)
    return _attempts(model, call, [(x, functools.partial(dims_of, call=x, lengths=lengths)) for x in examples])


def _attempts(model: nn.Module, call: Call, examples: list[tuple[Call, Any]]) -> torch.export.ExportedProgram:
    """The program of the first example, with what makes its ``dynamic_shapes``, that can be exported."""
    inference = _in_inference_mode(model)
    error: Exception | None = None
    for fixed in _fixed(model, call):
        view = _as_called(model, call, fixed)
        for example, shapes in examples:
            try:
                with torch.inference_mode(inference), torch.no_grad(), one_error(), as_local(model), left_alone(model):
                    return torch.export.export(
                        view, example.args, example.kwargs, dynamic_shapes=shapes(view), strict=False
                    )
            except CaptureError:
                raise
            except Exception as e:
                error = e
    assert error is not None
    raise export_error(model, error, sizes_are_open=any(shapes(view) is not None for _, shapes in examples)) from error


def _in_inference_mode(model: nn.Module) -> bool:
    """Whether the model runs in inference mode: parameters that were made in it are refused outside."""
    return torch.is_inference_mode_enabled() or any(p.is_inference() for p in model.parameters())


def run_as_captured(model: nn.Module, call: Call) -> Any:
    """What the model itself gives for a call, without a KV cache that nobody asks for, as in `trace`; it is left as it was.

    Raises:
        CaptureError: if it writes to what it keeps, or to its inputs.
        Exception: what the model raises.
    """
    fixed = _fixed(model, call)[0]
    args, kwargs = pytree.tree_map(lambda x: x, (call.args, call.kwargs))  # a cache of its own, which it may change
    with torch.inference_mode(_in_inference_mode(model)), torch.no_grad(), kept_from_writes(model, (args, kwargs)):
        return _as_called(model, call, fixed)(*args, **kwargs)


def _decomposed(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program without in-place operations, by PyTorch.

    Raises:
        CaptureError: if the model writes to its parameters, buffers or inputs.
    """
    exported = exported.run_decompositions({})
    signature = exported.graph_signature  # what aliases were found by PyTorch alone
    for output, name in (
        getattr(signature, "parameters_to_mutate", {}) | signature.buffers_to_mutate | signature.user_inputs_to_mutate
    ).items():
        raise written_to(
            name, name in signature.parameters, next(source(n) for n in exported.graph.nodes if n.name == output)
        )
    return exported


def aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """All names of each parameter and buffer: more than one where it is tied."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    groups: dict[int, list[str]] = {}
    for name, t in tensors:
        groups.setdefault(id(t), []).append(name)
    return {name: tuple(groups[id(t)]) for name, t in tensors}


def _fixed(model: nn.Module, call: Call) -> list[dict[str, Any]]:
    """Arguments that are added to the call, in the order to try them.

    A forward with a ``use_cache`` argument that the call leaves open gets False: a KV cache among the outputs would
    show every key and value to the caller, and no scale could pass through them. So does a forward with ``**kwargs`` if
    the model's configuration knows the argument, and if it may be passed.
    """
    parameters = inspect.signature(model.forward).parameters
    if "use_cache" in call.kwargs:
        return [{}]
    if "use_cache" in parameters:
        return [{"use_cache": False}]
    known = hasattr(getattr(model, "config", None), "use_cache")
    passes = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return [{"use_cache": False}, {}] if known and passes else [{}]


def _as_called(model: nn.Module, call: Call, fixed: dict[str, Any]) -> nn.Module:
    """A view of the model whose forward has exactly the call's arguments: export cannot name those in ``**kwargs``."""
    parameters = inspect.signature(model.forward).parameters
    kept = keeps_parameters(model, model)  # with its hooks, which see positions as the user passed them

    def forward(*args: Any, **kwargs: Any) -> Any:
        first = [kwargs.pop(n) if n in kwargs else parameters[n].default for n in call.positional if n not in fixed]
        return kept(*first, *args, **kwargs, **fixed)

    kinds = inspect.Parameter
    positional = [kinds(f"input_{i}", kinds.POSITIONAL_ONLY) for i in range(len(call.args))]
    named = [kinds(name, kinds.KEYWORD_ONLY) for name in call.kwargs]
    forward.__signature__ = inspect.Signature(positional + named)  # type: ignore[attr-defined]
    return _View(model, forward)


class _View(nn.Module):
    """A module's submodules, parameters and buffers under the same names, with a forward of its own and no hooks."""

    def __init__(self, model: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.training = model.training
        for own in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
            self.__dict__[own] = getattr(model, own)
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # without hooks that are registered for all modules
        return self.forward(*args, **kwargs)


def _refuse_training(graph: fx.Graph) -> None:
    for n in graph.nodes:
        name = str(n.target)
        p = 0.0
        if n.target in DROPOUTS:
            p = float(drops(n))
        elif n.target == aten.scaled_dot_product_attention.default and len(n.args) > 4:
            p = n.args[4]
        elif ("batch_norm" in name and True in n.args[5:6]) or n.target in (
            aten.bernoulli.default,
            aten.native_dropout.default,
            aten.bernoulli_.float,
        ):
            p = 1.0
        if p:
            raise CaptureError(
                f"the model is in training mode ({name} at {source(n)}): call model.eval() first; "
                "dropout that a call asks for by training=True is random, too, and stays out of a graph"
            )
