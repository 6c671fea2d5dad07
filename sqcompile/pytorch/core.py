"""core: what ``import torch`` has imported already. Imports neither Dynamo nor sympy nor Triton.

name                         what for                                                                tried on
FakeTensor, FakeTensorMode   recorded values: tensors with sizes and no memory                       2.11, 2.13
LazyGraphModule              a graph whose code is written when it is run or read, not at each change  2.11, 2.13
CAPTURE_LOGGERS              who logs a capture that fails, which we report ourselves                2.11, 2.13
EXPORT_PROXIES               a global of torch.export, which keeps fake tensors: emptied             2.11, 2.13
TracingContext, tracing      the fake tensors of the compilation at hand: Dynamo's, or ours          2.11, 2.13
enable_python_dispatcher     symbolic sizes in composite operators that are C++                      2.11, 2.13
TorchDispatchMode            sees each operator that a capture runs on real tensors                  2.11, 2.13
disable_current_modes        computes on real tensors, under whatever mode                           2.11, 2.13
is_wrapper_subclass          tells quantized and sharded tensors from plain ones                     2.11, 2.13
pytree                       the leaves of a call, and the call of leaves                            2.11, 2.13
leaf_spec, spec_of, parts_of  a structure of its parts, and its parts                                2.11, 2.13
hollow                       a value of a structure, to look at                                      2.11, 2.13
namedtuple_of                what a structure says the class of all named tuples is                  2.11, 2.13
tree_codegen                 the code of a graph that takes a call apart, and puts its result together  2.11, 2.13
OpOverload                   what a node calls if it is an operator                                  2.11, 2.13
HigherOrderOperator          what it calls if it is a nested graph                                   2.11, 2.13
schema                       names and defaults of an operator's arguments, and which it writes to   2.11, 2.13
writes_to_arguments          whether an operator does; False for what is no operator                 2.11, 2.13
overload_name                "Tensor" of aten.add.Tensor                                             2.11, 2.13
codegen                      how the code of a graph takes a call apart, and puts its result together  2.11, 2.13
storage_id                   which tensors lie in one storage, fake ones included                    2.11, 2.13
StorageWeakRef               a storage that is not kept; its ``cdata`` is for the next two           2.11, 2.13
storage_of_ref               the storage of a weak reference's cdata, None if it is gone             2.11, 2.13
storage_expired              whether it is gone                                                      2.11, 2.13
WeakIdKeyDictionary          what is known of a tensor, without keeping it                           2.11, 2.13
version                      how often a tensor was written to                                       2.11, 2.13
is_same_element_twice        whether a tensor's elements share memory, as expand makes them          2.11, 2.13
buffer_hooks                 of all modules: torch.export leaves one if it fails                     2.11, 2.13
call_impl                    what calling a module runs                                              2.11, 2.13
compiled_call, set_compiled_call  what it runs instead once the module is compiled                   2.11, 2.13
has_avx2, has_vnni, has_bf16, has_amx, init_amx  instructions of this CPU, and leave of Linux for AMX  2.11, 2.13
int_mm                       INT8 product of PyTorch itself, for comparison                          2.11, 2.13
check_sizes                  a condition of sizes that a program asks for at each call                2.11, 2.13
scaled_mm                    FP8 product on tensor cores                                             2.11, 2.13
has_tangents, has_tangent    whether derivatives go forward (dual_level, torch.func.jvp), and of which tensors   2.11, 2.13
DispatchKey                  tells composite operators from others                                   2.11, 2.13
collectives                  what processes ask of each other in a graph, without writes             2.11, 2.13
withdraw                     operators of a library are what they were before it                     2.11, 2.13
retry                        an operator that raises is called in Python, whose error is its own     2.11, 2.13
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._C import DispatchKey
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import TracingContext, tracing
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx._lazy_graph_module import _LazyGraphModule as LazyGraphModule
from torch.fx.experimental import proxy_tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes
from torch.utils._python_dispatch import is_traceable_wrapper_subclass as is_wrapper_subclass
from torch.utils.weak import WeakIdKeyDictionary

__all__ = [
    "CAPTURE_LOGGERS",
    "EXPORT_PROXIES",
    "DispatchKey",
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "LazyGraphModule",
    "OpOverload",
    "StorageWeakRef",
    "TorchDispatchMode",
    "TracingContext",
    "WeakIdKeyDictionary",
    "buffer_hooks",
    "call_impl",
    "check_sizes",
    "codegen",
    "collectives",
    "compiled_call",
    "disable_current_modes",
    "enable_python_dispatcher",
    "has_amx",
    "has_avx2",
    "has_bf16",
    "has_tangent",
    "has_tangents",
    "has_vnni",
    "hollow",
    "init_amx",
    "int_mm",
    "is_same_element_twice",
    "is_wrapper_subclass",
    "leaf_spec",
    "namedtuple_of",
    "overload_name",
    "parts_of",
    "pytree",
    "retry",
    "scaled_mm",
    "schema",
    "set_compiled_call",
    "spec_of",
    "storage_expired",
    "storage_id",
    "storage_of_ref",
    "tracing",
    "tree_codegen",
    "version",
    "withdraw",
    "writes_to_arguments",
]

CAPTURE_LOGGERS = (
    "torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes", "torch._export", "torch.export",
)  # fmt: skip
# these two may go: where they are not, nothing is kept and no hook is left
EXPORT_PROXIES: dict[int, Any] = getattr(proxy_tensor, "_FAKE_TENSOR_ID_TO_PROXY_MAP_FOR_EXPORT", {})
buffer_hooks: dict[int, Any] = getattr(nn.modules.module, "_global_buffer_registration_hooks", {})

version: Callable[[Tensor], int] = operator.attrgetter("_version")  # raises RuntimeError for one of inference mode
storage_of_ref = torch.UntypedStorage._new_with_weak_ptr
storage_expired = torch.UntypedStorage._expired

call_impl = nn.Module._call_impl

has_avx2: Callable[[], bool] = torch.cpu._is_avx2_supported
has_vnni: Callable[[], bool] = torch.cpu._is_vnni_supported
has_bf16: Callable[[], bool] = torch.cpu._is_avx512_bf16_supported
has_amx: Callable[[], bool] = torch.cpu._is_amx_tile_supported
init_amx: Callable[[], bool] = torch.cpu._init_amx

check_sizes = torch._check
int_mm = torch._int_mm
scaled_mm = torch._scaled_mm
collectives = torch.ops._c10d_functional


class _Pair(NamedTuple):
    first: int
    second: int


def end_allocating(device: torch.device, pool: Any) -> None:
    """Has the allocator give memory as usual again, where the recording of a CUDA graph has failed. Since 2.12 PyTorch does."""
    index = torch.cuda.current_device() if device.index is None else device.index
    with contextlib.suppress(RuntimeError):  # it does already
        torch._C._cuda_endAllocateToPool(index, pool)


def schema(target: Any) -> torch.FunctionSchema:
    """The schema of an OpOverload: ``arguments`` with name, default_value and alias_info, ``returns``, ``is_mutable``."""
    return target._schema


def writes_to_arguments(target: Any) -> bool:
    """Whether what a node calls is an operator that writes to an argument."""
    return bool(getattr(getattr(target, "_schema", None), "is_mutable", False))


def overload_name(target: Any) -> str:
    """The name of an OpOverload among those of its packet: "Tensor", or "default"."""
    return target._overloadname


def codegen(graph: fx.Graph) -> Any:
    """What ``fx.Graph.set_codegen`` has set; of an exported module's graph with ``pytree_info``: in_spec and out_spec."""
    return graph._codegen


