"""refresh: weights that were written to without PyTorch knowing are quantized again."""

from __future__ import annotations

from typing import Any

from torch import nn

from sqcompile.compiled.emit import CompiledModel
from sqcompile.errors import StageError


def refresh(model: Any) -> None:
    """Has the backend quantize a model's weights again at its next call.

    It sees by itself what PyTorch counts: optimizers, ``load_state_dict``, ``weight.mul_(2)``, ``weight.data = other``. What
    is written through ``.data`` (``weight.data.copy_(other)``, as tools do that swap adapters) leaves no trace: call this
    right after it.

    Args:
        model: what ``torch.compile(model, backend="smoothquant")`` gave, or the model itself.

    Raises:
        StageError: for what `sqcompile.compile` gave, whose weights are its own, and for what is no module.
    """
    from sqcompile.backend.weights import touch
    from sqcompile.pytorch.dynamo import OptimizedModule, original  # here, as Dynamo imports triton

    if isinstance(model, OptimizedModule):
        model = original(model)
    if isinstance(model, CompiledModel):
        raise StageError(
            "a compiled model has weights of its own, which do not follow the float model's: compile that one again with "
            "sqcompile.compile(model, plan=compiled.plan), which needs no data"
        )
    if not isinstance(model, nn.Module):
        raise StageError(f"refresh({type(model).__name__}): pass the model, or what torch.compile made of it")
    touch([*model.parameters(), *model.buffers()])
