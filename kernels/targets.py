"""Target: what a graph is lowered for. Which kernels there are, how weights are packed, which fusions exist.

`Target.of` finds the target of a device of this machine; `Target.named` gives any, so that a graph can be lowered for
another machine than this one. Whatever a graph was lowered for, its operators run where they have plain versions.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from sqcompile.errors import RecipeError
from sqcompile.kernels import fp8, fused
from sqcompile.kernels.cpu import arm, build, dispatch, rows, x86
from sqcompile.kernels.ops import LAUNCHING, ON_X86, on_cuda_library, on_x86_library, sqcompile_ops
from sqcompile.kernels.reference import UINT8_ZERO_POINT
from sqcompile.pytorch.core import has_avx2

Pack = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Operands:
    """What a quantized linear reads; nodes of a graph, or tensors.

    Attributes:
        q, scale: integers of the activations [..., K], and their factors.
        w, w_scale: the weight as `Target.pack` gives it, and float32 [N]; of experts a list of packed ones, or [E, N, K].
        beside: what `Target.pack` gives beside a packed weight.
        more: bias [N] or None; of experts their offsets.
        dtype: of the result.
    """

    q: Any
    scale: Any
    w: Any
    w_scale: Any
    beside: Any
    more: Any
    dtype: torch.dtype


Emit = Callable[[Operands], tuple[Any, tuple[Any, ...]]]  # the operator, and its arguments


def _fp8(o: Operands) -> tuple[Any, tuple[Any, ...]]:
    return sqcompile_ops.fp8_linear.default, (o.q, o.scale, o.w, o.w_scale, o.more, o.dtype)


@dataclass(frozen=True)
class Target:
    """A kind of machine.

    Attributes:
        name: such as "x86-vnni", "cuda-sm90" or "reference".
        device: the type of its devices, as in ``torch.device(type)``.
        linear, experts: the operator of a linear in INT8, and of routed experts.
        fp8: the operator of a linear in FP8.
        runs: whether what this target packs is packed, and runs, on this machine's CPU.
        has_fp8: whether it has FP8 kernels; without, plain PyTorch computes the product, with a warning.
        pack: int8 [N, K] -> the weight as the operator reads it, and what it reads beside it; None to leave it as it is.
            Packed weights are opaque: they cannot be saved.
        zero_point: of the activations' integers: 0 for int8, 128 for uint8.
        packs_experts: whether each expert's weight is packed, too.
        fuses: whose norms, activations and residuals become part of the kernels beside them: "cpu", "triton", or None.
        attention: whose float attention takes part: "cpu", "triton", or None for PyTorch's as it is.
        has_kernels: whether it has INT8 kernels of its own; without, the plain integer reference runs, with a warning.
        has_fast_int8: whether its tensor cores multiply INT8 faster than bfloat16.
    """

    name: str
    device: str
    linear: Emit
    experts: Emit
    pack: Pack | None = None
    zero_point: int = 0
    packs_experts: bool = False
    fuses: Literal["cpu", "triton"] | None = None
    attention: Literal["cpu", "triton"] | None = None
    has_kernels: bool = True
    fp8: Emit = _fp8
    has_fp8: bool = False
    has_fast_int8: bool = True
    runs: Callable[[], bool] = lambda: True

    def for_fp8(self) -> Target:
        """What FP8 linears are lowered for: operators of their own, and weights as they are."""
        return replace(self, linear=self.fp8, pack=None, zero_point=0, fuses=None, has_kernels=self.has_fp8)

    @staticmethod
    def of(device: torch.device) -> Target:
        """The target that a device of this machine is."""
        if device.type == "cuda" and fused.available(device):
            replay_launches()  # before the first kernel runs
        return _ready(_found(device))

    @staticmethod
    def given(target: Any) -> Target | None:
        """The target that a user names, or passes; None for none.

        Raises:
            RecipeError: for what is no target.
        """
        if target is None or isinstance(target, Target):
            return target
        if not isinstance(target, str):
            raise RecipeError(
                f"target={target!r}: pass the name of a target, one of {', '.join(t.name for t in _known())}"
            )
        return Target.named(target)

    def check(self, device: torch.device) -> None:
        """Refuses to lower tensors of a device for this target where their weights could not be packed.

        Raises:
            RecipeError: says why.
        """
        if self.pack is None:
            return
        if device.type != "cpu":
            raise RecipeError(
                f"target={self.name!r} packs weights on a CPU, and the model is on {device}: move it to the CPU"
            )
        if not self.runs():
            raise RecipeError(f"target={self.name!r} packs weights for such a CPU, and this one is none")

    def check_format(self, dtype: str) -> None:
        """Refuses a number format, "int8" or "fp8", in which a model would be slower than it is in float.

        Raises:
            RecipeError: names the one to choose.
        """
        if dtype == "int8" and not self.has_fast_int8:
            raise RecipeError(
                f"{self.name} multiplies INT8 several times slower than bfloat16: compile the model with Recipe(dtype='fp8') on such a GPU"
            )

    @staticmethod
    def named(name: str) -> Target:
        """A target by its name: "x86-amx", "x86-vnni", "x86-avx2", "arm64", "cuda-sm80" ... "cuda-sm120" or "reference".

        Raises:
            RecipeError: for a name that none has; it says which there are.
        """
        known = {target.name: target for target in _known()}
        if name not in known:
            raise RecipeError(f"target={name!r}: choose one of {', '.join(known)}")
        return known[name]


def check_format(dtype: str, device: torch.device, target: Target | None = None) -> None:
    """Refuses a number format before a model on a device is analysed, as `Target.check_format`; ``target``: None for its own.

    Raises:
        RecipeError: names the one to choose.
    """
    if target is not None or device.type != "cpu":  # no CPU refuses any, and some are known by what builds on them
        (target or _found(device)).check_format(dtype)


def begin(device: torch.device, inductor: bool) -> None:
    """Begins to build the C++ that a device needs, once per machine. Who needs it waits, and meanwhile a model is analysed.

    ``inductor``: whether Inductor compiles the model.
    """
    if device.type == "cpu":
        build.begin(rows.FILES, *([x86.FILES, dispatch.FILES] if has_avx2() else []), probe=inductor)
    elif device.type == "cuda" and fused.available(device):
        from sqcompile.kernels.triton.replay import FILES  # here: elsewhere nobody needs Triton

        build.begin(FILES, probe=False)


def _found(device: torch.device) -> Target:
    if device.type == "cuda" and fused.available(device):
        major, minor = torch.cuda.get_device_capability(device)
        return _cuda(10 * major + minor)
    here = (target for target, available in _CPUS if device.type == "cpu" and available())
    return next(here, None) or _reference(device.type, fp8.available(device))


def replay_launches() -> bool:
    """Has the operators that launch kernels of Triton replayed (`triton.replay`), once in a process; whether they are."""
    with _installing:
        return _replayed()


_installing = threading.Lock()


@functools.cache
def _replayed() -> bool:
    from sqcompile.kernels.triton.replay import install  # here: elsewhere nobody needs Triton

    return install(LAUNCHING, on_cuda_library)


TargetOf = Callable[[torch.device], Target]  # what tensors of a device are lowered for


def target_of(target: Target | None) -> TargetOf:
    """One target for all devices; for None, each device's own."""
    return Target.of if target is None else lambda device: _ready(target)


