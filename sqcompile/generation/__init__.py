"""generation: text from a causal language model, in a decode loop whose state stays on the device.

    prefill      the prompt, at once; the model's own call, with all checks of a compiled one
    steps        forward of one token, processed logits, the next token, the new state: operations of the device alone
    record=True  one step is recorded as a CUDA graph and replayed once a token, several steps ahead of the host

`run` is the loop, `settings` what a GenerationConfig says, `scores` what it does to logits, `state` what lies on the device,
`replay` how a step is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import GenerationConfig

__all__ = ["free_generation", "generate"]


def generate(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    generator: torch.Generator | None = None,
    callback: Callable[[Tensor], object] | None = None,
    record: bool = False,
    **overrides: Any,
) -> Tensor:
    """Writes text after prompts, as ``model.generate`` of transformers does, with a state that stays on the device.

    Settings are read as transformers reads them: ``overrides`` before ``generation_config`` before the model's own. What
    is honoured: max_new_tokens, max_length, min_new_tokens, min_length, eos_token_id (one or several), pad_token_id,
    do_sample, temperature, top_k, top_p, repetition_penalty and max_cache_len. Every other setting that would change
    tokens is refused by name. Greedy tokens are those of ``model.generate``. Sampled tokens come of the same
    probabilities, and are the same for the same state of the random generator. On a CPU they are those that
    ``model.generate`` draws.

    The text is held by a static KV cache, whose length is rounded up, by 12.5 % at most beyond 1,024 tokens. Cache, state
    and recorded graphs of the last four pairs of batch size and length are kept for the next call, until the module that
    was passed is freed, or `free_generation` is called. So a call of other lengths compiles nothing new as long as the
    batch and the rounded length are known, and prompts that grow compile the model twice at most. Calls of one model come
    one after another.

    With ``record`` the first token after the prompt is decoded by the model's own call, which looks whether weights have
    changed, as each call of a compiled model does. The others replay one CUDA graph each, without Python between two
    tokens. The host looks whether all sequences have ended every eight tokens, while the device goes on; tokens beyond the
    end are cut off. This is new: not all of its tests have passed on a GPU, so compare its text with that of a call without.

    Args:
        model: a causal language model of transformers: in float, compiled by ``torch.compile``, with backend
            "smoothquant" or another, or by ``model.compile``.
        input_ids: prompts, int64 [batch, tokens], padded on the left.
        attention_mask: 0 where a prompt is padding, 1 elsewhere [batch, tokens]. Without it all is text, or, as in
            transformers, all but pad_token_id if that is set and ends no text.
        generation_config: settings; without it the model's own.
        generator: where sampled tokens come from, on the model's device; without it the device's default generator. On
            a GPU, with ``record``, it has moved on by tokens that were cut off, too.
        callback: called with each token of the batch, int64 [batch] on the CPU, in their order; with ``record`` up to 16
            tokens after they were computed.
        record: whether tokens are replayed as a CUDA graph, on a GPU.
        **overrides: fields of GenerationConfig.

    Returns:
        Prompts and new tokens, int64 [batch, tokens + new], on the device of ``input_ids``. Sequences that ended before
        others go on with pad_token_id.

    Raises:
        GenerationError: for a setting, a model or a prompt that this loop does not take; for ``record`` without a GPU.
    """
    from sqcompile.generation.run import run  # here, as it imports transformers and Dynamo

    return run(model, input_ids, attention_mask, generation_config, generator, callback, record, overrides)


def free_generation(model: nn.Module) -> None:
    """Frees the KV caches and recorded graphs that `generate` keeps for a model; the next call makes them anew.

    Args:
        model: what was passed to `generate`.
    """
    from sqcompile.generation.run import free

    free(model)
