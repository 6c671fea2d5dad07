"""cuda_graphs: a compiled graph that is replayed as a CUDA graph where calls of the same sizes come again and again.

    call 1 of some sizes    runs
    call 2                  runs on buffers of its own for the inputs: kernels are ready for these addresses then
    call 3                  is recorded, and replayed
    call 4, ...             copies the inputs into the buffers, replays, copies the results out

What a graph writes to (a static KV cache), or is marked to keep its address, is used where it lies: another address is
another recording. Sizes must come three times in a row, so decoding with a static cache is recorded, while prompts of
changing lengths and caches that grow with each token are not. Results are the caller's own: the next call does not
overwrite them. Calls of one model come one after another, from whichever threads and streams: they have one set of
buffers.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sqcompile.errors import first_line
from sqcompile.kernels.all_reduce import follow_sums
from sqcompile.process.streams import following
from sqcompile.pytorch.core import end_allocating, is_same_element_twice
from sqcompile.pytorch.dynamo import has_static_address

log = logging.getLogger("sqcompile")

_off = contextvars.ContextVar("_off", default=False)


@contextlib.contextmanager
def not_recorded() -> Iterator[None]:
    """While this lasts, graphs run kernel by kernel: for a caller who records them as a part of something larger."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


_MOST = 16  # recordings of one graph: batch sizes and caches in use at a time


class Recorder:
    """Runs a function of tensors and numbers, or replays it.

    Attributes:
        written: the positions of the arguments that the function writes to.
        fixed: the positions of those that are used where they lie: written to, or marked; known from the first call.
        recordings: by the sizes and strides of the arguments, and the addresses of the fixed ones.
    """

    def __init__(self, run: Callable[..., Any], written: Sequence[int], pool: Pool) -> None:
        self.run, self.written, self.pool = run, frozenset(written), pool
        self.fixed: frozenset[int] | None = None
        self.recordable = True
        self.recordings: dict[Hashable, Recording] = {}
        self.last: Hashable = None

    def __call__(self, *args: Any) -> Any:
        if self.recordable and not _off.get() and not self.pool.recording():
            with self.pool.lock:
                results = self._replayed(args)
            if results is not None:
                return results
        return self.run(*args)

    def _replayed(self, args: Sequence[Any]) -> list[Any] | None:
        """The results of a recording, or None for a call that has none and is not to be recorded."""
        if self.fixed is None:
            marked = {i for i, a in enumerate(args) if has_static_address(a)}
            self.fixed = self.written | marked
        key = self._key(args, self.fixed)
        again, self.last = key == self.last, key
        found = self.recordings.pop(key, None)
        if found is None and not (again and self._can_record(args)):
            return None
        if found is None:
            log.debug("a CUDA graph is recorded, the %d. of its graph", len(self.recordings) + 1)
            found = Recording(self.run, args, self.fixed)
        self.pool.follow()
        try:
            results = found(args, self.pool)
        except NotRecorded as e:
            warnings.warn(
                f"a graph cannot be recorded as a CUDA graph and runs kernel by kernel ({first_line(e.__cause__ or e)}): "
                "leave out mode='reduce-overhead', or mend what cannot be recorded",
                stacklevel=2,
            )
            self.recordable = False
            self.recordings.clear()
            return None
        # a replay does not count as a write, and versions say whether a tensor of the model has changed
        torch.autograd.graph.increment_version([args[i] for i in self.written if not args[i].is_inference()])
        self.recordings[key] = found  # the one used last is the last to go
        if len(self.recordings) > _MOST:
            del self.recordings[next(iter(self.recordings))]
        return results

    @staticmethod
    def _key(args: Sequence[Any], fixed: frozenset[int]) -> Hashable:
        """What a recording depends on; a few dozen microseconds for the cache of 32 layers."""
        tensors = [a for a in args if isinstance(a, Tensor)]
        return (
            *[args[i].data_ptr() for i in fixed],
            *[a.shape for a in tensors],
            *[a.stride() for a in tensors],
            *[a for a in args if not isinstance(a, Tensor)],
        )

    def _can_record(self, args: Sequence[Any]) -> bool:
        """Not with inputs elsewhere, such as numbers on the CPU, or inputs that are part of a written one."""
        states = {args[i].untyped_storage().data_ptr() for i in self.written}
        return all(
            a.device == self.pool.device
            and (i in self.written or a.untyped_storage().data_ptr() not in states)
            and not is_same_element_twice(a)  # which nothing can be copied into
            for i, a in enumerate(args)
            if isinstance(a, Tensor)
        )


