"""batches: what calibration batches hold besides the arguments of a call: targets, other columns, a missing batch dim."""

from __future__ import annotations

import inspect
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sqcompile.pytorch.core import pytree

# Arguments that a loss is computed from, as training loops name them. No call at inference has them.
TARGETS = {
    "labels", "label", "label_ids", "start_positions", "end_positions", "next_sentence_label", "sentence_order_label",
    "return_loss", "num_items_in_batch",
}  # fmt: skip

_DECODER_TOKENS = ("decoder_input_ids", "decoder_inputs_embeds")


ROWS = 512  # of calibration data that are taken where nobody says how many


def first_batches(batches: Iterable[Any], most: int | None, single: bool) -> Iterator[Any]:
    """The first batches, and no look at those after them.

    Args:
        batches: the data.
        most: how many; None for as many as have `ROWS` rows.
        single: whether each is one row.
    """
    rows = 0
    for i, batch in enumerate(batches):
        yield batch
        rows += 1 if single else _rows(batch)
        if i + 1 == most or (most is None and rows >= ROWS):
            return


def _rows(batch: Any) -> int:
    """How many rows a batch has, by its first tensor of more than one dim: labels and times of diffusion may come before it.

    Token ids without a batch dim are one.
    """
    named = {n: x for n, x in batch.items() if n not in TARGETS} if isinstance(batch, Mapping) else batch
    found = (x for x in pytree.tree_leaves(named) if isinstance(x, Tensor) and x.dim() > 1)
    first = next(found, None)
    return 1 if first is None else int(first.shape[0])


def split(signature: inspect.Signature, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], list[str]]:
    """A batch as arguments, and what it holds beyond them, in words.

    A list or tuple may have elements more than the forward has parameters, as ``(x, y)`` of a loader for training, and a
    mapping columns that are none.
    """
    params = list(signature.parameters.values())
    if isinstance(batch, Mapping):
        if any(p.kind is p.VAR_KEYWORD for p in params):
            # what reaches a model this way and is text is a column of the data set
            beyond = [n for n, v in batch.items() if n not in signature.parameters and _is_text(v)]
        else:
            beyond = [n for n in batch if n not in signature.parameters]
        kwargs = {n: v for n, v in batch.items() if n not in beyond}
        return (), kwargs, [repr(n) for n in beyond if n not in TARGETS]
    args = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
    takes = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in params)
    targets = args[takes:]
    if any(p.kind is p.VAR_POSITIONAL for p in params) or not takes or not all(map(_is_data, targets)):
        return args, {}, []
    return args[:takes], {}, [f"element {takes + i}" for i in range(len(targets))]


def _is_text(value: Any) -> bool:
    leaves = pytree.tree_leaves(value)
    return bool(leaves) and all(isinstance(leaf, (str, bytes)) for leaf in leaves)


def _is_data(value: Any) -> bool:
    return isinstance(value, (Tensor, int, float, str))


def _may_miss(signature: inspect.Signature, name: str) -> bool:
    param = signature.parameters.get(name)
    return param is None or param.default is not param.empty


def without_targets(
    model: nn.Module, signature: inspect.Signature, kwargs: dict[str, Any], kept: Container[str] = ()
) -> dict[str, Any]:
    """Keyword arguments without those that only a loss needs, but for ``kept``.

    Where a decoder's tokens are left to be made of the labels, as data collators do, they are made here.
    """
    left = {n: v for n, v in kwargs.items() if n not in TARGETS or n in kept or not _may_miss(signature, n)}
    labels, names = kwargs.get("labels"), signature.parameters
    if (
        "labels" not in left
        and isinstance(labels, Tensor)
        and _DECODER_TOKENS[0] in names
        and left.keys().isdisjoint(_DECODER_TOKENS)
    ):
        tokens = _shifted(model, labels)
        return left if tokens is None else {**left, _DECODER_TOKENS[0]: tokens}
    return left


def _shifted(model: Any, labels: Tensor) -> Tensor | None:
    """A decoder's input: the start token, then the labels but for the last one."""
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if prepare is not None:
        return prepare(labels=labels)
    start, pad = (getattr(getattr(model, "config", None), n, None) for n in ("decoder_start_token_id", "pad_token_id"))
    if start is None or pad is None:
        return None
    first = torch.full_like(labels[:, :1], start)
    return torch.cat([first, labels[:, :-1].masked_fill(labels[:, :-1] == -100, pad)], 1)


def is_dataset(loader: Any) -> bool:
    """Whether a loader is a ``datasets.Dataset``, whose elements are samples: rows without a batch dim."""
    return type(loader).__module__.partition(".")[0] == "datasets"


def with_batch_dim(kwargs: dict[str, Any], rows: bool) -> dict[str, Any]:
    """Keyword arguments with a batch of one, if they are one sample: ``rows`` says so, or token ids without a batch dim."""
    ids = [kwargs.get(n) for n in ("input_ids", _DECODER_TOKENS[0])]
    if rows or any(isinstance(x, Tensor) and x.dim() == 1 and not x.is_floating_point() for x in ids):
        return {n: v.unsqueeze(0) if isinstance(v, Tensor) else v for n, v in kwargs.items()}
    return kwargs
