"""compared: what of a model's outputs is compared, by what they are, and which of their rows count.

    next_token  logits [batch, tokens, vocabulary] of a model of token ids: perplexity, KL divergence, top-1 agreement
    tokens      logits [batch, tokens, classes] of each token itself (masked language models, token classifiers)
    classes     logits [batch, classes] of a classifier
    outputs     anything else: relative error and cosine

Logits are what is called ``logits`` in the output, or the output itself, where it is a tensor. Padding never counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sqcompile.capture.inputs import Call
from sqcompile.errors import EvaluationError
from sqcompile.pytorch.core import pytree
from sqcompile.statistics.padding import token_mask

KINDS = ("next_token", "tokens", "classes", "outputs")
IGNORED = -100  # the label of what no loss counts
_OF_THE_TOKEN_ITSELF = ("MaskedLMOutput", "TokenClassifierOutput")  # as transformers names outputs


@dataclass(frozen=True)
class Tokens:
    """What a batch says of its tokens.

    Attributes:
        ids: what logits are of, int64 [batch, tokens]: of an encoder-decoder, the decoder's; None without token ids.
        mask: bool [batch, tokens], True where a token is real; None where all are.
        labels: int64 [batch, tokens], -100 where a token does not count; None if there are none.
        of_decoder: whether labels are the next tokens already, as an encoder-decoder takes them.
    """

    ids: Tensor | None
    mask: Tensor | None
    labels: Tensor | None
    of_decoder: bool = False

    @staticmethod
    def of(batch: Any, call: Call) -> Tokens:
        """``batch`` is what the user passed: it may have a mask or labels that the model does not take."""
        raw = {n: _batched(v) for n, v in batch.items() if isinstance(v, Tensor)} if isinstance(batch, Mapping) else {}
        decoder = "decoder_input_ids" in call.kwargs
        ids = call.kwargs.get("decoder_input_ids" if decoder else "input_ids")
        if ids is None and not decoder:
            ids = next((x for x in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(x, Tensor)), None)
        name = "decoder_attention_mask" if decoder else "attention_mask"
        mask = call.kwargs.get(name, raw.get(name))
        found = token_mask(mask) if isinstance(mask, Tensor) else None
        labels = raw.get("labels")
        return Tokens(ids if _is_tokens(ids) else None, found, labels if _is_tokens(labels) else None, decoder)

    def predicted(self) -> tuple[Tensor, Tensor] | None:
        """The token after each, int64 [batch, tokens], and where it counts, bool; None without token ids and labels."""
        stream = self.ids if self.labels is None else self.labels
        if stream is None:
            return None
        if self.of_decoder and self.labels is not None:
            return stream, self._counted(stream != IGNORED, self.mask)
        after = torch.cat([stream[:, 1:], torch.full_like(stream[:, :1], IGNORED)], 1)
        mask = self.mask
        if mask is not None and mask.shape == stream.shape:  # what comes after padding has nothing before it
            mask = mask & torch.cat([mask[:, 1:], mask[:, :1]], 1)
        return after, self._counted(after != IGNORED, mask)

    def real(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Which tokens count, bool [batch, tokens], or all of another shape."""
        counted = torch.ones(shape, dtype=torch.bool, device=device)
        if self.labels is not None and self.labels.shape == shape:
            counted &= self.labels.to(device) != IGNORED
        return self._counted(counted, self.mask)

    def _counted(self, where: Tensor, mask: Tensor | None) -> Tensor:
        return where & mask.to(where.device) if mask is not None and mask.shape == where.shape else where


def _batched(x: Tensor) -> Tensor:
    return x.unsqueeze(0) if x.dim() == 1 else x


def _is_tokens(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() == 2 and x.dtype in (torch.int64, torch.int32)


def logits_of(out: Any) -> tuple[Tensor | None, bool]:
    """The logits in an output, and whether they are called so."""
    named = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", None)
    if isinstance(named, Tensor):
        return named, True
    only = out[0] if isinstance(out, (list, tuple)) and len(out) == 1 else out  # (logits,): return_dict=False
    return (only, False) if isinstance(only, Tensor) else (None, False)


def kind_of(out: Any, tokens: Tokens, asked: str) -> str:
    """Which of `KINDS` an output is.

    Raises:
        EvaluationError: if it is not what was asked for.
    """
    logits, named = logits_of(out)
    if asked != "auto":
        _check(asked, logits, tokens, out)
        return asked
    if logits is None or logits.dim() not in (2, 3) or logits.shape[-1] < 2 or not logits.is_floating_point():
        return "outputs"
    if logits.dim() == 2:
        return "classes"
    if named and type(out).__name__ in _OF_THE_TOKEN_ITSELF:
        return "tokens"
    found = tokens.predicted()
    if found is not None and found[0].shape == logits.shape[:2]:
        return "next_token" if named or bool((found[0] < logits.shape[-1]).all()) else "outputs"
    return "tokens" if named else "outputs"


def _check(asked: str, logits: Tensor | None, tokens: Tokens, out: Any) -> None:
    if asked == "outputs":
        return
    have = f"a {type(out).__name__}" if logits is None else f"logits {list(logits.shape)}"
    if logits is None or logits.dim() != (2 if asked == "classes" else 3):
        want = "[batch, classes]" if asked == "classes" else "[batch, tokens, vocabulary]"
        raise EvaluationError(f"compare={asked!r} needs logits {want}, and the model gives {have}: leave compare out")
    found = tokens.predicted()
    if asked == "next_token" and (found is None or found[0].shape != logits.shape[:2]):
        raise EvaluationError(
            f"compare='next_token' needs token ids or labels of the sizes of the {have}: leave compare out"
        )


def tensors_of(out: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in floating point in an output, by where they are; those of a KV cache are none of it."""
    for path, x in pytree.tree_flatten_with_path(out)[0]:
        name = pytree.keystr(path).strip("[].'\"") or "output"
        if isinstance(x, Tensor) and x.is_floating_point() and x.numel() and not name.startswith("past_key_values"):
            yield name, x


def in_words(kind: str, out: Any) -> str:
    """What is compared, as a person would say it."""
    logits, named = logits_of(out)
    if kind == "outputs" or logits is None:
        return f"outputs: {', '.join(f'{name} {list(x.shape)}' for name, x in tensors_of(out))}"
    what = "logits" if named else "output"
    if kind == "classes":
        return f"classes: {what} [batch, {logits.shape[-1]}]"
    sizes = f"{what} [batch, tokens, {logits.shape[-1]}]"
    return f"next-token predictions: {sizes}" if kind == "next_token" else f"predictions at each token: {sizes}"
