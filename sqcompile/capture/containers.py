"""containers: what holds tensors in a call or a result, and is more than a tuple, a list or a dict: a KV cache."""

from __future__ import annotations

import sys

from sqcompile.capture.inputs import Call
from sqcompile.errors import CaptureError
from sqcompile.pytorch.core import pytree


def register_kv_cache_pytree() -> None:
    """Lets a model return transformers' DynamicCache, where transformers is loaded at all."""
    if "transformers.cache_utils" in sys.modules:
        from transformers.cache_utils import DynamicCache
        from transformers.integrations.executorch import register_dynamic_cache_export_support

        if DynamicCache not in pytree.SUPPORTED_NODES:
            register_dynamic_cache_export_support()


def refuse_containers(call: Call) -> None:
    """Refuses arguments that do more than hold tensors: a model writes to a KV cache, which no graph here does.

    Raises:
        CaptureError: if there is one.
    """
    for i, given in enumerate((*call.args, *call.kwargs.values())):
        leaves, spec = pytree.tree_flatten(given)
        try:
            pytree.tree_unflatten([*range(len(leaves))], spec)  # what only holds its parts holds any
        except Exception as e:
            name = f"argument {i}" if i < len(call.args) else [*call.kwargs][i - len(call.args)]
            raise CaptureError(
                f"{name} is a {type(given).__name__}, which does more than hold its parts, as a KV cache does that a model writes "
                "to: leave it out, or use torch.compile(model, backend='smoothquant'), which serves calls with a KV cache"
            ) from e
