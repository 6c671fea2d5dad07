"""prompts: token ids and their attention mask, checked and as the model takes them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from sqcompile.errors import GenerationError
from sqcompile.generation.settings import Settings


class Prompts:
    """The prompts of one call, on the model's device.

    Attributes:
        ids: int64 [batch, tokens].
        mask: which are text, int64 [batch, tokens].
    """

    def __init__(self, model: Any, input_ids: Any, attention_mask: Any) -> None:
        """Raises: GenerationError, for what is no batch of prompts."""
        if (
            not isinstance(input_ids, Tensor)
            or input_ids.dim() != 2
            or input_ids.dtype not in (torch.int64, torch.int32)
        ):
            said = list(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
            raise GenerationError(f"input_ids are token ids, an int64 tensor [batch, tokens], and not {said}")
        self.batch, self.length = input_ids.shape
        if not input_ids.numel():
            raise GenerationError(
                f"the prompts {list(input_ids.shape)} have no tokens: pass one at least, such as bos_token_id"
            )
        table = model.get_input_embeddings().num_embeddings
        least, most = int(input_ids.min()), int(input_ids.max())
        if least < 0 or most >= table:
            wrong = least if least < 0 else most
            raise GenerationError(f"the prompts have the token id {wrong}, and the model has ids from 0 to {table - 1}")
        self.ids = input_ids.to(model.device, torch.int64, copy=True)
        self._given = attention_mask is not None
        self.mask = torch.ones_like(self.ids)
        if attention_mask is not None:
            if not isinstance(attention_mask, Tensor) or attention_mask.shape != input_ids.shape:
                said = (
                    list(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
                )
                raise GenerationError(
                    f"attention_mask is as large as input_ids, {list(input_ids.shape)}, and not {said}"
                )
            self.mask = (attention_mask != 0).to(model.device, torch.int64)
        self._table = table

    def find_padding(self, settings: Settings) -> None:
        """Takes pad_token_id for padding where no mask is given, as transformers does.

        Raises:
            GenerationError: for padding on the right, after which no text can go on; for ids that the model has not.
        """
        if not self._given and settings.pads_prompts:
            self.mask = (self.ids != settings.pad).long()
        if not bool(self.mask[:, -1].all()):
            raise GenerationError("a prompt ends with padding: pad on the left, tokenizer.padding_side = 'left'")
        if settings.eos and settings.pad >= self._table:
            raise GenerationError(f"pad_token_id={settings.pad}, and the model has ids from 0 to {self._table - 1}")

    def inputs(self, model: Any, cache: Any, text: Tensor, known: dict[str, Any], first: bool) -> dict[str, Any]:
        """What the model takes for the prompts, or for the first token after them.

        Args:
            model: of transformers, which prepares its inputs itself.
            cache: its KV cache.
            text: int64 [batch, tokens], the prompts or one token more.
            known: other arguments.
            first: whether it is the prompts.
        """
        more = text.shape[1] - self.length
        mask = torch.nn.functional.pad(self.mask, (0, more), value=1)
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
        if "position_ids" in known:
            known = {**known, "position_ids": positions}
        inputs = model.prepare_inputs_for_generation(
            text,
            next_sequence_length=None if first else 1,
            # of one token it is asked for in any case: transformers 5.17 makes the mask of a static cache of nothing else
            attention_mask=None if first and bool(mask.all()) else mask,
            use_cache=True,
            is_first_iteration=first,
            **{_name_of_cache(model): cache},
            **known,
        )
        masks = inputs.get("attention_mask")
        if isinstance(masks, dict) and masks:  # one for each kind of attention, all of which see the whole cache here
            inputs["attention_mask"] = next(iter(masks.values()))
        return inputs


def _name_of_cache(model: Any) -> str:
    """What the model's transformers calls a KV cache: "cache" since 5.24."""
    takes = inspect.signature(model.prepare_inputs_for_generation).parameters
    return "cache" if "cache" in takes else "past_key_values"


def check_generator(generator: Any, device: torch.device) -> None:
    """Raises: GenerationError, for a generator that cannot draw on the model's device."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise GenerationError(f"generator is a torch.Generator, and not {type(generator).__name__}")
    if generator.device.type != device.type or (generator.device.index or 0) != (device.index or 0):
        raise GenerationError(f"the model is on {device}, and the generator on {generator.device}: make it there")
