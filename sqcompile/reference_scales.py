"""reference_scales: what the scripts of SmoothQuant's own repository measure of a model, from the captured graph.

get_act_scales                     {linear: max|X_j| of each input channel}
get_linear_absmax                  {linear: {"input": max|X|, "output": max|Y|}}             of the smoothed model
get_static_decoder_layer_scales    [{"attn_input_scale": max|X| / 127, ...}], one for each layer of an OPT
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor, fx, nn

from sqcompile.capture.inputs import Reader, length
from sqcompile.capture.traced_call import example_call, traced_call
from sqcompile.checkpoints.act_scales import act_scales_of
from sqcompile.errors import ArtifactError
from sqcompile.models import check_model
from sqcompile.passes.ir.graph import find_linears, module_of
from sqcompile.pipeline import rewrite
from sqcompile.plan.plan import Plan, given_plan
from sqcompile.process.interrupts import deferred
from sqcompile.process.lock import analysing, compiling
from sqcompile.process.progress import Show, stages
from sqcompile.statistics.observe import Calibration, calibrate
from sqcompile.statistics.observer import Observer
from sqcompile.statistics.outputs import OutputObserver

_Observer = TypeVar("_Observer", bound=Observer)

_Q_MAX = 127  # the layers' scales are of INT8
# What a layer's scales are called, of which linear, and which of its sides.
_LAYER = {
    "attn_input_scale": ("self_attn.q_proj", "input"),
    "q_output_scale": ("self_attn.q_proj", "output"),
    "k_output_scale": ("self_attn.k_proj", "output"),
    "v_output_scale": ("self_attn.v_proj", "output"),
    "out_input_scale": ("self_attn.out_proj", "input"),
    "fc1_input_scale": ("fc1", "input"),
    "fc2_input_scale": ("fc2", "input"),
}
_LINEARS = {linear for linear, _ in _LAYER.values()}
_IN_LAYER = re.compile(r"(?P<layers>(?:.*\.)?layers)\.(?P<index>\d+)\.(?P<linear>.+)")


def get_act_scales(
    model: nn.Module,
    calib_loader: Any,
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = "auto",
    progress: Show = True,
) -> dict[str, Tensor]:
    """The largest absolute value of each input channel of the linears, as `write_act_scales` takes it.

    Args:
        model: as for `compile`.
        calib_loader: as for `compile`; padding is left out by an ``attention_mask`` among the inputs.
        example_inputs: as for `compile`.
        dynamic_shapes: as for `compile`.
        progress: as for `compile`.

    Returns:
        float32 [in_features] on the CPU, by the linear's module: of every linear that a token reached, those among them
        that a recipe leaves in float.

    Raises:
        SQCompileError: CaptureError or CalibrationError; the message names what to do.
        KeyboardInterrupt: as `compile`.
    """
    return act_scales_of(_observed(model, calib_loader, example_inputs, dynamic_shapes, progress, Observer)[0])


def get_linear_absmax(
    model: nn.Module,
    calib_loader: Any,
    plan: Plan | str | os.PathLike[str] | None = None,
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = "auto",
    progress: Show = True,
) -> dict[str, dict[str, float]]:
    """The largest absolute values of each linear's input and output, all in float.

    Args:
        model: as for `compile`.
        calib_loader: as for `compile`; padding is left out by an ``attention_mask`` among the inputs.
        plan: whose smoothing the model is looked at with, or the path of a saved one; None for the model as it is. Rotations
            are no part of it.
        example_inputs: as for `compile`.
        dynamic_shapes: as for `compile`.
        progress: as for `compile`.

    Returns:
        ``{"input": max|X|, "output": max|Y|}`` by the linear's module, of every linear that a token reached.

    Raises:
        SQCompileError: CaptureError, CalibrationError or PlanError; the message names what to do.
        KeyboardInterrupt: as `compile`.
    """
    return _absmax(model, calib_loader, plan, example_inputs, dynamic_shapes, progress)


def get_static_decoder_layer_scales(
    model: nn.Module,
    calib_loader: Any,
    plan: Plan | str | os.PathLike[str] | None = None,
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = "auto",
    progress: Show = True,
) -> tuple[list[dict[str, float]], dict[str, dict[str, float]]]:
    """Static INT8 scales of the decoder layers of an OPT, as engines with kernels for just these layers take them.

    Args:
        model: an OPT: its layers have the linears q_proj, k_proj, v_proj, out_proj, fc1 and fc2, and no other.
        calib_loader: as for `get_linear_absmax`.
        plan: as for `get_linear_absmax`.
        example_inputs: as for `compile`.
        dynamic_shapes: as for `compile`.
        progress: as for `compile`.

    Returns:
        For each layer in order, max|·| / 127 by ``attn_input_scale``, ``q_output_scale``, ``k_output_scale``,
        ``v_output_scale``, ``out_input_scale``, ``fc1_input_scale`` and ``fc2_input_scale``; and what
        `get_linear_absmax` gives.

    Raises:
        SQCompileError: as `get_linear_absmax`, and ArtifactError for a model with other layers.
        KeyboardInterrupt: as `compile`.
    """
    found = _absmax(model, calib_loader, plan, example_inputs, dynamic_shapes, progress, _opt_layers)
    scales = [
        {name: found[f"{layer}.{linear}"][side] / _Q_MAX for name, (linear, side) in _LAYER.items()}
        for layer in _opt_layers(found)
    ]
    return scales, found


def _absmax(
    model: nn.Module,
    loader: Any,
    plan: Any,
    example: Any,
    dynamic_shapes: Any,
    progress: Show,
    check: Callable[[list[str]], Any] | None = None,
) -> dict[str, dict[str, float]]:
    """What `get_linear_absmax` gives; ``check`` looks at the linears' modules before any data is run."""
    given = None if plan is None else given_plan(plan, None, None)

    def smoothed(traced: fx.GraphModule) -> fx.GraphModule:
        if check is not None:
            check([module_of(l.name) for l in find_linears(traced)])
        return traced if given is None else rewrite(traced, given, until="folded", shown=False)

    calibration, observed = _observed(model, loader, example, dynamic_shapes, progress, OutputObserver, smoothed)
    outputs: dict[str, float] = {}
    for name, absmax in observed.largest.items():
        outputs[module_of(name)] = max(float(absmax), outputs.get(module_of(name), 0.0))
    return {
        name: {"input": float(absmax.max()), "output": outputs[name]}
        for name, absmax in act_scales_of(calibration).items()
    }


