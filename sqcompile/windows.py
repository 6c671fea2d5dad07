"""windows: texts as token ids, cut to windows of one length. Any tokenizer that is called as transformers' are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from sqcompile.errors import EvaluationError


def token_windows(texts: Iterable[str], tokenizer: Any, length: int = 512, limit: int | None = None) -> Tensor:
    """Cuts texts into equal windows, each the BOS token and ``length - 1`` tokens of text.

    The texts are joined with EOS between them and cut without overlap; what is left at the end is dropped. With a
    tokenizer that has no BOS token, a window is ``length`` tokens of text; with one that has no EOS, nothing is between
    the texts.

    Args:
        texts: the texts, in order.
        tokenizer: as transformers' are called.
        length: tokens per window, at least 2.
        limit: at most this many windows, taken evenly over all the texts; all of them if None.

    Returns:
        int64 token ids, [windows, length].

    Raises:
        ValueError: ``length`` or ``limit`` is too small, or the texts do not fill one window.
    """
    if length < 2:
        raise ValueError(f"length must be at least 2, not {length}")
    check_limit(limit)
    stream, bos = encode_stream(texts, tokenizer), getattr(tokenizer, "bos_token_id", None)
    own = length if bos is None else length - 1
    count = len(stream) // own
    if count == 0:
        raise ValueError(
            f"the texts have {len(stream)} tokens, too few for one window of {length}: pass a smaller length="
        )
    windows = stream[: count * own].view(count, own)
    if bos is not None:
        windows = torch.cat([torch.full((count, 1), bos), windows], dim=1)
    return spread(windows, limit)


def check_text(texts: Iterable[str]) -> None:
    """Raises EvaluationError for text that UTF-8 cannot express, which no tokenizer takes."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as e:
            part = text[max(0, e.start - 10) : e.end + 10]
            raise EvaluationError(f"{part!r} is no text: it has half of a surrogate pair, mend or leave it out") from e


def encode_stream(texts: Iterable[str], tokenizer: Any) -> Tensor:
    """All texts as one int64 stream [tokens], with the EOS token after each, if there is one, and no BOS token."""
    texts = list(texts)
    if not texts:
        return torch.empty(0, dtype=torch.int64)
    check_text(texts)
    # A tokenizer remembers the padding of an earlier call until it is told otherwise.
    encoded = tokenizer(texts, add_special_tokens=False, padding=False, truncation=False)["input_ids"]
    eos = getattr(tokenizer, "eos_token_id", None)
    end = () if eos is None else (eos,)
    return torch.tensor([token for ids in encoded for token in (*ids, *end)], dtype=torch.int64)


def spread(windows: Tensor, limit: int | None) -> Tensor:
    """At most ``limit`` of the windows [windows, length], taken evenly over all of them; all if None."""
    if limit is None or limit >= len(windows):
        return windows
    return windows[torch.arange(limit) * len(windows) // limit]


def check_limit(limit: int | None) -> None:
    """Raises ValueError for a number of windows that is none, or under 1."""
    if limit is not None:
        check_count("limit", limit)


def check_count(name: str, count: Any) -> None:
    """Raises ValueError for what is no whole number of things, or under 1."""
    if type(count) is not int or count < 1:
        raise ValueError(f"{name} must be a whole number, at least 1, not {count!r}")
