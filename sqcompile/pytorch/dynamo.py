"""dynamo: Dynamo, and AOTAutograd, which lowers its graphs. Imports Triton, so all but the backend import it in functions.

name                        what for                                                                 tried on
OptimizedModule             what torch.compile makes of a module                                     2.11, 2.13
original                    the module that it was made of                                           2.11, 2.13
backend_of                  the backend that it was compiled with                                    2.11, 2.13
backend_of_function         the backend that a function was compiled with                            2.11, 2.13
compiled_form               a function as the backend of an OptimizedModule compiles it              2.11, 2.13
compile_lock                Dynamo's lock: one compilation at a time, ours included                  2.11, 2.13
config                      recompile_limit, and what torch.compile(dynamic=...) sets                2.11, 2.13
InterpreterFrame            the frame that Dynamo compiles: it leads to the model                    2.11, 2.13
frame_being_compiled        the same from within: ``f_code`` and ``f_locals`` of the outermost       2.11, 2.13
cache_entries               what was compiled for some code, each with a ``guard_manager``           2.11, 2.13
TensorifyScalarRestartAnalysis   by raising it a backend has Dynamo trace again                      2.11, 2.13
UnspecializeRestartAnalysis      has it forget by then which graph breaks it foresaw                 2.11, 2.13
maybe_mark_dynamic          has the next trace take a size for dynamic                               2.11, 2.13
marked_dynamic              the dims of which that is so already                                     2.11, 2.13
mark_static_address         a buffer that stays where it is: CUDA graphs use it in place             2.11, 2.13
has_static_address          whether a tensor is marked so                                            2.11, 2.13
aot_export_module           Dynamo's graph to ATen operators, with what it writes to as outputs      2.11, 2.13
Through                     an error of a backend that comes out of the call as what it holds        2.11, 2.13
functorch_interpreters      the transforms (vmap) that are entered                                   2.11, 2.13
pop_functorch_interpreter   leaves the innermost                                                     2.11, 2.13
set_grad_enabled            what a node calls for ``torch.no_grad()``                                2.11, 2.13
get_data                    what a node calls for ``x.data``                                         2.11, 2.13
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch._dynamo.config as config
from torch import Tensor
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list as cache_entries
from torch._C._dynamo.eval_frame import _PyInterpreterFrame as InterpreterFrame
from torch._C._functorch import pop_dynamic_layer_stack as pop_functorch_interpreter
from torch._dynamo import mark_static_address, maybe_mark_dynamic
from torch._dynamo.convert_frame import compile_lock
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.exc import ShortenTraceback, TensorifyScalarRestartAnalysis, UnspecializeRestartAnalysis
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._functorch.aot_autograd import aot_export_module
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters as functorch_interpreters

__all__ = [
    "InterpreterFrame",
    "OptimizedModule",
    "TensorifyScalarRestartAnalysis",
    "Through",
    "UnspecializeRestartAnalysis",
    "aot_export_module",
    "backend_of",
    "backend_of_function",
    "cache_entries",
    "compile_lock",
    "compiled_form",
    "config",
    "frame_being_compiled",
    "functorch_interpreters",
    "get_data",
    "has_static_address",
    "mark_static_address",
    "marked_dynamic",
    "maybe_mark_dynamic",
    "original",
    "pop_functorch_interpreter",
    "set_grad_enabled",
]

set_grad_enabled = torch._C._set_grad_enabled
get_data = getattr(torch._C._autograd, "_get_data_attr", None)  # not in all versions; no node calls None


class Through(ShortenTraceback):
    """Raised by a backend while Dynamo compiles: the call that made it compile raises the error that this holds.

    Dynamo lets its own kind of error through, and asks it last for what to raise.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error), first_useful_frame=None)
        self.error = error

    def remove_dynamo_frames(self) -> NoReturn:
        """Raises the error, with the cause and the context that it had."""
        context = self.error.__context__
        try:
            raise self.error
        finally:
            self.error.__context__ = context


def original(compiled: OptimizedModule) -> Any:
    """The module that torch.compile was given. It does not go through ``OptimizedModule.__getattr__``."""
    return compiled._modules["_orig_mod"]


def backend_of(compiled: OptimizedModule) -> Any:
    """The backend as a function, out of what Dynamo has put around it: whatever its name and options."""
    return _unwrapped(getattr(compiled.dynamo_ctx, "callback", None))


def backend_of_function(function: Callable[..., Any] | None) -> Any:
    """The same of a function that torch.compile gave, as ``Module.compile`` keeps one; None of any other."""
    names, cells = getattr(getattr(function, "__code__", None), "co_freevars", ()), getattr(function, "__closure__", ())
    found = dict(zip(names, cells or (), strict=True))
    return _unwrapped(found["callback"].cell_contents) if "callback" in found else None


def _unwrapped(callback: Any) -> Any:
    while hasattr(callback, "_torchdynamo_orig_backend"):
        callback = callback._torchdynamo_orig_backend
    return getattr(callback, "compiler_fn", callback)


def compiled_form(compiled: OptimizedModule, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled with the backend and the options that the module was compiled with."""
    return compiled.dynamo_ctx(function)


def frame_being_compiled() -> Any:
    """While Dynamo compiles: its state for the frame it began with, whose ``f_code`` and ``f_locals`` are the call's."""
    return InstructionTranslator.current_tx().output.root_tx


def marked_dynamic(tensor: Tensor) -> set[int]:
    """The dims that `maybe_mark_dynamic` has marked."""
    return getattr(tensor, "_dynamo_weak_dynamic_indices", set())


def has_static_address(tensor: Any) -> bool:
    """Whether `mark_static_address` has marked it; False for what is no tensor."""
    return hasattr(tensor, "_dynamo_static_input_type")