def _observed(
    model: nn.Module,
    loader: Any,
    example: Any,
    dynamic_shapes: Any,
    progress: Show,
    kind: Callable[[fx.GraphModule], _Observer],
    change: Callable[[fx.GraphModule], fx.GraphModule] = lambda traced: traced,
) -> tuple[Calibration, _Observer]:
    """Runs the data through an observer of the traced graph, or of what that is changed to."""
    check_model(model)
    given = example_call(model, example)
    reader = Reader(model, given.kwargs if given else ())
    with deferred(), stages(("trace", "calibrate"), progress) as enter, analysing(model):
        first, data = reader.first(loader)
        enter("trace")
        with compiling():
            traced, _ = traced_call(model, given or first, dynamic_shapes, reader.forward)
            graph = change(traced)
            observer = kind(graph)
        enter("calibrate")
        found = calibrate(graph, model, data, (), length(loader), reader, observer)
    return found, observer


def _opt_layers(modules: Iterable[str]) -> list[str]:
    """The decoder layers of an OPT, in order, by the modules of its linears.

    Raises:
        ArtifactError: if the layers are others.
    """
    layers: dict[tuple[str, int], set[str]] = {}
    for module in modules:
        if found := _IN_LAYER.fullmatch(module):
            layers.setdefault((found["layers"], int(found["index"])), set()).add(found["linear"])
    of = "these scales are of OPT's decoder layers"
    instead = "pass an OPT, or take get_linear_absmax, which has those of every linear of any model"
    if len({stack for stack, _ in layers}) != 1:
        stacks = ", ".join(dict.fromkeys(stack for stack, _ in layers)) or "no 'layers'"
        raise ArtifactError(f"{of}, and the model has {stacks}: {instead}")
    for (stack, i), linears in layers.items():
        if linears != _LINEARS:
            raise ArtifactError(
                f"{of}, with {', '.join(sorted(_LINEARS))}, and {stack}.{i} has {', '.join(sorted(linears))}: {instead}"
            )
    return [f"{stack}.{i}" for stack, i in sorted(layers)]