class NotRecorded(Exception):
    """A call that cannot be recorded; its cause says why. Nothing has run."""


class Recording:
    """The calls of one set of sizes.

    Attributes:
        buffers: a copy of each input that has no fixed address, in its layout; None for the others.
        replay: None until the second call.
    """

    def __init__(self, run: Callable[..., Any], args: Sequence[Any], fixed: frozenset[int]) -> None:
        with torch.inference_mode(False):  # it must not matter in which mode later calls are
            self.buffers = [
                torch.empty_strided(a.size(), a.stride(), dtype=a.dtype, device=a.device)
                if isinstance(a, Tensor) and i not in fixed
                else None
                for i, a in enumerate(args)
            ]
        self.run = run
        self.warm = False
        self.replay: Callable[[], None] | None = None
        self.results: list[Any] = []

    def __call__(self, args: Sequence[Any], pool: Pool) -> list[Any]:
        for buffer, a in zip(self.buffers, args, strict=True):
            if buffer is not None:
                buffer.copy_(a)
        if self.replay is not None:
            self.replay()
            return [make(args) for make in self.results]
        inputs = [a if buffer is None else buffer for buffer, a in zip(self.buffers, args, strict=True)]
        if not self.warm:
            self.warm = True
            return [self._result(r, inputs)(args) for r in self.run(*inputs)]
        results, self.replay = pool.record(lambda: self.run(*inputs))
        self.results = [self._result(r, inputs) for r in results]
        return [make(args) for make in self.results]

    def _result(self, result: Any, inputs: Sequence[Any]) -> Callable[[Sequence[Any]], Any]:
        """A function from a call's arguments to its result: a view of an argument where it is one, or a copy.

        No written tensor is kept: a cache that nobody uses any more must be freed.
        """
        if not isinstance(result, Tensor):
            return lambda args: result
        storage = result.untyped_storage().data_ptr()
        for i, x in enumerate(inputs):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() == storage:
                size, stride, offset = result.size(), result.stride(), result.storage_offset() - x.storage_offset()
                return lambda args: args[i].as_strided(size, stride, args[i].storage_offset() + offset)
        return lambda args: result.clone()


class Pool:
    """Records CUDA graphs that share their memory: the results of one are copied before another one runs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self.handle: Any = None
        self.lock = threading.Lock()
        self.last = self.stream
        with torch.cuda.stream(self.stream):
            # What is recorded registers a generator, a few bytes on this stream. PyTorch 2.11 aborts the process where they
            # cannot be had; beside this tensor, whose page of memory is kept, they always can.
            self._mark = torch.zeros(1, device=device)

    def follow(self) -> None:
        """Has the stream of this call wait for that of the call before, which may still use the buffers.

        What is recorded may have sums over GPUs in it, which have memory of their own.
        """
        self.last = following(self.last, self.device)
        follow_sums(self.device)

    @staticmethod
    def recording() -> bool:
        """Whether somebody else records the calls of this stream."""
        return torch.cuda.is_current_stream_capturing()

    def record(
        self, run: Callable[[], Any], generators: Sequence[torch.Generator] = ()
    ) -> tuple[list[Any], Callable[[], None]]:
        """Records a function, runs it, and gives its results and what runs it again on the same tensors.

        Args:
            run: the function.
            generators: what it draws random numbers from, beside the device's own: each replay draws others.

        Raises:
            NotRecorded: if it does what a CUDA graph cannot; it has not run then.
        """
        if not self.graphs:  # a pool goes with the last of its graphs
            self.handle = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        before = torch.cuda.current_stream(self.device)
        try:
            with (
                torch.cuda.device(self.device),
                torch.cuda.graph(graph, self.handle, self.stream, capture_error_mode="thread_local"),
            ):
                results = run()
        except torch.OutOfMemoryError:
            self._end(before, generators)
            raise
        except RuntimeError as e:
            self._end(before, generators)
            raise NotRecorded from e
        self.graphs.add(graph)
        graph.replay()
        return results, graph.replay

    def _end(self, before: torch.cuda.Stream, generators: Sequence[torch.Generator]) -> None:
        """Ends what PyTorch leaves begun where a recording fails: its stream, its memory, and its random numbers.

        A generator that takes itself for recorded refuses to draw, until a recording with it has ended.
        """
        torch.cuda.set_stream(before)
        end_allocating(self.device, self.handle)
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        with (
            torch.cuda.device(self.device),
            torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"),
        ):
            self._mark.add_(1)
