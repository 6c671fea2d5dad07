"""reader: new tokens as the host sees them, some steps after the device has computed them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Reader:
    """Looks for the end of texts, and hands tokens on.

    Attributes:
        looks: whether anybody wants to see tokens before the last.
        taken: new tokens that belong to the texts, so far.
        over: whether all texts have ended.
    """

    def __init__(self, text: Tensor, eos: tuple[int, ...], callback: Callable[[Tensor], object] | None) -> None:
        self.text, self.callback = text, callback
        self.eos = torch.tensor(eos, dtype=torch.int64)
        self.ended = torch.zeros(len(text), dtype=torch.bool)
        self.looks = bool(eos) or callback is not None
        self.taken, self.over = 0, False

    def copied(self, start: int, end: int) -> tuple[Tensor, Any] | None:
        """A copy of columns of the text for the host, and what to wait for; None if nobody looks."""
        if not self.looks:
            return None
        part = self.text[:, start:end].contiguous()
        if not part.is_cuda:
            return part.cpu().clone(), None
        host = torch.empty(part.shape, dtype=part.dtype, pin_memory=True)
        host.copy_(part, non_blocking=True)
        return host, torch.cuda.current_stream(part.device).record_event()

    def read(self, copy: tuple[Tensor, Any] | None) -> None:
        """Takes what was copied, up to where all texts have ended."""
        if copy is None:
            return
        tokens, event = copy
        if event is not None:
            event.synchronize()
        for column in tokens.unbind(1):
            if self.over:
                return
            self.taken += 1
            self.ended |= torch.isin(column, self.eos)
            self.over = bool(self.ended.all())
            if self.callback is not None:
                self.callback(column.clone())
