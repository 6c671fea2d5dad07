"""Tiny random models of every architecture family, with random norms and outliers, and a call of each."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

COMMON = dict(vocab_size=96, hidden_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
DEEP = dict(COMMON, num_hidden_layers=2, num_attention_heads=4)
GATED = dict(DEEP, intermediate_size=112, num_key_value_heads=2)
BERT = dict(DEEP, intermediate_size=112)

# name -> (transformers model type, configuration)
CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("opt", dict(DEEP, ffn_dim=112, word_embed_proj_dim=64)),
    "opt post-norm": ("opt", dict(DEEP, ffn_dim=112, word_embed_proj_dim=32, do_layer_norm_before=False)),
    "gpt2": ("gpt2", dict(vocab_size=96, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)),
    "bloom": ("bloom", dict(COMMON, n_layer=2, n_head=4)),
    "llama": ("llama", GATED),
    "mistral": ("mistral", GATED),
    "qwen2": ("qwen2", GATED),
    "qwen3": ("qwen3", dict(GATED, head_dim=16)),
    "mixtral": ("mixtral", dict(GATED, num_local_experts=4, num_experts_per_tok=2)),
    "qwen2_moe": (
        "qwen2_moe",
        dict(GATED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, shared_expert_intermediate_size=80),
    ),
    "falcon 7b": ("falcon", dict(DEEP, multi_query=True, parallel_attn=True, bias=False)),
    "falcon 40b": ("falcon", dict(DEEP, new_decoder_architecture=True, num_kv_heads=2, bias=False)),
    "falcon alibi": ("falcon", dict(DEEP, alibi=True, multi_query=False, parallel_attn=False, bias=True)),
    "gpt_neox": ("gpt_neox", dict(DEEP, intermediate_size=112, rotary_pct=0.25)),
    "gemma": ("gemma", dict(GATED, head_dim=16)),
    "gemma2": ("gemma2", dict(GATED, head_dim=16, query_pre_attn_scalar=16, sliding_window=8)),
    "phi3": ("phi3", GATED),
}  # fmt: skip


def token_ids(shape: tuple[int, int] = (2, 11), seed: int = 0) -> Tensor:
    return torch.randint(3, 96, shape, generator=torch.Generator().manual_seed(seed))


def _floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def causal_lm(kind: str, config: dict[str, Any], **kwargs: Any) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config), **kwargs)


def _base(kind: str, config: dict[str, Any]) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    return AutoModel.from_config(AutoConfig.for_model(kind, **config))


# Norms that feed attention scores or a residual, not a linear.
INNER_NORMS = {
    "qwen3": ("q_norm", "k_norm"),
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
}

OTHERS = ["bert", "roberta", "t5", "t5 gated", "whisper", "vit", "swin", "clip"]
FAMILIES = [*CAUSAL, *OTHERS]
DIFFUSERS = ["unet", "dit", "flux"]


def roughen(model: nn.Module, outlier: float = 20.0, inner: tuple[str, ...] = ()) -> nn.Module:
    """Norms, biases away from their initial ones and zeros, and every seventh norm channel an outlier.

    Norms named in ``inner`` feed no linear but attention scores or a residual: they get no outliers.
    """
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
            norm = "norm" in name.lower() or "ln_" in name
            if p.dim() == 1 and norm and name.endswith("weight") and not any(i in name for i in inner):
                p[::7] *= outlier
    return model


def build(name: str, outlier: float = 20.0, **kwargs: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model in eval mode and the keyword arguments of a call."""
    torch.manual_seed(0)
    if name in CAUSAL:
        model, call = causal_lm(*CAUSAL[name], **kwargs), {"input_ids": token_ids()}
    elif name in ("bert", "roberta"):
        model = _base(name, dict(BERT, max_position_embeddings=64))
        call = {"input_ids": token_ids(), "attention_mask": torch.ones(2, 11, dtype=torch.long)}
    elif name in ("t5", "t5 gated"):
        ff = "gated-gelu" if name == "t5 gated" else "relu"
        sizes = dict(
            d_model=64, d_kv=16, d_ff=112, num_layers=2, num_heads=4, feed_forward_proj=ff, initializer_factor=0.3
        )
        model = _base("t5", dict(vocab_size=96, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, **sizes))
        call = {"input_ids": token_ids(), "decoder_input_ids": token_ids((2, 7), 1)}
    elif name == "whisper":
        sizes = dict(
            d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4
        )
        ffn = dict(encoder_ffn_dim=112, decoder_ffn_dim=112, num_mel_bins=8, max_source_positions=12)
        ids = dict(vocab_size=96, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
        model = _base("whisper", {**sizes, **ffn, **ids, "max_target_positions": 32})
        call = {"input_features": _floats(2, 8, 24), "decoder_input_ids": token_ids((2, 7), 1)}
    elif name == "vit":
        model = _base("vit", dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=112, image_size=32, patch_size=8))  # fmt: skip
        call = {"pixel_values": _floats(2, 3, 32, 32)}
    elif name == "swin":  # 14 x 14 patches, padded to windows of 4 x 4
        model = _base("swin", dict(embed_dim=64, depths=[2], num_heads=[4], image_size=28, patch_size=2, window_size=4))
        call = {"pixel_values": _floats(2, 3, 28, 28)}
    else:
        tower = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=112)
        text = dict(tower, vocab_size=96, eos_token_id=2, bos_token_id=1, pad_token_id=0, max_position_embeddings=32)
        model = _base("clip", dict(text_config=text, vision_config=dict(tower, image_size=32, patch_size=8), projection_dim=48))  # fmt: skip
        call = {"input_ids": token_ids(), "pixel_values": _floats(2, 3, 32, 32)}
    return roughen(model.eval(), outlier, INNER_NORMS.get(name, ())), call


