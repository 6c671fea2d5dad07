"""streams: work of several CUDA streams that uses the same memory comes one after the other."""

from __future__ import annotations

import torch


def following(last: torch.cuda.Stream | None, device: torch.device) -> torch.cuda.Stream:
    """The stream of this call, which waits for ``last``, that of the call before."""
    current = torch.cuda.current_stream(device)
    if last is not None and current != last:
        current.wait_stream(last)
    return current
