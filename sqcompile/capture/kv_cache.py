"""Int8StaticCache: transformers' static KV cache with K and V in INT8, half the memory of bfloat16.

    past = Int8StaticCache(model.config, max_cache_len=4096)
    model.generate(ids, past_key_values=past)

Each token is quantized once, when it is written, with a scale per head and token. A float model reads the values back;
in a graph of the backend "smoothquant" that quantizes QKᵀ per token, the product reads the INT8 keys as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from sqcompile.errors import RecipeError
from sqcompile.kernels.ops import sqcompile_ops


class Int8StaticLayer(StaticLayer):
    """One layer of the cache.

    Attributes:
        keys, values: int8 [B, G, max_cache_len, D].
        key_scales, value_scales: float32 [B, G, max_cache_len, 1].
    """

    key_scales: Tensor
    value_scales: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates the cache for keys and values [B, G, S, D] of the first call."""
        super().lazy_initialization(key_states.to(torch.int8), value_states.to(torch.int8))
        self.dtype = key_states.dtype
        shape = (self.batch_size, self.num_heads, self.max_cache_len, 1)
        self.key_scales, self.value_scales = (
            torch.zeros(shape, dtype=torch.float32, device=self.device) for _ in range(2)
        )
        if not torch.compiler.is_compiling():
            from sqcompile.pytorch.dynamo import mark_static_address  # here, as Dynamo imports triton

            mark_static_address(self.key_scales)
            mark_static_address(self.value_scales)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes the tokens and returns all keys and values in the model's dtype, zeros where nothing was written.

        Args:
            key_states, value_states: of the new tokens, any float dtype [B, G, S, D].
        """
        dtype = key_states.dtype
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.cumulative_length.clone()
        key_scale, value_scale = sqcompile_ops.token_scale(key_states), sqcompile_ops.token_scale(value_states)
        super().update(sqcompile_ops.quantize(key_states, key_scale), sqcompile_ops.quantize(value_states, value_scale))
        position = torch.arange(key_states.shape[-2], device=self.device) + start
        self.key_scales.index_copy_(2, position, key_scale)
        self.value_scales.index_copy_(2, position, value_scale)
        return (
            sqcompile_ops.dequantize_tokens(self.keys, self.key_scales, dtype),
            sqcompile_ops.dequantize_tokens(self.values, self.value_scales, dtype),
        )

    def reset(self) -> None:
        super().reset()
        if self.is_initialized:
            self.key_scales.zero_()
            self.value_scales.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """As beam search picks sequences."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        if self.is_initialized:
            index = beam_idx.to(self.key_scales.device)
            self.key_scales = self.key_scales.index_select(0, index)
            self.value_scales = self.value_scales.index_select(0, index)


class Int8StaticCache(StaticCache):
    """A static KV cache of transformers that holds K and V in INT8, with a float32 scale per head and token.

    Args:
        config: the model's configuration.
        max_cache_len: tokens it can hold.

    Raises:
        RecipeError: for a model with layers that are not full attention, such as sliding windows.
    """

    def __init__(self, config: Any, max_cache_len: int) -> None:
        super().__init__(config, max_cache_len)
        others = {type(layer).__name__ for layer in self.layers if type(layer) is not StaticLayer}
        if others:
            raise RecipeError(
                f"Int8StaticCache holds full attention only, and this model has {', '.join(sorted(others))}: use "
                "transformers.StaticCache"
            )
        self.layers = [Int8StaticLayer(max_cache_len) for _ in self.layers]

    def nbytes(self) -> int:
        """Bytes of all tensors, 0 before the first call."""
        layers: list[Any] = [layer for layer in self.layers if layer.is_initialized]  # type: ignore[union-attr]
        held = [t for x in layers for t in (x.keys, x.values, x.key_scales, x.value_scales)]
        return sum(t.numel() * t.element_size() for t in held)
