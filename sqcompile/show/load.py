"""Models by name, for ``sqcompile show``: the shipped one, a directory's, a tiny transformers one, or one of the user's."""

from __future__ import annotations

import importlib
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from sqcompile.errors import CaptureError

# Two layers of a tiny model, by the names configurations use; each takes those that it knows.
TINY = {
    "vocab_size": 96, "hidden_size": 64, "d_model": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 112, "ffn_dim": 112, "d_ff": 112, "d_kv": 16, "word_embed_proj_dim": 64,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 112, "decoder_ffn_dim": 112,
    "num_local_experts": 4, "num_experts": 4, "image_size": 32, "patch_size": 8, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1, "projection_dim": 48, "num_mel_bins": 8, "max_source_positions": 12,
    "embed_dim": 64, "num_heads": [4], "window_size": 4,
}  # fmt: skip
_DEPTHS = ("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers")
_TOKENS = (2, 16)
_DTYPES = {
    "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "i64": torch.int64, "i32": torch.int32,
    "b1": torch.bool,
}  # fmt: skip


def load(name: str, inputs: Sequence[str] = (), layers: int = 2) -> tuple[nn.Module, Any]:
    """A model in eval mode and an example call of it: a tensor, a tuple of arguments or a dict of keywords.

    Args:
        name: "lm", the directory of a transformers model, a transformers model type such as "llama", or "module:callable",
            which gives a model or a model and an example call.
        inputs: the example call's arguments instead, as `parse_input` reads them.
        layers: of a transformers model.

    Raises:
        CaptureError: for a name that is none of these, or a model without an example call.
    """
    torch.manual_seed(0)
    given: Any = None
    if ":" in name:
        model, given = _call(name)
    elif name == "lm":
        from sqcompile.lm import load_lm

        model, given = load_lm()[0], {"input_ids": _fill((2, 64), torch.int64, 2048)}
    elif os.path.isdir(name):
        model = _directory(name)
    else:
        model = _transformers(name, layers)
    rows = _vocabulary(model)
    if inputs:
        parsed = [parse_input(text, rows) for text in inputs]
        given = {k: v for k, v in parsed if k} or tuple(v for _, v in parsed)
        if len(given) != len(parsed):
            raise CaptureError("--input: give either all inputs a name, or none")
    if given is None and ":" not in name:
        given = _example(model, rows)
    if given is None:
        raise CaptureError(f"{name} gave no example call: return (model, call), or pass --input 'i64[2, 16]'")
    return model.eval(), given


def example_of(model: nn.Module) -> Any:
    """An example call of a transformers model with random values.

    Raises:
        CaptureError: for inputs that nothing is known of.
    """
    return _example(model, _vocabulary(model))


def _vocabulary(model: nn.Module) -> int:
    """A number of which each embedding has as many rows."""
    return min([m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)], default=2)


_MOST_VALUES = 2**30


def parse_input(text: str, rows: int = 2) -> tuple[str, Tensor]:
    """``"input_ids=i64[2, 16]"`` -> ("input_ids", random int64 tensor [2, 16] below rows); the name may be left out.

    Raises:
        CaptureError: for text of another form.
    """
    found = re.fullmatch(r"(?:(\w+)=)?(\w+)\[([\d, ]*)\]", text.strip())
    if not found or found[2] not in _DTYPES:
        raise CaptureError(f"--input {text!r}: write a dtype and a shape, i64[2, 16] or input_ids=i64[2, 16]")
    sizes = [int(s) for s in re.findall(r"\d+", found[3])]
    if math.prod(sizes) > _MOST_VALUES:
        raise CaptureError(f"--input {text!r}: at most {_MOST_VALUES} values")
    return found[1] or "", _fill(sizes, _DTYPES[found[2]], rows)


def _fill(shape: Sequence[int], dtype: torch.dtype, rows: int) -> Tensor:
    if dtype == torch.bool:
        return torch.ones(*shape, dtype=dtype)
    return (
        torch.randn(*shape, dtype=dtype) if dtype.is_floating_point else torch.randint(rows, tuple(shape), dtype=dtype)
    )


def _call(name: str) -> tuple[nn.Module, Any]:
    module, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as e:
        raise CaptureError(f"cannot find {name} ({e}): name a callable as module:callable, importable from here") from e
    made = factory()
    model, given = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, nn.Module):
        raise CaptureError(f"{name} gave a {type(model).__name__}: return a model, or (model, example call)")
    return model, given


def _directory(folder: str) -> nn.Module:
    from sqcompile.checkpoints.float_model import Checkpoint

    return Checkpoint.open(folder).load()


def _transformers(kind: str, layers: int) -> nn.Module:
    try:
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
    except ImportError as e:
        raise CaptureError(f'{kind} needs transformers: pip install "sqcompile[lm]", or name module:callable') from e
    sizes = {**TINY, **dict.fromkeys(_DEPTHS, layers), "depths": [layers]}
    try:
        config = AutoConfig.for_model(kind, **_known(AutoConfig.for_model(kind), sizes))
        causal = type(config) in AutoModelForCausalLM._model_mapping and not config.is_encoder_decoder
        encoder = type(config) in AutoModelForMaskedLM._model_mapping
        return (AutoModelForCausalLM if causal and not encoder else AutoModel).from_config(config)
    except Exception as e:
        raise CaptureError(
            f"there is no directory {kind!r}, and no tiny model of that name can be made ({type(e).__name__}: {str(e)[:160]}): name 'lm', a transformers model type with "
            "a standard configuration, or module:callable"
        ) from e


def _known(config: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    """The sizes that a configuration has, for the configurations inside it, too."""
    own = config.to_dict()
    names = {name for name in sizes if own.get(getattr(config, "attribute_map", {}).get(name, name)) is not None}
    # what is a list here, or a number, is one there: a size per stage of a hierarchical model
    known = {k: sizes[k] for k in names if isinstance(getattr(config, k), (list, tuple)) == isinstance(sizes[k], list)}
    parts = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", {})}
    return known | {name: _known(part, sizes) for name, part in parts.items() if part is not None}


def _example(model: nn.Module, rows: int) -> Any:
    """A call by the names of a model's inputs: tokens, pictures, sound, or what two towers of a model read."""
    main, config = str(getattr(model, "main_input_name", "input_ids")), cast(Any, model.config)
    inner = getattr(config, "vision_config", None)
    # a language model that reads pictures needs none; two towers side by side are compared, and need both
    towers = inner is not None and not any(hasattr(config, f"image_token_{x}") for x in ("id", "index"))
    make: dict[str, Callable[[], Tensor]] = {
        "input_ids": lambda: _fill(_TOKENS, torch.int64, rows),
        "pixel_values": lambda: _picture(inner or config),
        "input_features": lambda: torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions),
        "input_values": lambda: torch.randn(2, _TOKENS[1] * math.prod(config.conv_stride)),
    }
    names = ["input_ids", "pixel_values"] if towers else [main]
    if getattr(config, "is_encoder_decoder", False):
        names.append("decoder_input_ids")
        make["decoder_input_ids"] = lambda: _fill((2, 8), torch.int64, rows)
    try:
        return {name: make[name]() for name in names}
    except (KeyError, AttributeError, TypeError) as e:
        hint = " ".join(f"--input '{name}=f32[...]'" for name in names)
        raise CaptureError(f"{type(model).__name__} reads {', '.join(names)}: pass {hint}") from e


def _picture(config: Any) -> Tensor:
    """Two pictures [2, channels, height, width]."""
    size = config.image_size
    return torch.randn(2, config.num_channels, *(size if isinstance(size, (list, tuple)) else (size, size)))
