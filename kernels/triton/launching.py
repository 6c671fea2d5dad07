"""launch: a kernel on its grid, and what was launched, for `replay`.

A `Recorder` sees what an operator does for one call: which buffers it makes, which kernels it launches with which arguments.
What it writes down are numbers alone (`replay.cpp` reads them), with addresses said as "the second tensor of the call" or
"the first buffer made": so the same kernels can be launched for other tensors of the same layout. An operator that does
anything else, such as a copy, is not replayed. A buffer of zeros, or of bytes that are all 255, is filled again.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sqcompile.pytorch.core import TorchDispatchMode

aten = torch.ops.aten
# operators that make a buffer, whatever is in it
_MAKES = {aten.empty.memory_format, aten.empty_strided.default, aten.new_empty.default, aten.empty_like.default}
_NUMBER, _POINTER, _MAP = 0, 1, 2  # kinds of parameters, as in replay.cpp
_MOST_SHARED = 228 * 1024  # bytes of shared memory beyond which Triton launches in a way of its own
# How the driver numbers the types of tensor maps that Triton's device code numbers otherwise.
_DRIVER_TYPES = {8: 10, 9: 8, 10: 9}
_here = threading.local()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """``kernel[grid](*args, **options)``."""
    compiled = kernel[grid](*args, **options)
    recorder: Recorder | None = getattr(_here, "recorder", None)
    if recorder is not None:
        recorder.launched(kernel, compiled, grid, args, options)


class Unrecordable(Exception):
    """What an operator did that cannot be replayed."""


class Recorder(TorchDispatchMode):
    """What is launched within, in one thread.

    Attributes:
        why: what stands in the way of a replay; None if nothing does.
    """

    def __init__(self, arguments: Sequence[Any]) -> None:
        super().__init__()
        self.given = {t.data_ptr(): i for i, t in reversed([*enumerate(t for t in arguments if isinstance(t, Tensor))])}
        self.count = sum(isinstance(t, Tensor) for t in arguments)
        self.made: list[Tensor] = []
        self.bytes: dict[int, int] = {}  # that buffers are filled with, by where they start
        self.kernels: list[tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = []
        self.why: str | None = None

    def __enter__(self) -> Recorder:
        _here.recorder = self
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        _here.recorder = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        byte = _filled_with(func, args, out)
        if func in _MAKES or byte is not None:
            self.made.append(out)
            self.bytes |= {} if byte is None else {_start(out): byte}
        elif not func.is_view:
            self.why = self.why or f"it calls {func}"
        return out

    def launched(self, kernel: Any, compiled: Any, grid: tuple[int, ...], args: Any, options: Any) -> None:
        names = kernel.signature.parameters
        bound = kernel.signature.bind(*args, **{k: v for k, v in options.items() if k in names})
        bound.apply_defaults()
        self.kernels.append((compiled, grid, bound.args, bound.kwargs))

    def words(self, outputs: Sequence[Any]) -> list[int]:
        """The call as `replay.cpp` reads it; no outputs and nothing else if it cannot be replayed."""
        try:
            return self._words(outputs)
        except Unrecordable as e:
            self.why = self.why or str(e)
            return [0, 0, 0]

    def _words(self, outputs: Sequence[Any]) -> list[int]:
        if self.why or not self.kernels:
            raise Unrecordable(self.why or "it launches nothing")
        buffers = [*outputs]
        own = {_start(b) for b in self.made}
        for y in outputs:
            whole = y.data_ptr() == _start(y) and y.untyped_storage().nbytes() == y.numel() * y.element_size()
            if y.numel() and not (whole and _start(y) in own):
                raise Unrecordable("an output is no buffer that it made")
        starts = {_start(y) for y in outputs if y.numel()}
        buffers += [b for b in self.made if b.numel() and _start(b) not in starts]
        places = {b.data_ptr(): self.count + i for i, b in enumerate(buffers) if b.numel()}
        words = [len(outputs), len(buffers)]
        for b in buffers:
            words += [_NUMBERS[b.dtype], self.bytes.get(_start(b), -1), *_listed(b.shape), *_listed(b.stride())]
        words.append(len(self.kernels))
        for compiled, grid, args, kwargs in self.kernels:
            words += _launch(compiled, grid, [*args, *kwargs.values()], self.given | places)
        return words


def _filled_with(func: Any, args: Sequence[Any], made: Any) -> int | None:
    """The byte that every byte of a new tensor is; None for what makes none, or another."""
    if func is aten.zeros.default:
        return 0
    minus_one = func is aten.full.default and args[1] == -1 and made.dtype in (torch.int8, torch.int32, torch.int64)
    return 255 if minus_one else None


def _launch(compiled: Any, grid: tuple[int, ...], values: list[Any], places: dict[int, int]) -> list[int]:
    about = compiled.metadata
    odd = about.num_ctas != 1 or about.launch_cooperative_grid or about.profile_scratch_size
    if odd or about.shared > _MOST_SHARED or not compiled.function:
        raise Unrecordable(f"{compiled.name} is launched in a way of its own")
    grid = (*grid, 1, 1)[:3]
    scratch = grid[0] * grid[1] * grid[2] * about.global_scratch_size
    metas = iter(getattr(about, "tensordesc_meta", None) or ())
    parameters = [*_parameters([*compiled.src.signature.values()], values, metas, places)]
    words = [compiled.function, *grid, 32 * about.num_warps, about.shared, int(about.launch_pdl), scratch]
    return [*words, len(parameters), *(word for p in parameters for word in p)]


def _parameters(
    types: Sequence[Any], values: Sequence[Any], metas: Iterator[Any], places: dict[int, int]
) -> Iterator[list[int]]:
    """The parameters of compiled code, in their order: what is constant there is none."""
    for kind, x in zip(types, values, strict=True):
        if isinstance(kind, tuple):
            yield from _parameters(kind, x, metas, places)
        elif kind == "constexpr":
            continue
        elif kind.startswith("tensordesc"):
            yield from _descriptor(x, next(metas, None), places)
        elif kind.startswith("*"):
            yield [_POINTER, _place(x, places)]
        elif kind in ("fp32", "fp64"):
            bits = struct.pack("<f", x) + bytes(4) if kind == "fp32" else struct.pack("<d", x)
            yield [_NUMBER, int.from_bytes(bits, "little", signed=True)]
        elif kind[0] in "iu" and kind[1:].isdigit():
            yield [_NUMBER, int(x)]
        else:
            raise Unrecordable(f"a parameter is {kind}")


def _descriptor(x: TensorDescriptor, meta: Any, places: dict[int, int]) -> Iterator[list[int]]:
    """A tensor map for TMA, and the sizes and strides that follow it."""
    if meta is None or meta["fp4_padded"] or meta.get("is_im2col") or x.padding != "zero":
        raise Unrecordable("a descriptor is of another kind")
    size, kind = meta["elem_size"], _DRIVER_TYPES.get(meta["elem_type"], meta["elem_type"])
    sizes, strides = (
        [*reversed(x.shape)],
        [size * s for s in reversed(x.strides[:-1])],
    )  # the driver's last dim is ours first
    box = [*reversed(meta["block_size"])]
    yield [
        _MAP, _place(x.base, places), kind, meta["swizzle"], *_listed(sizes), *_listed([*strides, 0]), *_listed(box)
    ]  # fmt: skip
    yield from ([_NUMBER, int(n)] for n in (*x.shape, *x.strides))


def _place(x: Tensor | None, places: dict[int, int]) -> int:
    """Which of the call's tensors, or of the buffers made for it, starts where x does."""
    if x is None:
        return -1
    if x.data_ptr() not in places:
        raise Unrecordable("a kernel reads within a tensor")
    return places[x.data_ptr()]


def _start(y: Tensor) -> int:
    return y.untyped_storage().data_ptr()


def _listed(x: Sequence[int]) -> list[int]:
    return [len(x), *x]


# c10::ScalarType's order, which serialized models rely on
_NUMBERS = {
    torch.uint8: 0, torch.int8: 1, torch.int16: 2, torch.int32: 3, torch.int64: 4, torch.float16: 5, torch.float32: 6,
    torch.float64: 7, torch.bool: 11, torch.bfloat16: 15, torch.float8_e4m3fn: 24,
}  # fmt: skip
