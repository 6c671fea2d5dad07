"""loop: one call of `generate`: the prompts at once, then token after token, the host some steps behind."""

from __future__ import annotations

import collections
import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sqcompile.generation.models import accepted
from sqcompile.generation.prompts import Prompts
from sqcompile.generation.reader import Reader
from sqcompile.generation.replay import Replays
from sqcompile.generation.settings import Settings
from sqcompile.generation.state import State

_AT_ONCE = 8  # steps on a GPU before the host looks at their tokens


@dataclass(frozen=True)
class Loop:
    """What a call has.

    Attributes:
        net: what is called for a token.
        model: the model of transformers in it.
        state: of the batch.
        replays: recorded steps, on a GPU.
        generator: what tokens are drawn from on other devices.
    """

    net: nn.Module
    model: Any
    state: State
    settings: Settings
    replays: Replays | None
    generator: torch.Generator | None

    def write(self, prompts: Prompts, reader: Reader) -> None:
        """Writes the text into the state.

        Raises:
            GenerationError: for a model whose calls cannot be repeated for each token.
        """
        state, kind, length = self.state, self.settings.kind(prompts.length), prompts.length
        known: dict[str, Any] = {"position_ids": None} if accepted(self.model, "position_ids") else {}
        if accepted(self.model, "logits_to_keep"):
            known["logits_to_keep"] = 1
        state.begin(prompts.ids, kind, self.settings)
        inputs = prompts.inputs(self.model, state.cache, prompts.ids, known, first=True)
        logits = self.net(**inputs, return_dict=True).logits
        if kind.penalty:
            state.count(prompts.ids, prompts.mask, logits.shape[-1])
        state.take(logits, kind, self._source())
        del logits, inputs
        waiting = collections.deque([reader.copied(length, length + 1)])
        with contextlib.nullcontext() if self.replays is None else self.replays.stream():
            if self.settings.new > 1:  # before anyone is told the first token: a model may be refused here
                inputs = prompts.inputs(self.model, state.cache, state.text[:, : length + 1], known, first=False)
                state.prepare(inputs, type(self.model).__name__)
            behind = 0 if self.replays is None else 1  # parts that are computed while the host looks at the one before
            done = 1
            while done < self.settings.new:
                while len(waiting) > behind and not reader.over:
                    reader.read(waiting.popleft())
                if reader.over:
                    break
                part = min(1 if self.replays is None else _AT_ONCE, self.settings.new - done)
                for i in range(done - 1, done - 1 + part):
                    self._step(i, kind)
                waiting.append(reader.copied(length + done, length + done + part))
                done += part
            while waiting:
                reader.read(waiting.popleft())

    def _source(self) -> torch.Generator | None:
        return self.generator if self.replays is None else self.replays.generator

    def _step(self, i: int, kind: Any) -> None:
        def step() -> None:
            self.state.step(self.net, kind, self._source())

        if self.replays is None:
            step()
        else:
            self.replays.step(i, step, self.net, self.model, kind)
