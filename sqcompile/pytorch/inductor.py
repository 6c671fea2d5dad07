"""inductor: Inductor's compiler and its cache of code. Imported in functions: it takes a second or two.

name            what for                                                                             tried on
config          freezing, and the checks that compiled code makes                                    2.11, 2.13
compile_fx      a graph and its fake inputs to a function, without Dynamo                            2.11, 2.13
PyCodeCache     the list of all modules made so, which would keep weights                            2.11, 2.13
cache_of        has Inductor's cache of compiled graphs hold some under a name of their own           2.11, 2.13
cache_dir       where Inductor keeps what it compiled                                                 2.11, 2.13
build           builds our C++ kernels with the compiler and the flags that Inductor uses            2.11, 2.13
pick_vec_isa    tries which vector instructions the compiler and this CPU know, with programs          2.11, 2.13
open_sizes      keeps choices that no result depends on from fixing sizes                            2.11, 2.13
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch._inductor.config as config
from torch import fx
from torch._inductor.codecache import CppCodeCache, FxGraphCache, PyCodeCache
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.runtime.cache_dir_utils import cache_dir

_one_at_a_time = threading.RLock()  # as a name of PyTorch's is another meanwhile

__all__ = ["PyCodeCache", "build", "cache_dir", "cache_of", "compile_fx", "config", "open_sizes", "pick_vec_isa"]


def build(source: str) -> Any:
    """The C++ source as a library, for this CPU; from the cache where it is there."""
    # our code asks for instructions function by function, so that nobody needs to find out what there is; 2.13 may be told
    told = "needs_vec_isa" in inspect.signature(CppCodeCache.load_async).parameters
    return CppCodeCache.load(source, device_type="cpu", **({"needs_vec_isa": False} if told else {}))


def compile_fx(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """The graph as a function of flat tensors and numbers. The configuration is `config` as it is now."""
    from torch._inductor.compile_fx import compile_fx as compile_  # here: building C++ kernels does not need it

    compiled: Any = compile_(graph, inputs)  # ahead of time, which it is not told, it would be the path of a file
    return compiled


@contextlib.contextmanager
def cache_of(name: str, good: Callable[[], bool]) -> Iterator[None]:
    """Compiled graphs go to the cache, and come from it, under a name, beside the user's own; those go that are ``good``.

    Inductor keeps with them the conditions of sizes that are arguments. Sizes of tensors are none in our graphs: what was
    compiled for fixed ones would be taken for any, in silence.
    """
    cache, settings = FxGraphCache, cast(Any, torch.compiler.config)

    def save(*args: Any, **kwargs: Any) -> None:
        if good():
            real(*args, **kwargs)

    with _one_at_a_time, settings.patch(cache_key_tag=f"{settings.cache_key_tag} {name}"):
        real = cache._save_graph
        setattr(cache, "_save_graph", staticmethod(save))  # noqa: B010  (mypy takes it for a method)
        try:
            yield
        finally:
            setattr(cache, "_save_graph", staticmethod(real))  # noqa: B010


@contextlib.contextmanager
def open_sizes() -> Iterator[None]:
    """Has Inductor not hold sizes to the side of a number on which the example is, where no result depends on the answer.

    A convolution asks on a CPU whether the batch is below 16, to choose between oneDNN and slower kernels. Compiled code
    chooses again at each call; where they lay the output out alike, nothing depends on the answer. A sum of floats asks
    whether it is of more than 4,096, and would add them up in parts then; both are sums. Any other choice keeps its guards.
    """
    from torch._inductor.codegen.cpp import CppKernel
    from torch._inductor.virtualized import V

    core: Any = torch._C
    sums: Any = CppKernel

    def select(*args: Any, **kwargs: Any) -> Any:
        x, w = (args[0], args[1]) if args else (kwargs["input"], kwargs["weight"])  # by name in 2.11
        open_ = [size for size in x.shape if isinstance(size, torch.SymInt)]
        if open_:
            with open_[0].node.shape_env.suppress_guards():
                found = real(*args, **kwargs)
            layout = core._conv_determine_backend_memory_format
            if layout(x, w, found) == layout(x, w, core._ConvBackend.Mkldnn):
                return found
        return real(*args, **kwargs)

    def in_parts(*args: Any, **kwargs: Any) -> Any:
        with V.graph.sizevars.shape_env.suppress_guards():
            return asked(*args, **kwargs)

    with _one_at_a_time:
        real, asked = core._select_conv_backend, sums.need_use_acc_helper
        core._select_conv_backend, sums.need_use_acc_helper = select, in_parts
        try:
            yield
        finally:
            core._select_conv_backend, sums.need_use_acc_helper = real, asked
