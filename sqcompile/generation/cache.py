"""cache: the static KV cache of a batch, allocated before the first call, and how long it is."""

from __future__ import annotations

from typing import Any

import torch
from transformers import StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from sqcompile.errors import GenerationError

_SMALLEST = 128


def rounded(tokens: int) -> int:
    """Length of the cache for so many tokens: a multiple of 128, and of an eighth of the power of two below.

    Prompts that grow use few lengths then, and attention, which reads the whole cache, at most an eighth more than it needs
    to, beyond 1,024 tokens.
    """
    step = max(_SMALLEST, 1 << max(0, (tokens - 1).bit_length() - 4))
    return -(-tokens // step) * step


def static_cache(model: Any, batch: int, length: int) -> StaticCache:
    """An empty cache of a model.

    Raises:
        GenerationError: for layers that are no plain attention over the whole text.
    """
    config = model.config.get_text_config(decoder=True)
    cache = StaticCache(config=config, max_cache_len=length)
    for i, layer in enumerate(cache.layers):
        if type(layer) is StaticSlidingWindowLayer and layer.max_cache_len >= length:
            cache.layers[i] = StaticLayer(max_cache_len=length)  # the window sees all there is
    other = next((layer for layer in cache.layers if type(layer) is not StaticLayer), None)
    if isinstance(other, StaticSlidingWindowLayer):
        raise GenerationError(
            f"the model's attention has a window of {other.max_cache_len} tokens, and the cache is to hold {length}: "
            "sqcompile.generate has no cache that moves, so use model.generate, or a shorter prompt and max_new_tokens"
        )
    what = type(other).__name__ if other is not None else ""
    what = "latent attention" if getattr(config, "qk_head_dim", None) is not None else what
    alibi = getattr(config, "alibi", False) or getattr(getattr(config, "attn_config", None), "alibi", False)
    what = "attention with ALiBi" if alibi else what
    if what:
        raise GenerationError(
            f"sqcompile.generate has no cache for {what} of {type(model).__name__}: use model.generate"
        )
    one = getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False)
    heads = 1 if one else getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache.early_initialization(batch, heads, width, dtype=model.dtype, device=torch.device(model.device))
    return cache
