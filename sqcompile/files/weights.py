"""weights: a safetensors file of tensors, as models' tensors are: on any device, views of each other, tied."""

from __future__ import annotations

import os
from collections.abc import Mapping

import safetensors.torch
from torch import Tensor


def write_weights(
    path: str, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> dict[str, Tensor]:
    """Writes a file, and gives what is in it: contiguous tensors on the CPU, each with a memory of its own.

    Args:
        path: of a file that is not there yet. Who may read it, its directory's permissions say.
        tensors: by name.
        metadata: of the file.

    Raises:
        OSError: if it cannot be written.
    """
    own: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, given in tensors.items():
        t = given.detach().cpu().contiguous()
        storage = t.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != t.nbytes:
            t = t.clone()
        seen.add(t.untyped_storage().data_ptr())
        own[name] = t
    safetensors.torch.save_file(own, path, metadata)
    os.chmod(path, os.stat(os.path.dirname(path)).st_mode & 0o666)  # the library gives it to the owner alone
    return own
