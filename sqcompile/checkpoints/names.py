"""names: under which names a checkpoint holds a transformers model's tensors, which are not always those in memory.

    model.layers.0.mlp.experts.down_proj [E, N, K]
->
    model.layers.0.block_sparse_moe.experts.0.w2.weight [N, K], ...

transformers renames modules as it loads a checkpoint, and stacks experts; as it saves one it undoes both. That is asked
of transformers itself, tensor by tensor.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sqcompile.errors import ArtifactError


class CheckpointNames:
    """The names of one model's tensors.

    Attributes:
        saved: what a checkpoint holds, by the names in memory: one of each group of tied tensors, and none that the model
            makes by itself.
    """

    def __init__(self, model: nn.Module) -> None:
        """Looks at a model.

        Raises:
            ArtifactError: if it is none of transformers.
        """
        transformers = sys.modules.get("transformers")  # who has a model of it has loaded it
        if transformers is None or not isinstance(model, transformers.PreTrainedModel):
            raise ArtifactError(
                f"a {type(model).__name__} has no configuration to write a checkpoint with: pass a model of transformers "
                "(AutoModelForCausalLM.from_pretrained), without anything wrapped around it"
            )
        self.model: Any = model
        self.every: dict[str, Tensor] = {n: t for n, t in model.state_dict().items() if isinstance(t, Tensor)}
        dropped = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        first: dict[Any, str] = {}
        for name, t in sorted(self.every.items(), key=lambda item: item[0] in tied):
            same = (t.data_ptr(), t.dtype, tuple(t.shape), t.stride()) if t.numel() else name
            if first.setdefault(same, name) != name and name in tied:
                dropped.add(name)
        self.saved = [name for name in self.every if name not in dropped]
        self._of: dict[str, tuple[str, ...]] = {}

    def convert(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by their names in memory as a checkpoint holds them: renamed, and experts apart.

        Raises:
            ArtifactError: if transformers cannot undo what it did when it loaded them.
        """
        from transformers.core_model_loading import revert_weight_conversion

        try:
            found: dict[str, Tensor] = revert_weight_conversion(self.model, dict(tensors))
        except Exception as e:
            raise ArtifactError(
                f"transformers cannot write {next(iter(tensors), 'nothing')!r} and its neighbours as a checkpoint has them "
                f"({type(e).__name__}: {e}): try another version of transformers"
            ) from e
        return found

    def convert_rows(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """`convert` for tensors of one number a row: of size one where those of the model have K. Each is [N, 1] then.

        They go as two equal columns, of which the first is taken: transformers 5.17 drops a dim of size one where it takes
        experts apart.
        """
        wide = {}
        for name, t in tensors.items():
            sizes = zip(t.shape, self.every[name].shape, strict=True)
            wide[name] = t.expand([2 if size == 1 and of > 1 else size for size, of in sizes])
        found = self.convert(wide) if wide else {}
        return {name: t[..., :1].clone(memory_format=torch.contiguous_format) for name, t in found.items()}

    def of(self, name: str) -> tuple[str, ...]:
        """Under which names a checkpoint holds a tensor; none where it is not made of that tensor alone."""
        if name not in self._of:
            try:
                stand_in = torch.empty_like(self.every[name], device="meta")
                self._of[name] = tuple(self.convert({name: stand_in}))
            except ArtifactError:
                self._of[name] = ()
        return self._of[name]

    def modules_of(self, name: str) -> tuple[str, ...]:
        """The modules that hold a tensor as their weight, in a checkpoint and in memory."""
        found = [n.removesuffix(".weight") for n in (*self.of(name), name) if n.endswith(".weight")]
        return tuple(dict.fromkeys(found))

    def blocks(self) -> Iterator[list[str]]:
        """``saved``, block by repeated block: no tensor in a checkpoint is made of those of two."""
        groups: dict[str, list[str]] = {}
        for name in self.saved:
            parts = name.split(".")
            index = next((i for i, part in enumerate(parts) if part.isdigit()), None)
            groups.setdefault("" if index is None else ".".join(parts[: index + 1]), []).append(name)
        yield from groups.values()
