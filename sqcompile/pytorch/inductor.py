"""inductor: Inductor's compiler and its cache of code. Imported in functions: it takes a second or two.

name            what for                                                                             tried on
config          freezing, and the checks that compiled code makes                                    2.11, 2.13
compile_fx      a graph and its fake inputs to a function, without Dynamo                            2.11, 2.13
PyCodeCache     the list of all modules made so, which would keep weights                            2.11, 2.13
cache_dir       where Inductor keeps what it compiled                                                 2.11, 2.13
build           builds our C++ kernels with the compiler and the flags that Inductor uses            2.11, 2.13
pick_vec_isa    tries which vector instructions the compiler and this CPU know, with programs          2.11, 2.13
open_batches    keeps the choice of a convolution's kernel from fixing the batch's size              2.11, 2.13
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch._inductor.config as config
from torch import fx
from torch._inductor.codecache import CppCodeCache, PyCodeCache
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.runtime.cache_dir_utils import cache_dir

_one_at_a_time = threading.RLock()  # as a name of PyTorch's is another meanwhile

__all__ = ["PyCodeCache", "build", "cache_dir", "compile_fx", "config", "open_batches", "pick_vec_isa"]


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
def open_batches() -> Iterator[None]:
    """Has a convolution's fake not hold the batch to the side of 16 on which the example is.

    On a CPU the size is asked for to choose between oneDNN and a slower kernel. Both lay the output out alike, and compiled
    code chooses again at each call: so nothing depends on the answer. Any other choice keeps its guards.
    """
    core: Any = torch._C

    def select(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs["input"]  # by its name in 2.11
        open_ = [size for size in x.shape if isinstance(size, torch.SymInt)]
        if open_:
            with open_[0].node.shape_env.suppress_guards():
                found = real(*args, **kwargs)
            if found == core._ConvBackend.Mkldnn:
                return found
        return real(*args, **kwargs)

    with _one_at_a_time:
        real = core._select_conv_backend
        core._select_conv_backend = select
        try:
            yield
        finally:
            core._select_conv_backend = real
