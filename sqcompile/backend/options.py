"""options: what ``torch.compile(model, backend="smoothquant", options={...})`` may say."""

from __future__ import annotations

import os
import reprlib
import weakref
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from sqcompile.compiled.emit import BACKENDS
from sqcompile.errors import RecipeError
from sqcompile.plan.plan import Plan, given_plan
from sqcompile.plan.recipe import Recipe, resolve_recipe
from sqcompile.process.progress import Show, check_show
from sqcompile.pytorch.dynamo import OptimizedModule, original

MODES = ("default", "reduce-overhead")


@dataclass(frozen=True, eq=False)
class Options:
    """What to do with a model.

    Attributes:
        plan: from `sqcompile.calibrate`, or the path of a saved one; without it the first calls calibrate.
        recipe: for calls that calibrate: "default", "O1", "O2", "O3", "fp8" or a Recipe; with a plan, the plan's or none.
        calibration_steps: how many calls run in float and are observed.
        free_float: whether float weights are freed once they are in INT8. The model cannot run without the compiled
            code then: its freed weights read as NaN.
        mode: "default", or "reduce-overhead": calls whose sizes come three times in a row, such as decoding with a static
            cache, are replayed as CUDA graphs.
        compiler: "inductor", or "eager" to run the lowered graphs as they are.
        stage: "lowered", or "quantized" to run INT8 values in plain float arithmetic: the reference of what is lowered,
            to tell what quantization costs from what a kernel does. Each graph has its own INT8 weights then.
        progress: as for `sqcompile.compile`, False by default: told when a plan is made and when a graph is rewritten and compiled.
            What a function raises comes out of the call, which compiles anew the next time.
        regional: whether repeated blocks are compiled once, see `sqcompile.compile`.
        model: whose parameters these are: names in plans are its. Given as a module, or as a weak reference to one where
            models come and go: PyTorch keeps options until ``torch._dynamo.reset()``. Without it the model is looked for
            on the call stack.
    """

    plan: Plan | None = None
    recipe: Recipe | str = "default"
    calibration_steps: int = 8
    free_float: bool = False
    mode: str = "default"
    compiler: str = "inductor"
    stage: str = "lowered"
    regional: bool = False
    progress: Show = False
    model: weakref.ref[nn.Module] | None = None

    @property
    def key(self) -> Hashable:
        """Equal for options that give the same graphs."""
        others = ("plan", "model", "progress")
        return id(self.plan), *(getattr(self, f.name) for f in fields(self) if f.name not in others)


_plans: dict[str, tuple[tuple[int, ...], Plan]] = {}


def parse(options: Mapping[str, Any] | None, mode: str | None) -> Options:
    """The options of one torch.compile.

    Raises:
        RecipeError: for an option or a value that there is not.
        PlanError: for a plan that is none, or does not agree with the other options.
    """
    given = dict(options or {})
    known = [f.name for f in fields(Options)]
    for name in given:
        if name not in known:
            raise RecipeError(f"option {name!r} of backend 'smoothquant': choose from {', '.join(known)}")
    if mode is not None:
        given["mode"] = mode
    plan = given.get("plan")
    if plan is not None:
        plan = _load(plan) if isinstance(plan, (str, os.PathLike)) else plan
        data = "calibration_steps" if "calibration_steps" in given else None
        given["plan"] = given_plan(plan, given.get("recipe"), data)
    if given.get("model") is not None:
        given["model"] = _weakly(given["model"])
    found = Options(**{**given, "recipe": resolve_recipe(given.get("recipe"))})
    check_show(found.progress)
    if found.mode not in MODES:
        raise RecipeError(f"mode={found.mode!r} of backend 'smoothquant': choose one of {', '.join(MODES)}")
    if found.compiler not in BACKENDS:
        raise RecipeError(f"option compiler={found.compiler!r}: choose one of {', '.join(BACKENDS)}")
    if found.stage not in ("lowered", "quantized"):
        raise RecipeError(f"option stage={found.stage!r}: choose 'lowered' or 'quantized'")
    if found.stage == "quantized" and found.free_float:
        raise RecipeError(
            "stage='quantized' and free_float=True: each graph makes INT8 weights of its own, from the float ones"
        )
    if type(found.calibration_steps) is not int or found.calibration_steps < 1:
        raise RecipeError(f"option calibration_steps={found.calibration_steps!r}: a number of calls, at least 1")
    return found


def _weakly(model: Any) -> weakref.ref[nn.Module]:
    """A weak reference to the module that a user gives, which sessions may hold without keeping it alive."""
    module = model() if isinstance(model, weakref.ref) else model
    if isinstance(module, OptimizedModule):
        module = original(module)
    if not isinstance(module, nn.Module) and not isinstance(model, weakref.ref):
        raise RecipeError(f"option model={reprlib.repr(model)}: pass the nn.Module that torch.compile is given")
    return weakref.ref(module) if isinstance(module, nn.Module) else model


def _load(path: str | os.PathLike[str]) -> Plan:
    """The plan in a file: one object as long as the file stays as it is."""
    try:
        name = os.path.abspath(os.fsdecode(path))
        found = os.stat(name)
    except (OSError, ValueError, TypeError):
        return Plan.load(path)  # which says what is wrong
    version = found.st_ino, found.st_mtime_ns, found.st_size
    if name not in _plans or _plans[name][0] != version:
        _plans[name] = version, Plan.load(name)
    return _plans[name][1]