def _ready(target: Target) -> Target:
    """The target, with what its operators need in this process: before the first graph that is lowered for it runs."""
    if target.fuses == "cpu" and target.runs():
        dispatch.install(ON_X86, on_x86_library)
    return target


def _plain(o: Operands) -> tuple[Any, tuple[Any, ...]]:
    return sqcompile_ops.int8_linear.default, (o.q, o.scale, o.w, o.w_scale, o.more, o.dtype)


def _plain_experts(o: Operands) -> tuple[Any, tuple[Any, ...]]:
    return sqcompile_ops.int8_grouped_linear.default, (o.q, o.scale, o.w, o.w_scale, o.more, o.dtype)


def _fused(o: Operands) -> tuple[Any, tuple[Any, ...]]:
    return sqcompile_ops.int8_gemm.default, (o.q, o.scale, o.w, o.w_scale, o.more, o.dtype, "none", None, None)


def _u8s8(o: Operands) -> tuple[Any, tuple[Any, ...]]:
    return sqcompile_ops.int8_linear_packed.default, (o.q, o.scale, o.w, o.w_scale, o.beside, o.more, o.dtype)


def _u8s8_experts(o: Operands) -> tuple[Any, tuple[Any, ...]]:
    return sqcompile_ops.int8_grouped_linear_packed.default, (o.q, o.scale, o.w, o.w_scale, o.beside, o.more, o.dtype)


def _s8s8(o: Operands) -> tuple[Any, tuple[Any, ...]]:
    return sqcompile_ops.int8_linear_s8.default, (o.q, o.scale, o.w, o.w_scale, o.more, o.dtype)


def _x86(name: str, pack: Pack, runs: Callable[[], bool]) -> Target:
    return Target(
        name, "cpu", _u8s8, _u8s8_experts, pack, UINT8_ZERO_POINT, True, fuses="cpu", attention="cpu", runs=runs
    )


def _cuda(capability: int) -> Target:
    return Target(
        f"cuda-sm{capability}",
        "cuda",
        _fused,
        _plain_experts,
        fuses="triton",
        attention="triton",
        has_fp8=capability >= 89,
        # Blackwell Ultra, sm_103: 0.3 POPS of INT8 beside 2.5 PFLOPS of bfloat16 (its data sheet)
        has_fast_int8=capability != 103,
    )


def _reference(device: str, has_fp8: bool = False) -> Target:
    attention: Literal["cpu"] | None = "cpu" if device == "cpu" else None
    return Target("reference", device, _plain, _plain_experts, attention=attention, has_kernels=False, has_fp8=has_fp8)


# CPUs, the first that this one is; what is lowered for x86-amx and x86-vnni differs in nothing but the name: kernels choose
# when they run.
_CPUS: tuple[tuple[Target, Callable[[], bool]], ...] = (
    (_x86("x86-amx", x86.pack, lambda: x86.available()), lambda: x86.available() and x86.amx()),
    (_x86("x86-vnni", x86.pack, lambda: x86.available()), lambda: x86.available()),
    (_x86("x86-avx2", x86.pack_avx2, lambda: x86.has_avx2_kernels()), lambda: x86.has_avx2_kernels()),
    (
        Target(
            "arm64", "cpu", _s8s8, _plain_experts, arm.pack, attention="cpu", runs=torch.backends.mkldnn.is_available
        ),
        lambda: arm.available(),
    ),
)


def _known() -> list[Target]:
    cuda = [_cuda(capability) for capability in (80, 86, 89, 90, 100, 103, 120)]
    return [*(target for target, _ in _CPUS), *cuda, _reference("cpu")]