def leaf_spec() -> pytree.TreeSpec:
    """The structure of a value that is not looked into."""
    return pytree.tree_structure(0)


def spec_of(kind: Any, context: Any, parts: list[pytree.TreeSpec]) -> pytree.TreeSpec:
    """The structure of a container: its class, what that class keeps beside its parts, and theirs."""
    return pytree.TreeSpec(kind, context, parts)


def parts_of(spec: pytree.TreeSpec) -> list[pytree.TreeSpec]:
    """The structures of a container's parts."""
    parts = getattr(spec, "children", None)  # a method since 2.12
    return list(parts() if callable(parts) else spec.children_specs)


def hollow(spec: pytree.TreeSpec) -> tuple[Any, list[Tensor]]:
    """A value of a structure, and its leaves: tensors without memory, as a container may compute with what it is given."""
    leaves = [torch.empty(1, 1, 1, 1, device="meta") for _ in range(spec.num_leaves)]
    return spec.unflatten(leaves), leaves


def namedtuple_of() -> Any:
    """The class that the structure of every named tuple has."""
    return pytree.tree_structure(_Pair(0, 0)).type


def tree_codegen(arguments: list[str], in_spec: pytree.TreeSpec, out_spec: pytree.TreeSpec) -> Any:
    """For ``fx.Graph.set_codegen``: takes a call apart by ``in_spec``, and puts the result together by ``out_spec``."""
    return fx.graph._PyTreeCodeGen(fx.graph._PyTreeInfo(arguments, in_spec, out_spec))


