"""compared: what of a model's outputs is compared, by what they are, and which of their rows count.

    next_token  logits [batch, tokens, vocabulary] of a model of token ids: perplexity, KL divergence, top-1 agreement
    tokens      logits [batch, tokens, classes] of each token itself (masked language models, token classifiers)
    classes     logits [batch, classes] of a classifier
    outputs     anything else: relative error and cosine

Logits are what is called ``logits`` in the output, or the output itself, where it is a tensor. Padding never counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sqcompile.capture.inputs import Call, Forward
from sqcompile.errors import EvaluationError
from sqcompile.pytorch.core import pytree
from sqcompile.statistics.padding import token_mask

KINDS = ("next_token", "tokens", "classes", "outputs")
IGNORED = -100  # the label of what no loss counts
_OF_THE_TOKEN_ITSELF = ("MaskedLMOutput", "TokenClassifierOutput")  # as transformers names outputs
_FOR_THE_TOKEN_ITSELF = ("ForMaskedLM", "ForTokenClassification")  # as it names models
_OF_THE_WHOLE = "SequenceClassifierOutput"


@dataclass(frozen=True)
class Tokens:
    """What a batch says of its tokens.

    Attributes:
        ids: what logits are of, int64 [batch, tokens]: of an encoder-decoder, the decoder's; None without token ids.
        mask: bool [batch, tokens], True where a token is real; None where all are.
        labels: int64 [batch, tokens], -100 where a token does not count, or [batch], of classes; None if there are none.
        of_decoder: whether labels are the next tokens already, as an encoder-decoder takes them.
        source, source_mask: what an encoder-decoder's encoder reads, like ids and mask.
    """

    ids: Tensor | None
    mask: Tensor | None
    labels: Tensor | None
    of_decoder: bool = False
    source: Tensor | None = None
    source_mask: Tensor | None = None

    @staticmethod
    def of(batch: Any, call: Call, rows: bool = False) -> Tokens:
        """``batch`` is what the user passed: it may have a mask or labels that the model does not take.

        ``rows`` says that batches are samples without a batch dim; token ids without one are such a sample, too.
        """
        raw = {n: v for n, v in batch.items() if isinstance(v, Tensor)} if isinstance(batch, Mapping) else {}
        if rows or any(raw[n].dim() == 1 for n in ("input_ids", "decoder_input_ids") if n in raw):
            raw = {n: v.unsqueeze(0) for n, v in raw.items()}
        decoder = "decoder_input_ids" in call.kwargs
        ids = call.kwargs.get("decoder_input_ids" if decoder else "input_ids")
        if ids is None and not decoder:
            ids = next((x for x in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(x, Tensor)), None)
        name = "decoder_attention_mask" if decoder else "attention_mask"
        found, sources = (
            token_mask(x) if isinstance(x, Tensor) else None
            for x in (call.kwargs.get(n, raw.get(n)) for n in (name, "attention_mask"))
        )
        source = call.kwargs.get("input_ids") if decoder else None
        labels = raw.get("labels")
        return Tokens(
            ids if _is_integers(ids, 2) else None,
            found,
            labels if _is_integers(labels, 1, 2) else None,
            decoder,
            source if _is_integers(source, 2) else None,
            sources if decoder else None,
        )

    def predicted(self) -> tuple[Tensor, Tensor] | None:
        """The token after each, int64 [batch, tokens], and where it counts, bool; None without token ids and labels."""
        labelled = self.labels is not None and self.labels.dim() == 2
        stream = self.labels if labelled else self.ids
        if stream is None:
            return None
        if self.of_decoder and labelled:
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

    def identities(self, predicted: Tensor, counted: Tensor) -> Iterator[bytes]:
        """What is read and predicted, of each window with something that counts: the same however it is padded.

        Args:
            predicted: int64 [batch, tokens], see `predicted`.
            counted: where it counts, bool.
        """
        predicted, counted = predicted.cpu(), counted.cpu()
        place = torch.arange(counted.shape[1]).expand(counted.shape)
        if self.mask is not None and self.mask.shape == counted.shape:
            place = self.mask.cpu().cumsum(1) - 1  # among the tokens that are real
        for i, where in enumerate(counted):
            if bool(where.any()):
                read = [_real(self.source, self.source_mask, i), _real(self.ids, self.mask, i)]
                if self.ids is not None and self.ids.shape == counted.shape:
                    read[1] = read[1][: int(place[i][where][-1]) + 1]  # what comes later is read by no prediction
                for x in (*read, place[i][where], predicted[i][where]):
                    yield len(x).to_bytes(8, "little") + x.to(torch.int64).numpy().tobytes()

    def check_padding(self, shapes: Sequence[torch.Size]) -> None:
        """Refuses padding that cannot be told from what counts.

        Args:
            shapes: of the outputs, [batch, tokens], or [batch] of a classifier's.

        Raises:
            EvaluationError: if there is padding, and neither mask nor labels have any of the shapes.
        """
        dims = len(shapes[0])
        mask = self.mask if self.mask is not None and self.mask.dim() == dims else None
        labels = self.labels if self.labels is not None and self.labels.dim() == dims else None
        padded = (mask is not None and not bool(mask.all())) or (labels is not None and bool((labels == IGNORED).any()))
        given = {n: x for n, x in (("attention_mask", mask), ("labels", labels)) if x is not None}
        if padded and not any(x.shape == shape for x in given.values() for shape in shapes):
            have = " and ".join(f"{n} {list(x.shape)}" for n, x in given.items())
            raise EvaluationError(
                f"there is padding by {have}, and which of the outputs {[list(s) for s in shapes]} are padding does not "
                "show: pass batches without padding, or of one length, or labels of the logits' length, -100 where they are "
                "padding"
            )

    def _counted(self, where: Tensor, mask: Tensor | None) -> Tensor:
        return where & mask.to(where.device) if mask is not None and mask.shape == where.shape else where


def _real(ids: Tensor | None, mask: Tensor | None, window: int) -> Tensor:
    """A window's tokens that are real, [tokens]; none without token ids."""
    if ids is None:
        return torch.zeros(0, dtype=torch.int64)
    return ids[window].cpu() if mask is None or mask.shape != ids.shape else ids[window].cpu()[mask[window].cpu()]


