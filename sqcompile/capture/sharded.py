"""sharded: a model whose parameters are DTensors, as the graph of what one process computes.

    ColwiseParallel: up, RowwiseParallel: down
->
    %up = linear(%x, %up.weight, %up.bias)                  # this process's rows of the weight
    %h = relu(%up)
    %down = linear(%h, %down.weight)                        # its columns: a part of a sum
    %all_reduce = _c10d_functional.all_reduce(%down, "sum", "0")
    %wait_tensor = _c10d_functional.wait_tensor(%all_reduce)
    %add = add(%wait_tensor, %down.bias)

PyTorch's own engine says which collectives there are: DTensors do it while the model is traced. Linears, embeddings and norms
of DTensors are computed here on what they hold, so that they stay whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sqcompile.errors import CaptureError
from sqcompile.process.parallel import ALONE, Parallel
from sqcompile.pytorch.distributed import is_distributed, local_part, traceable

_SHARD = "torch.distributed.tensor.parallel.parallelize_module, or transformers' from_pretrained(..., tp_plan='auto')"


def check_mesh(model: nn.Module, mesh: Any) -> None:
    """Refuses a mesh that is not that of a model, or a sharded model without one.

    Raises:
        CaptureError: saying what to pass.
    """
    found: dict[str, Any] = {name: p for name, p in model.named_parameters() if is_distributed(p)}
    if mesh is None:
        if found:
            raise CaptureError(
                f"{next(iter(found))} is sharded (a DTensor): pass device_mesh=, the mesh that the model is sharded on, or "
                "load the float model whole"
            )
        return
    check_dims(mesh)
    if not found:
        raise CaptureError(
            f"device_mesh for a model that is not sharded: shard it ({_SHARD}), or leave device_mesh out"
        )
    for name, p in found.items():
        if p.device_mesh.ndim != 1 or p.device_mesh.mesh.tolist() != mesh.mesh.tolist():
            raise CaptureError(f"{name} is sharded on {p.device_mesh}, and not on device_mesh={mesh}: pass that one")


def check_dims(mesh: Any) -> None:
    """Raises CaptureError for what is no mesh of one dim."""
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise CaptureError(f"device_mesh={mesh!r}: pass a torch.distributed.device_mesh.DeviceMesh of one dim")
    if mesh.ndim != 1:
        raise CaptureError(
            f"device_mesh has {mesh.ndim} dims: pass the one that the model's linears are sharded on, such as mesh['tp']"
        )


def parallel_on(mesh: Any) -> Parallel:
    """The processes of a mesh; one process for None.

    Raises:
        CaptureError: for what is no mesh of one dim.
    """
    if mesh is None:
        return ALONE
    check_dims(mesh)
    return Parallel(mesh.get_local_rank(), mesh.size(), mesh.get_group())


def parallel_of(model: nn.Module) -> Parallel:
    """How the processes hold a model together.

    Raises:
        CaptureError: for shards of unequal size, parameters that are sums, or several groups of processes.
    """
    return parallel_among({n: p for n, p in model.named_parameters(remove_duplicate=False) if is_distributed(p)})


def parallel_among(found: Mapping[str, Any]) -> Parallel:
    """As `parallel_of`, of DTensors by name."""
    if not found:
        return ALONE
    dims, meshes = dict[str, int](), {p.device_mesh for p in found.values()}
    if len(meshes) > 1 or any(mesh.ndim != 1 for mesh in meshes):
        raise CaptureError(
            f"the model is sharded on {len(meshes)} meshes, {', '.join(map(str, meshes))}: shard it on one mesh of one dim"
        )
    mesh = meshes.pop()
    for name, p in found.items():
        dim = sharded_dim(name, p.placements[0], p.dim())
        if dim is not None:
            dims[name] = dim
            if p.dim() > 2:
                raise CaptureError(
                    f"{name} [{', '.join(map(str, p.shape))}] is sharded in dim {dim}: weights of experts are not taken in shards, "
                    "leave them whole"
                )
            if p.shape[dim] % mesh.size():
                raise CaptureError(
                    f"{name} has {p.shape[dim]} channels in dim {dim}, of which {mesh.size()} processes have unequal shards: "
                    "shard it over a number of processes that divides them, or leave it whole"
                )
    return Parallel(mesh.get_local_rank(), mesh.size(), mesh.get_group(), dims)


def sharded_dim(name: str, placement: Any, count: int) -> int | None:
    """The dim that a placement shards of so many, None for one that does not.

    Raises:
        CaptureError: for a placement that is neither of whole tensors nor of even slices.
    """
    if placement.is_replicate():
        return None
    if type(placement).__name__ != "Shard":
        raise CaptureError(f"the placement of {name} is {placement}: sqcompile takes Shard and Replicate")
    return placement.dim % count


@contextlib.contextmanager
def as_local(model: nn.Module) -> Iterator[None]:
    """The model's parameters are what this process holds of them, and its modules compute with that, as they are traced."""
    saved: list[tuple[nn.Module, str, nn.Parameter]] = []
    parts: dict[int, nn.Parameter] = {}  # one for each parameter, tied ones included
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
            if is_distributed(p):
                saved.append((module, name, p))
                parts.setdefault(id(p), nn.Parameter(local_part(p).detach(), requires_grad=False))
    if not saved:
        yield
        return
    try:
        for module, name, p in saved:
            setattr(module, name, parts[id(p)])
        with local_calls(saved):
            yield
    finally:
        for module, name, p in saved:
            setattr(module, name, p)


