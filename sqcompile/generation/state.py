"""state: what lies on the device while a batch is decoded, at addresses that stay, and the step that moves it on by a token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sqcompile.errors import GenerationError
from sqcompile.generation.cache import static_cache
from sqcompile.generation.scores import Values, next_tokens
from sqcompile.generation.settings import Kind, Settings

# "cache" is what transformers 5.24 and later call "past_key_values"
_OURS = {"input_ids", "past_key_values", "cache", "attention_mask", "position_ids", "use_cache", "logits_to_keep"}


class State:
    """One batch of texts.

    Attributes:
        text: prompts and new tokens, int64 [batch, longest].
        length: how many there are, int64 [1].
        ended: which texts have, bool [batch].
        seen: which tokens a text has, bool [batch, vocabulary]; None until there is a penalty.
        cache: transformers' static cache of ``longest`` tokens.
        inputs: of the model's call for one token. Its tensors are the next three, and what does not change.
        token: the last of each text, int64 [batch, 1].
        mask: which tokens of the cache attention sees, bool or float [batch, 1, 1, longest].
        positions: of the last tokens, int64 [batch, 1], if the model is told them.
    """

    def __init__(self, model: Any, batch: int, longest: int) -> None:
        self.batch, self.longest, self.device = batch, longest, model.device
        self.cache = static_cache(model, batch, longest)
        self.text = torch.zeros(batch, longest, dtype=torch.int64, device=self.device)
        self.length = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.ended = torch.zeros(batch, dtype=torch.bool, device=self.device)
        self.seen: Tensor | None = None
        self.values: dict[int, Values] = {}
        self.inputs: dict[str, Any] = {}
        self.token: Tensor | None = None
        self.mask: Tensor | None = None
        self.positions: Tensor | None = None

    def fits(self, model: Any) -> bool:
        """Whether it is still of the model's dtype and device."""
        layer: Any = self.cache.layers[0]
        return bool(layer.keys.dtype == model.dtype and self.device == model.device)

    def begin(self, ids: Tensor, kind: Kind, settings: Settings) -> None:
        """Forgets the last text and takes prompts, int64 [batch, tokens]."""
        self.cache.reset()
        self.text[:, : ids.shape[1]] = ids
        self.length.fill_(ids.shape[1])
        self.ended.zero_()
        if kind.ends not in self.values:
            self.values[kind.ends] = Values(kind.ends, self.device)
        self.values[kind.ends].fill(settings)

    def count(self, ids: Tensor, mask: Tensor, vocabulary: int) -> None:
        """Has a penalty count the tokens of prompts, [batch, tokens], for a model that writes so many different ones."""
        if self.seen is None:
            self.seen = torch.zeros(self.batch, vocabulary, dtype=torch.bool, device=self.device)
        # padding on the left counts as no token, nor do ids that the model does not write
        counted = mask.int().cummax(1).values.bool() & (ids < vocabulary)
        marks = torch.zeros(self.batch, vocabulary + 1, dtype=torch.bool, device=self.device)
        self.seen.copy_(marks.scatter_(1, torch.where(counted, ids, vocabulary), True)[:, :vocabulary])

    def take(self, logits: Tensor, kind: Kind, generator: torch.Generator | None) -> Tensor:
        """Appends the next token of each text, and gives it, int64 [batch]. ``logits``: [batch, tokens, vocabulary]."""
        values = self.values[kind.ends]
        tokens = next_tokens(logits[:, -1].float(), kind, values, self.length, self.seen, generator)
        if kind.ends:
            tokens = torch.where(self.ended, values.pad, tokens)
            self.ended |= (tokens[:, None] == values.eos).any(1)
        if kind.penalty:
            assert self.seen is not None
            # padding, which counts for no text that goes on, may be an id that is not written
            self.seen.scatter_(1, tokens[:, None].clamp(max=self.seen.shape[1] - 1), True)
        self.text.index_copy_(1, self.length, tokens[:, None])
        return tokens

    def prepare(self, inputs: dict[str, Any], name: str) -> None:
        """Takes over what the model is given for the first token after the prompt; later ones differ by known numbers.

        Raises:
            GenerationError: for a model of another kind. ``name`` is its.
        """
        others = sorted(key for key, value in inputs.items() if key not in _OURS and value is not None)
        if others:
            raise GenerationError(
                f"{name} takes {', '.join(others)} for each token, which sqcompile.generate does not know"
            )
        mask = inputs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[1:] != (1, 1, self.longest):
            raise GenerationError(
                f"{name} takes no attention mask [batch, 1, 1, tokens] for a token (it has ALiBi, or another "
                "attn_implementation than 'sdpa' and 'eager'), so that sqcompile.generate cannot move it on: use model.generate"
            )
        fixed = {key: value for key, value in inputs.items() if value is not None}
        self.mask = _held(self.mask, mask.expand(self.batch, 1, 1, self.longest))
        self.token = _held(self.token, inputs["input_ids"])
        self.inputs = {**fixed, "input_ids": self.token, "attention_mask": self.mask}
        if "position_ids" in fixed:
            self.positions = _held(self.positions, inputs["position_ids"].expand(self.batch, 1))
            self.inputs["position_ids"] = self.positions
        self.length += 1

    def step(self, call: Callable[..., Any], kind: Kind, generator: torch.Generator | None) -> None:
        """One token: operations of the device alone, none of which depends on where the text is."""
        tokens = self.take(call(**self.inputs, return_dict=True).logits, kind, generator)
        assert self.token is not None and self.mask is not None
        self.token.copy_(tokens[:, None])
        self.mask.index_fill_(3, self.length, True if self.mask.dtype == torch.bool else 0.0)
        if self.positions is not None:
            self.positions += 1
        self.length += 1


def _held(held: Tensor | None, value: Tensor) -> Tensor:
    """The tensor that is there with new values; at first, or of another dtype, a copy of them."""
    if held is None or held.dtype != value.dtype:
        return value.clone(memory_format=torch.contiguous_format)
    return held.copy_(value)