def build_diffusers(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A denoiser of the diffusers package in eval mode and the keyword arguments of a call."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    times = torch.tensor([3, 5])
    if name == "unet":
        model = diffusers.UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32,), norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=32,
            attention_head_dim=8,
        )  # fmt: skip
        call = {"sample": _floats(2, 4, 8, 8), "timestep": times, "encoder_hidden_states": _floats(2, 7, 32)}
    elif name == "dit":
        model = diffusers.DiTTransformer2DModel(
            num_attention_heads=4, attention_head_dim=16, in_channels=4, num_layers=2, sample_size=8, patch_size=2,
            num_embeds_ada_norm=10,
        )  # fmt: skip
        call = {"hidden_states": _floats(2, 4, 8, 8), "timestep": times, "class_labels": torch.tensor([1, 2])}
    else:
        model = diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=4,
            joint_attention_dim=32, pooled_projection_dim=24, axes_dims_rope=(4, 4, 8),
        )  # fmt: skip
        call = {"hidden_states": _floats(2, 9, 4), "encoder_hidden_states": _floats(2, 7, 32)}
        call |= {"pooled_projections": _floats(2, 24), "timestep": torch.tensor([0.3, 0.5])}
        call |= {"img_ids": _floats(9, 3), "txt_ids": _floats(7, 3)}
    return roughen(model.eval(), outlier=4.0), call


def some_slow(names: Iterable[str], quick: Collection[str]) -> list[Any]:
    """Names as parameters; those that are not quick are left to `make slow`."""
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


def outputs(out: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(dict(out)) if isinstance(t, Tensor) and t.is_floating_point()]


