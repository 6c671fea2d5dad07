"""models: what `generate` can run: a causal language model of transformers, as it is or compiled."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sqcompile.compiled.emit import CompiledModel
from sqcompile.errors import GenerationError
from sqcompile.pytorch.core import compiled_call
from sqcompile.pytorch.dynamo import OptimizedModule, backend_of, backend_of_function, original

_WANTED = "sqcompile.generate takes a causal language model of transformers, or what torch.compile made of one"


def transformers_model(model: Any) -> Any:
    """The model of transformers in what a caller passes.

    Raises:
        GenerationError: if there is none, or it cannot decode with a static KV cache on one device.
    """
    from transformers import GenerationMixin, PreTrainedModel

    if isinstance(model, CompiledModel):
        raise GenerationError(
            "what sqcompile.compile gives has no KV cache, and decodes no single tokens: pass "
            "torch.compile(model, backend='smoothquant', options={'plan': compiled.plan}) to sqcompile.generate"
        )
    found = original(model) if isinstance(model, OptimizedModule) else model
    if not isinstance(found, PreTrainedModel) or not isinstance(found, GenerationMixin):
        raise GenerationError(f"{_WANTED}, and this is a {type(found).__name__}")
    if found.config.is_encoder_decoder:
        raise GenerationError(f"{_WANTED}, and {type(found).__name__} has an encoder: use model.generate")
    rotary = getattr(found.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    for kind in {rotary.get("rope_type"), *(r.get("rope_type") for r in rotary.values() if isinstance(r, dict))}:
        if kind in ("dynamic", "longrope"):
            raise GenerationError(
                f"the model's rotary embedding of type {kind!r} becomes another one as the text grows, which a step that is "
                "the same for every token cannot follow: use model.generate"
            )
    devices = {str(p.device) for p in found.parameters()}
    if len(devices) != 1 or "meta" in devices:
        raise GenerationError(
            f"the model's parameters are on {', '.join(sorted(devices)) or 'no device'}: load it onto one device"
        )
    own: Any = backend_of(model) if isinstance(model, OptimizedModule) else backend_of_function(compiled_call(found))
    if found.device.type == "cuda" and getattr(own, "config", {}).get("triton.cudagraphs"):
        raise GenerationError(
            "the model is compiled with CUDA graphs of PyTorch's own, which cannot be recorded into another one: compile it "
            "without mode='reduce-overhead' or 'max-autotune', as sqcompile.generate records each token whole"
        )
    return found


def accepted(model: Any, name: str) -> bool:
    """Whether the model's forward has an argument of this name."""
    return name in inspect.signature(model.forward).parameters


def longest_text(model: Any) -> int | None:
    """Positions that the model has, None if its configuration does not say."""
    found = getattr(model.config, "max_position_embeddings", None)
    return found if isinstance(found, int) else None


@contextlib.contextmanager
def within_positions(model: Any, asked: int) -> Iterator[None]:
    """Says of a table of positions that it is too short for so many tokens.

    Raises:
        GenerationError: in the place of an IndexError of such a table.
    """
    try:
        yield
    except IndexError as e:
        positions = longest_text(model)
        if positions is None or asked <= positions:
            raise
        raise GenerationError(
            f"the prompt and max_new_tokens are {asked} tokens, and the model has {positions} positions: shorten them"
        ) from e


def ways_to_call(model: nn.Module) -> tuple[Any, ...]:
    """What calling a module runs where that can change between two calls, by weak references."""
    own = original(model) if isinstance(model, OptimizedModule) else model
    return tuple(f and weakref.ref(f) for f in (compiled_call(own), own.__dict__.get("forward")))


def check_device(model: Any) -> torch.device:
    """Where the model is.

    Raises:
        GenerationError: on a GPU whose stream records somebody else's CUDA graph.
    """
    device: torch.device = model.device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise GenerationError(
            "sqcompile.generate waits for the device, which cannot be recorded as part of a CUDA graph"
        )
    return device


def check_record(record: bool, device: torch.device) -> None:
    """Raises: GenerationError, where steps are to be recorded and there are no CUDA graphs."""
    if record and device.type != "cuda":
        raise GenerationError(f"record=True replays tokens as CUDA graphs, and the model is on {device}: leave it out")