@contextlib.contextmanager
def local_calls(known: Sequence[tuple[nn.Module, str, Any]] = ()) -> Iterator[None]:
    """Calls on DTensors are computed on what this process holds, as they are traced.

    Args:
        known: modules, the names of their parameters, and the DTensors whose parts those are meanwhile.
    """
    mode = _Local(known)
    with traceable(mode.redistributed), mode:
        yield
    if any(not part.summed for part in mode.later):
        raise CaptureError(_NOT_SUMMED)


_NOT_SUMMED = (
    "a sum of several processes that a bias is added to is not summed up by itself: give RowwiseParallel "
    "output_layouts=Replicate(), or Shard() of another dim than the last, and use nothing of it before"
)


@dataclass(eq=False)
class _Part:
    """This process's part of a sum, and the bias that is added when it is summed."""

    out: Any
    bias: Tensor
    summed: bool = False


class _Local(TorchFunctionMode):
    """Linears, embeddings and norms of DTensors on their local parts."""

    def __init__(self, known: Sequence[tuple[nn.Module, str, Any]]) -> None:
        super().__init__()
        self.known = known
        self.later: list[_Part] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        rule = _RULES.get(func)
        if rule is None or not any(map(is_distributed, (*args, *(kwargs or {}).values()))):
            return func(*args, **(kwargs or {}))
        return rule(self, func, *args, **(kwargs or {}))

    def redistributed(self, move: Callable[..., Any], x: Any) -> Callable[..., Any]:
        """What moves x to other placements, and then adds a bias that waits for it."""
        part = next((part for part in self.later if part.out is x), None)
        if part is None:
            return lambda *args, **kwargs: move(x, *args, **kwargs)

        def run(*args: Any, **kwargs: Any) -> Any:
            out = move(x, *args, **kwargs)
            to = out.placements[0]
            if to.is_partial() or (to.is_shard() and to.dim % out.dim() == out.dim() - 1):
                raise CaptureError(_NOT_SUMMED)
            part.summed = True
            return _placed(out, out.to_local() + part.bias, to)

        return run

    def placement(self, t: Tensor) -> Any:
        """How a parameter is sharded; None for one that every process has whole."""
        if is_distributed(t):
            return t.placements[0]  # type: ignore[attr-defined]
        for module, name, p in self.known:
            if getattr(module, name) is t:
                return p.placements[0]
        return None

    def linear(self, func: Any, x: Any, weight: Any, bias: Any = None) -> Any:
        from torch.distributed.tensor import Partial, Shard

        given, of_weight = x.placements[0], self.placement(weight)
        last = given.is_shard() and given.dim % x.dim() == x.dim() - 1
        own, w = x.to_local(), local_part(weight)
        by_outputs = of_weight is not None and of_weight.is_shard(0)
        if of_weight is not None and of_weight.is_shard(1) and last:
            out = _placed(x, func(own, w), Partial())
            if bias is not None:
                self.later.append(_Part(out, local_part(bias)))
            return out
        if (
            last
            or given.is_partial()
            or (given.is_shard() and by_outputs)
            or (of_weight is not None and of_weight.is_shard(1))
        ):
            raise CaptureError(
                f"a linear whose weight is {of_weight or 'whole'} reads a tensor that is {given}: give its input the layout that its "
                "ParallelStyle wants, by input_layouts or PrepareModuleInput"
            )
        return _placed(x, func(own, w, local_part(bias)), Shard(x.dim() - 1) if by_outputs else given)

    def embedding(
        self, func: Any, ids: Any, weight: Any, padding_idx: Any = None, max_norm: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Without ``padding_idx``, which is for gradients."""
        from torch.distributed.tensor import Partial, Shard

        of_weight, own, w = self.placement(weight), local_part(ids), local_part(weight)
        if of_weight is None or not of_weight.is_shard():
            return _placed(ids, func(own, w, None, max_norm), ids.placements[0])
        if not ids.placements[0].is_replicate():
            raise CaptureError(
                f"an embedding that is {of_weight} reads ids that are {ids.placements[0]}: give every process all ids"
            )
        if of_weight.is_shard(1):
            return _placed(ids, func(own, w, None, max_norm), Shard(own.dim()))
        first = len(w) * ids.device_mesh.get_local_rank()
        others = (own < first) | (own >= first + len(w))
        found = func((own - first).masked_fill(others, 0), w, None, max_norm)
        return _placed(ids, found.masked_fill(others[..., None], 0.0), Partial())

    def norm(self, func: Any, x: Any, shape: Any, *args: Any, **kwargs: Any) -> Any:
        given = x.placements[0]
        if given.is_partial() or (given.is_shard() and given.dim % x.dim() >= x.dim() - len(shape)):
            raise CaptureError(f"a norm reads a tensor that is {given}: a norm needs all channels of a token")
        parts, named = map(local_part, args), {k: local_part(a) for k, a in kwargs.items()}
        return _placed(x, func(x.to_local(), shape, *parts, **named), given)


_RULES: dict[Any, Callable[..., Any]] = {
    F.linear: _Local.linear,
    F.embedding: _Local.embedding,
    F.layer_norm: _Local.norm,
    F.rms_norm: _Local.norm,
    torch.rms_norm: _Local.norm,  # as Dynamo has it
}


def _placed(like: Any, local: Tensor, placement: Any) -> Any:
    """A DTensor of the mesh of another."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(local, like.device_mesh, [placement], run_check=False)
