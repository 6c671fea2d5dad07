"""directory: a checkpoint as transformers lays it out: configuration, tokenizer, and weights in one file or several.

config.json  generation_config.json  tokenizer.json  model-00001-of-00002.safetensors  model.safetensors.index.json
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sqcompile.files.weights import write_weights
from sqcompile.process.interrupts import checkpoint
from sqcompile.process.spool import Spool

_SHARD = 5 * 10**9  # bytes of a file of weights


class Weights:
    """The weights of a checkpoint, written as they come, in files of a bounded size. None of them is kept in memory."""

    def __init__(self, folder: str, most: int = _SHARD) -> None:
        self.folder, self.most = folder, most
        self.bytes = 0
        self._files: list[list[str]] = []
        self._held: dict[str, tuple[int, torch.dtype, tuple[int, ...]]] = {}
        self._spool, self._size = Spool(folder), 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes tensors by their names."""
        for name, t in tensors.items():
            if self._held and self._size + t.nbytes > self.most:
                self._write()
            offset = self._spool.room(t.dtype, t.shape)
            self._spool.write(offset, t, t.dtype)
            self._held[name] = offset, t.dtype, tuple(t.shape)
            self._size += t.nbytes
            self.bytes += t.nbytes
            checkpoint()

    def finish(self) -> None:
        """Writes what is left, and where there are several files, which tensor is in which."""
        if self._held or not self._files:
            self._write()
        count, where = len(self._files), {}
        for i, names in enumerate(self._files):
            final = "model.safetensors" if count == 1 else f"model-{i + 1:05}-of-{count:05}.safetensors"
            os.rename(self._path(i), os.path.join(self.folder, final))
            where.update(dict.fromkeys(names, final))
        if count > 1:
            index = {"metadata": {"total_size": self.bytes}, "weight_map": where}
            write_json(os.path.join(self.folder, "model.safetensors.index.json"), index)

    def _write(self) -> None:
        mapped = self._spool.map()
        tensors = {name: mapped.tensor(*held) for name, held in self._held.items()} if mapped is not None else {}
        write_weights(self._path(len(self._files)), tensors, {"format": "pt"}, see=lambda *_: checkpoint())
        self._files.append(list(self._held))
        self._held, self._spool, self._size = {}, Spool(self.folder), 0

    def _path(self, i: int) -> str:
        return os.path.join(self.folder, f"weights-{i}.tmp")


def write_config(model: Any, folder: str, quantization: Mapping[str, Any] | None) -> None:
    """Writes config.json, and generation_config.json where there is none: of the model as it is, which stays as it is."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    path = os.path.join(folder, "config.json")
    with open(path, encoding="utf-8") as f:
        written = json.load(f)
    written.pop("quantization_config", None)
    if quantization is not None:
        written["quantization_config"] = quantization
    write_json(path, written)
    generation = os.path.join(folder, "generation_config.json")
    if not os.path.exists(generation) and model.can_generate() and model.generation_config is not None:
        model.generation_config.to_json_file(generation)


def write_json(path: str, found: Any) -> None:
    """Writes JSON that a person can read."""
    with open(path, "w", encoding="utf-8") as f:
        f.write(json.dumps(found, indent=2) + "\n")