def _is_integers(x: Any, *dims: int) -> bool:
    return isinstance(x, Tensor) and x.dim() in dims and x.dtype in (torch.int64, torch.int32)


@dataclass(frozen=True)
class Signs:
    """What a model's class and its configuration say of outputs that have no names.

    Attributes:
        vocabulary: tokens that it knows; None without a configuration that says so.
        hidden: channels of its hidden states, in the same way.
        of_the_token: whether its logits are of each token itself.
    """

    vocabulary: int | None = None
    hidden: int | None = None
    of_the_token: bool = False

    @staticmethod
    def of(forward: Forward) -> Signs:
        """Of how a model is called: a compiled model outlives its float model."""
        config = forward.config
        text = getattr(config, "get_text_config", None)  # of what has several parts
        config = config if text is None else text()
        vocabulary, hidden = (getattr(config, name, None) for name in ("vocab_size", "hidden_size"))
        return Signs(
            vocabulary if isinstance(vocabulary, int) else None,
            hidden if isinstance(hidden, int) else None,
            forward.name.endswith(_FOR_THE_TOKEN_ITSELF),
        )

    def may_be_of_next_tokens(self, width: int, predicted: Tensor) -> bool:
        """Whether vectors of some width, for token ids, may be logits over a vocabulary, and no hidden states."""
        if self.vocabulary is None:
            return width != self.hidden and bool((predicted < width).all())
        # a head may be padded to more rows than there are tokens
        return width == self.vocabulary or (width > self.vocabulary and width != self.hidden)


def logits_of(out: Any) -> tuple[Tensor | None, bool]:
    """The logits in an output, and whether they are called so."""
    named = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", None)
    if isinstance(named, Tensor):
        return named, True
    only = out[0] if isinstance(out, (list, tuple)) and len(out) == 1 else out  # (logits,): return_dict=False
    return (only, False) if isinstance(only, Tensor) else (None, False)


def kind_of(out: Any, tokens: Tokens, asked: str, signs: Signs) -> str:
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
    found = tokens.predicted()
    if logits.dim() == 2:
        of_tokens = found is not None and found[0].shape == logits.shape  # a number for each token
        return "outputs" if of_tokens and not type(out).__name__.startswith(_OF_THE_WHOLE) else "classes"
    if named and type(out).__name__ in _OF_THE_TOKEN_ITSELF:
        return "tokens"
    if found is not None and found[0].shape == logits.shape[:2]:
        if not named and not signs.may_be_of_next_tokens(logits.shape[-1], found[0]):
            return "outputs"
        return "tokens" if signs.of_the_token else "next_token"
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


KV_CACHES = ("past_key_values", "cache")  # names of outputs: before transformers 5.24, and since


def tensors_of(out: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in floating point in an output, by where they are; those of a KV cache are none of it."""
    for path, x in pytree.tree_flatten_with_path(out)[0]:
        name = pytree.keystr(path).strip("[].'\"") or "output"
        of_cache = re.split(r"\W", name, maxsplit=1)[0] in KV_CACHES
        if isinstance(x, Tensor) and x.is_floating_point() and x.numel() and not of_cache:
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
