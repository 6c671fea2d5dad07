"""run: the loop of `generate`, and what is kept of a model between two calls."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sqcompile.errors import GenerationError
from sqcompile.generation.cache import rounded
from sqcompile.generation.loop import Loop
from sqcompile.generation.models import check_device, check_record, longest_text, transformers_model, within_positions
from sqcompile.generation.prompts import Prompts, check_generator
from sqcompile.generation.reader import Reader
from sqcompile.generation.replay import Replays
from sqcompile.generation.settings import read_settings
from sqcompile.generation.state import State
from sqcompile.kernels.all_reduce import follow_sums
from sqcompile.process.streams import following

_MOST = 4  # states of one model that are kept


class Kept:
    """What is kept of one model.

    Attributes:
        states: by batch, length of the cache and whether steps are recorded, the one used last at the end.
        running: whether a call is under way, in the thread that has the lock.
        last: the stream of the call before, on a GPU.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.states: dict[tuple[int, int, bool], tuple[State, Replays | None]] = {}
        self.running = False
        self.last: torch.cuda.Stream | None = None

    def follow(self, device: torch.device) -> None:
        """Has the caller's stream wait for that of the call before, which may still read and write the states."""
        if device.type == "cuda":
            self.last = following(self.last, device)
            follow_sums(device)

    def settle(self) -> None:
        """Waits for the last call: the memory of a state that goes may be given to another stream than that call's."""
        if self.last is not None:
            self.last.synchronize()

    def state(self, model: Any, batch: int, longest: int, record: bool) -> tuple[State, Replays | None]:
        """The state of a batch, made if there is none; the one that was not used for longest goes then."""
        key = batch, longest, record
        found = self.states.pop(key, None)
        if found is not None and not found[0].fits(model):
            self.settle()
            found = None
        if found is None:
            while len(self.states) >= _MOST:
                self.settle()
                del self.states[next(iter(self.states))]
            found = State(model, batch, longest), Replays(model.device) if record else None
        self.states[key] = found
        return found

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """One call at a time.

        Raises:
            GenerationError: for a call from the callback of another one.
        """
        with self.lock:
            if self.running:
                raise GenerationError(
                    "a callback of sqcompile.generate cannot call it for the same model: return first"
                )
            self.running = True
            try:
                yield
            finally:
                self.running = False


_kept: weakref.WeakKeyDictionary[nn.Module, Kept] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def run(
    net: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    generation_config: Any,
    generator: torch.Generator | None,
    callback: Callable[[Tensor], object] | None,
    record: bool,
    overrides: Mapping[str, Any],
) -> Tensor:
    """See `sqcompile.generate`."""
    model = transformers_model(net)
    check_device(model)
    check_generator(generator, model.device)
    check_record(record, model.device)
    with torch.inference_mode(False), torch.no_grad():  # what is kept serves calls of either mode
        prompts = Prompts(model, input_ids, attention_mask)
        settings = read_settings(
            model.generation_config, generation_config, overrides, prompts.length, longest_text(model)
        )
        prompts.find_padding(settings)
        with _lock:
            kept = _kept.setdefault(net, Kept())
        with kept.alone():
            kept.follow(model.device)
            state, replays = kept.state(model, prompts.batch, rounded(settings.cache), record)
            reader = Reader(state.text, settings.eos, callback)
            loop = Loop(net, model, state, settings, replays, generator)
            recorded = contextlib.nullcontext() if replays is None else replays.call(model, generator)
            with within_positions(model, prompts.length + settings.new), recorded:
                loop.write(prompts, reader)
            new = reader.taken if reader.looks else settings.new
            return state.text[:, : prompts.length + new].to(input_ids.device, copy=True)


def free(net: nn.Module) -> None:
    """See `sqcompile.free_generation`."""
    with _lock:
        kept = _kept.pop(net, None)
    if kept is not None:
        kept.settle()
