"""data: what a model is evaluated on, as batches: text, token ids, or a loader as calibration takes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sqcompile.capture.batches import is_dataset
from sqcompile.capture.inputs import Reader, length
from sqcompile.errors import EvaluationError
from sqcompile.windows import check_count, check_limit, spread, token_windows

LENGTH = 512  # tokens of a window, where the model takes as many
_LOADER = "a loader or list of batches"


def batches(
    data: Any, reader: Reader, tokenizer: Any, tokens: int, limit: int | None, batch_size: int
) -> tuple[Iterable[Any], int | None]:
    """The batches of the data, each as calibration takes one, and how many there are, where that is known.

    Args:
        data: see `sqcompile.evaluate`.
        reader: it is told whether the batches are rows of a data set.
        tokenizer: of text.
        tokens: of a window of text.
        limit: at most so many windows of text or token ids; of a loader, `evaluate` counts them.
        batch_size: windows of a batch of text or token ids.

    Raises:
        EvaluationError: for what is no data, saying what to pass.
    """
    try:
        check_count("batch_size", batch_size)
        check_limit(limit)
        windows = _windows(data, tokenizer, tokens, limit)
    except ValueError as e:
        raise EvaluationError(str(e)) from e
    if windows is None:
        reader.rows = is_dataset(data)
        return data, length(data)
    parts = [part for same in windows for part in same.split(batch_size)]
    by_name = "input_ids" in reader.forward.signature.parameters
    return [{"input_ids": ids} if by_name else ids for ids in parts], len(parts)


def _windows(data: Any, tokenizer: Any, tokens: int, limit: int | None) -> list[Tensor] | None:
    """Token ids int64 [windows, length], those of one length together; None for a loader."""
    if isinstance(data, str):
        data = [data]
    if isinstance(data, Tensor):
        return [spread(_ids(data), limit)]
    if isinstance(data, Mapping):
        raise EvaluationError(f"data is one batch, a {type(data).__name__}: wrap it in a list, data=[batch]")
    if not isinstance(data, Iterable):
        raise EvaluationError(f"data is a {type(data).__name__}: pass text, token ids [windows, length] or {_LOADER}")
    if not isinstance(data, (list, tuple)) or not data:
        return None
    if all(isinstance(x, str) for x in data):
        if tokenizer is None:
            raise EvaluationError("data is text: pass the model's tokenizer, tokenizer=")
        return [token_windows(data, tokenizer, tokens, limit)]
    if all(_is_row(x) for x in data):
        rows = [torch.as_tensor(x, dtype=torch.int64) for x in data]
        if limit is not None and limit < len(rows):
            rows = [rows[i * len(rows) // limit] for i in range(limit)]
        sizes = dict.fromkeys(len(r) for r in rows)
        return [torch.stack([r for r in rows if len(r) == size]) for size in sizes]
    if isinstance(data[0], int):
        raise EvaluationError("data is one row of token ids: cut it to windows of one length, [windows, length]")
    return None


def _ids(data: Tensor) -> Tensor:
    if data.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8):
        raise EvaluationError(f"data is one tensor of {data.dtype}: wrap batches in a list, data=[batch]")
    if data.dim() != 2:
        raise EvaluationError(
            f"data is token ids {list(data.shape)}: pass [windows, length], "
            f"{'ids.view(-1, length)' if data.dim() == 1 else 'or a list of batches'}"
        )
    return data.long()


def _is_row(x: Any) -> bool:
    """Whether something is the token ids of one window."""
    if isinstance(x, Tensor):
        return x.dim() == 1 and not x.is_floating_point() and x.dtype != torch.bool
    return isinstance(x, Sequence) and not isinstance(x, str) and bool(x) and all(type(i) is int for i in x)
