"""``torch.compile(model, backend="smoothquant")``: the pipeline of `sqcompile.compile` on the graphs of Dynamo.

    model = torch.compile(model, backend="smoothquant", options={"plan": plan})
    model.generate(ids, max_new_tokens=128)

A graph's parameters are its inputs, so each call looks whether they are still those it was compiled with. Weights that
were changed are quantized again; the INT8 weights of those that were not are shared by all graphs of a model.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from sqcompile.backend.capture import capture
from sqcompile.backend.dynamic import make_dynamic
from sqcompile.backend.find_model import model_tensors
from sqcompile.backend.limit import respect_limit
from sqcompile.backend.methods import follow_methods
from sqcompile.backend.options import Options, parse
from sqcompile.backend.runner import GRAD, Runner
from sqcompile.backend.session import reset, session_of
from sqcompile.backend.sharded import on_local_parts
from sqcompile.capture.captured import asks_for_gradients
from sqcompile.errors import CaptureError, SQCompileError
from sqcompile.kernels.targets import begin, check_format
from sqcompile.models import check_recipe
from sqcompile.plan.recipe import resolve_recipe
from sqcompile.process.lock import compiling
from sqcompile.process.progress import carried
from sqcompile.pytorch.distributed import local_part
from sqcompile.pytorch.dynamo import Through

__all__ = ["Options", "smoothquant"]


def smoothquant(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend. Its errors, and those of a user's ``progress``, are raised by the call that made Dynamo compile, as they are.

    Args:
        gm: Dynamo's graph.
        example_inputs: its arguments in the call at hand.
        options: see `Options`.
        mode: "default" or "reduce-overhead"; torch.compile takes either mode or options, which may have a "mode".

    Returns:
        What runs in place of the graph.
    """
    try:
        with compiling(), carried(Through):
            return _compiled(gm, example_inputs, options, mode)
    except SQCompileError as e:
        return _raises(e)


def _compiled(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Mapping[str, Any] | None, mode: str | None
) -> Callable[..., Any]:
    found = parse(options, mode)
    if asks_for_gradients(example_inputs):
        return _without_gradients(gm, options, mode)
    parameters: list[Tensor] = [local_part(x) for x in example_inputs if isinstance(x, nn.Parameter)]
    gm, example_inputs, convert, parallel = on_local_parts(gm, example_inputs)
    recipe = found.plan.recipe if found.plan else resolve_recipe(found.recipe)
    check_recipe(parallel, recipe, False)
    parameters += list(gm.parameters())
    if not parameters:  # there may be buffers
        parameters = model_tensors((x for x in example_inputs if isinstance(x, Tensor)), found)
    for device in {p.device for p in parameters}:
        check_format(recipe.dtype, device)  # before it calibrates
        begin(device, inductor=found.compiler == "inductor")
    session = session_of(parameters, found)
    make_dynamic(gm, example_inputs, lambda x: bool(session.names(x)), found.mode == "reduce-overhead")
    respect_limit()
    names = [str(n.target) for n in gm.graph.find_nodes(op="placeholder")]
    # a method: Dynamo's wrapper would copy the attributes of an object, and keep the weights that it has now
    try:
        template = capture(gm, sharded=convert is not None)
    except CaptureError:
        if parameters:
            raise
        return gm.forward  # nothing of the model in it: masks that functions compute under vmap, say
    run = Runner(session, found, template, example_inputs, names, parallel).__call__
    return run if convert is None else lambda *args: run(*convert(args))


def _without_gradients(gm: fx.GraphModule, options: Mapping[str, Any] | None, mode: str | None) -> Callable[..., Any]:
    """Raises as long as gradients are asked for: Dynamo of torch 2.11 does not look whether parameters still want them."""
    later = torch.compile(gm, backend=functools.partial(smoothquant, options=options, mode=mode))

    def run(*args: Any) -> Any:
        if asks_for_gradients(args):
            raise CaptureError(GRAD)
        return later(*args)

    return run


def _raises(error: SQCompileError) -> Callable[..., Any]:
    """Raises when called: Dynamo would put an error of its own around one that is raised while it compiles.

    Each time a copy: a raised error has a traceback, which keeps the frames of its call and all their tensors.
    """
    kept = copy.copy(error)  # without traceback, cause and context

    def run(*args: Tensor) -> Any:
        raise copy.copy(kept)

    return run


smoothquant.reset = reset  # type: ignore[attr-defined]
follow_methods(smoothquant)