def storage_id(tensor: Tensor) -> Hashable:
    """Equal for tensors of one storage, as long as one of them lives. Other than an address, fake tensors have it, too."""
    return tensor.untyped_storage()._cdata


def is_same_element_twice(tensor: Tensor) -> bool:
    """Whether two indices are certainly one element in memory; False also where PyTorch cannot tell."""
    return torch._debug_has_internal_overlap(tensor) == 1


def compiled_call(module: nn.Module) -> Callable[..., Any] | None:
    """What calling the module runs in place of `call_impl`, as ``Module.compile`` sets it."""
    return module._compiled_call_impl


def set_compiled_call(module: nn.Module, call: Callable[..., Any] | None) -> None:
    """Has calls of the module run ``call``; None for `call_impl`."""
    module._compiled_call_impl = call


class _Retried:
    """What an operator calls, and what it calls again where that raises RuntimeError: C++ has no error of other classes."""

    def __init__(self, call: Callable[..., Any], again: Callable[..., Any]) -> None:
        self._call, self._again = call, again

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._call(*args, **kwargs)
        except RuntimeError as e:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            plain = all(type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" for x in tensors)
            if type(e) is not RuntimeError or not plain:
                raise
        return self._again(*args, **kwargs)

    def __hash__(self) -> int:
        return hash(self._call)  # an operator's own, by which graphs look it up

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)


def retry(operator: Any, again: Callable[..., Any]) -> None:
    """Has an operator that raises RuntimeError for tensors of the CPU call another, which takes what it takes.

    Args:
        operator: ``torch.ops.library.name``, with one overload, which is called in Python from now on like its packet.
        again: what says what is wrong, or does it.
    """
    for op in (operator, operator.default):
        op._op = _Retried(op._op, again)


def withdraw(library: torch.library.Library) -> None:
    """Has operators be what they were before a library was made. No call of them may be running."""
    library._destroy()


def has_tangents() -> bool:
    """Whether a level of forward-mode derivatives is open, in which tensors may have tangents."""
    return forward_ad._current_level >= 0


def has_tangent(t: Tensor) -> bool:
    """Whether a tensor has a tangent at the level that is open, or is of torch.func's at any."""
    inner = t
    while torch._C._functorch.is_functorch_wrapped_tensor(inner):
        if torch._C._functorch.is_gradtrackingtensor(inner):
            return True
        inner = torch._C._functorch.get_unwrapped(inner)
    return forward_ad.unpack_dual(t).tangent is not None
