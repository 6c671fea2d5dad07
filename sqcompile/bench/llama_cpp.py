"""llama.cpp with weights in Q8_0, through the low level of llama-cpp-python: a Llama's forward pass.

It computes the vocabulary's logits, too, of the token embedding's weights, which the benchmark's decoder leaves out: 2 % of that
decoder's work.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "embed_tokens": "token_embd", "norm": "output_norm",
}  # fmt: skip


def llama_cpp(
    make: Callable[[torch.dtype], nn.Module], calibration: Sequence[Tensor]
) -> Callable[[tuple[int, int]], Callable[[Tensor], Tensor]]:
    """A contender, as `bench.peers` has them, of a `transformers.LlamaModel`."""
    import gguf  # noqa: F401  needed, as llama_cpp is
    import llama_cpp as cpp

    model = make(torch.float32)
    config: Any = model.config
    if config.model_type != "llama":
        raise ValueError(f"its files are made here of Llamas alone, and this is a {config.model_type}")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.gguf")
        write(model, path)
        silent = cpp.llama_log_callback(lambda level, text, data: None)
        cpp.llama_log_set(silent, ctypes.c_void_p(0))
        cpp.llama_backend_init()
        loaded = cpp.llama_model_load_from_file(path.encode(), cpp.llama_model_default_params())
    if not loaded:
        raise ValueError("llama.cpp does not load the file")

    def for_shape(shape: tuple[int, int]) -> Callable[[Tensor], Tensor]:
        rows, tokens = shape
        how = cpp.llama_context_default_params()
        how.n_ctx, how.n_batch, how.n_ubatch, how.n_seq_max = (
            rows * max(256, tokens),
            rows * tokens,
            rows * tokens,
            rows,
        )
        how.n_threads = how.n_threads_batch = torch.get_num_threads()
        how.embeddings, how.pooling_type = True, cpp.LLAMA_POOLING_TYPE_NONE
        context = cpp.llama_init_from_model(loaded, how)
        batch = cpp.llama_batch_init(rows * tokens, 0, 1)

        def run(ids: Tensor, _kept: Any = silent) -> Tensor:
            cpp.llama_memory_clear(cpp.llama_get_memory(context), False)
            batch.n_tokens = ids.numel()
            for i, token in enumerate(ids.flatten().tolist()):
                batch.token[i], batch.pos[i], batch.logits[i] = token, i % tokens, 1
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, i // tokens
            if cpp.llama_decode(context, batch):
                raise RuntimeError("llama.cpp does not decode the tokens")
            found = cpp.llama_get_embeddings(context)
            values = (ctypes.c_float * (ids.numel() * config.hidden_size)).from_address(
                ctypes.addressof(found.contents)
            )
            return torch.frombuffer(values, dtype=torch.float32).reshape(*ids.shape, config.hidden_size).clone()

        return run

    return for_shape


def write(model: nn.Module, path: str | Path) -> None:
    """A `transformers.LlamaModel` as a GGUF file without a tokenizer: matrices in Q8_0, vectors in float32."""
    import gguf

    config: Any = model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    out = gguf.GGUFWriter(path, "llama")
    out.add_block_count(config.num_hidden_layers)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    out.add_vocab_size(config.vocab_size)
    out.add_tokenizer_model("no_vocab")
    for name, p in model.named_parameters():
        *layer, what = name.removesuffix(".weight").removeprefix("layers.").split(".", 1)
        what = NAMES[what]
        w = p.detach().float()
        if what in heads:  # GGUF has the two halves of a head's rotary channels interleaved
            w = w.view(heads[what], 2, -1, w.shape[1]).transpose(1, 2).reshape(w.shape)
        kind = gguf.GGMLQuantizationType.Q8_0 if w.dim() > 1 else gguf.GGMLQuantizationType.F32
        stem = f"blk.{layer[0]}.{what}" if layer else what
        out.add_tensor(f"{stem}.weight", gguf.quants.quantize(w.numpy(), kind), raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