def run(model: nn.Module, call: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return outputs(model(**call, **({"use_cache": False} if getattr(model.config, "use_cache", None) else {})))


def resized(call: dict[str, Tensor]) -> dict[str, Tensor]:
    """The call with another batch, and token inputs of another length."""
    batch = {k: torch.cat([v, v[:1].flip(-1)]) for k, v in call.items()}
    return {k: torch.cat([v, v[:, :4]], 1) if v.dtype == torch.int64 else v for k, v in batch.items()}


RESIDUAL, GELU, OUTPUT = "joins a residual stream", "its input passes gelu", "is an output of the model"
TANH_GELU = "passes pow, which does not commute"
POST_NORM_BERT = (13, {"linear": 2}, {RESIDUAL: 8, GELU: 2, OUTPUT: 1})
T5_REFUSED = {OUTPUT: 4}

# name: linears, sites by what absorbs 1/s, refused linears by reason
COVERAGE: dict[str, tuple[int, dict[str, int], dict[str, int]]] = {
    "opt": (13, {"norm": 5, "linear": 4}, {}),
    "opt post-norm": (15, {"norm": 1, "linear": 5}, {RESIDUAL: 8, "its input reaches embedding": 1}),
    "gpt2": (9, {"norm": 5, "linear": 2}, {TANH_GELU: 2}),
    "bloom": (9, {"norm": 5, "linear": 2}, {"meets itself in mul": 2}),
    "llama": (15, {"scale": 5, "linear": 4}, {}),
    "mistral": (15, {"scale": 5, "linear": 4}, {}),
    "qwen2": (15, {"scale": 5, "linear": 4}, {}),
    "qwen3": (15, {"scale": 5, "linear": 4}, {}),
    "mixtral": (15, {"scale": 5, "linear": 4}, {}),
    "qwen2_moe": (23, {"scale": 5, "linear": 6}, {}),
    "falcon 7b": (9, {"norm": 3, "linear": 2}, {GELU: 2}),
    "falcon 40b": (9, {"norm": 5, "linear": 2}, {GELU: 2}),
    "falcon alibi": (9, {"norm": 5, "linear": 2}, {GELU: 2}),
    "gpt_neox": (9, {"norm": 5, "linear": 2}, {GELU: 2}),
    "gemma": (15, {"scale": 5, "linear": 4}, {}),
    "gemma2": (15, {"scale": 5, "linear": 4}, {}),
    "phi3": (9, {"scale": 5, "linear": 4}, {}),
    "bert": POST_NORM_BERT,
    "roberta": POST_NORM_BERT,
    "t5": (32, {"scale": 10, "linear": 10}, T5_REFUSED),
    "t5 gated": (36, {"scale": 10, "linear": 10}, T5_REFUSED),
    "whisper": (32, {"norm": 10, "linear": 6}, {GELU: 4, OUTPUT: 4}),
    "vit": (13, {"norm": 4, "linear": 2}, {GELU: 2, OUTPUT: 1}),
    "swin": (12, {"norm": 4, "linear": 2}, {GELU: 2}),
    "clip": (26, {"norm": 9, "linear": 4}, {"passes sigmoid": 4, OUTPUT: 1}),
}

# name: attentions, (heads, key heads, channels), scales of each that are free, what absorbs them
PLAIN = (2, (4, 4, 16), 64, "linear")
ROTARY = (2, (4, 2, 16), 16, "linear")  # 2 key heads x 8 pairs of channels
CHAINS: dict[str, tuple[int, tuple[int, int, int], int, str]] = {
    "opt": PLAIN,
    "opt post-norm": PLAIN,
    "gpt2": PLAIN,
    "bloom": PLAIN,
    "llama": ROTARY,
    "mistral": ROTARY,
    "qwen2": ROTARY,
    "qwen3": (2, (4, 2, 16), 8, "scale"),  # the norm's weight serves every head
    "mixtral": ROTARY,
    "qwen2_moe": ROTARY,
    "falcon 7b": (2, (4, 1, 16), 8, "linear"),
    "falcon 40b": (2, (4, 4, 16), 16, "linear"),  # repeats its key heads before it rotates them
    "falcon alibi": PLAIN,
    "gpt_neox": (2, (4, 4, 16), 56, "linear"),  # rotates 4 of 16 channels: 2 pairs and 12 alone
    "gemma": ROTARY,
    "gemma2": ROTARY,
    "phi3": ROTARY,
    "bert": PLAIN,
    "roberta": PLAIN,
    "t5": (6, (4, 4, 16), 64, "linear"),
    "t5 gated": (6, (4, 4, 16), 64, "linear"),
    "whisper": (6, (4, 4, 16), 64, "linear"),
    "vit": PLAIN,
    "swin": PLAIN,
    "clip": (4, (4, 4, 16), 64, "linear"),
}

# name: linears, sites by what absorbs 1/s, refused linears by reason, attentions, head sites
SILU, CAT, INPUT = "passes silu", "reaches cat", "reads an input of the model"
DENOISERS: dict[str, tuple[int, dict[str, int], dict[str, int], int, int]] = {
    "unet": (47, {"norm": 12, "linear": 12}, {INPUT: 8, SILU: 6, CAT: 1}, 8, 8),
    "dit": (22, {"linear": 2}, {RESIDUAL: 9, SILU: 6, CAT: 3, GELU: 2}, 2, 2),
    "flux": (
        28,
        {},
        {RESIDUAL: 13, SILU: 6, INPUT: 3, "summed with other": 2, GELU: 2, CAT: 1, "covers only part": 1},
        2,
        1,
    ),
}
