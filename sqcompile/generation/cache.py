"""cache: the static KV cache of a batch, allocated before the first call, and how long it is."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from transformers import StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from sqcompile.errors import GenerationError
from sqcompile.pytorch.distributed import is_distributed

_SMALLEST = 128

# what `_written` saw of a model, so that caches of other batches need no further run in all processes
_seen: weakref.WeakKeyDictionary[nn.Module, tuple[list[int], list[int]]] = weakref.WeakKeyDictionary()


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
        GenerationError: for layers that are no plain attention over the whole text, and as `_written`.
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
    if any(is_distributed(p) for p in model.parameters()):
        heads, width = _written(model, config)
    cache.early_initialization(batch, heads, width, dtype=model.dtype, device=torch.device(model.device))
    return cache


def _written(model: Any, config: Any) -> tuple[list[int], list[int]]:
    """How many heads of how many channels a sharded model's attention writes in this process, by layer.

    Every process runs the float model on one token and sees: how attention is sharded is for the model's author to say.

    Raises:
        GenerationError: where the model does not run.
    """
    if model in _seen:
        return _seen[model]
    probe = StaticCache(config=config, max_cache_len=_SMALLEST)
    ids = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    try:
        with torch.compiler.set_stance("force_eager"):
            model(input_ids=ids, past_key_values=probe, use_cache=True)
    except Exception as e:
        raise GenerationError(
            "sqcompile.generate runs the float model on one token to see what a process writes of a sharded model, which "
            f"failed: {e}: use model.generate"
        ) from e
    layers: list[Any] = probe.layers
    shapes = [layer.keys.shape for layer in layers]
    return _seen.setdefault(model, ([s[1] for s in shapes], [s[3] for s in shapes]))
