"""A small model that is saved and loaded, and artifacts that are not as `save` writes them."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sqcompile
from sqcompile import Recipe
from sqcompile.artifact import manifest as manifests


class Block(nn.Module):
    """A norm, an MLP, a table, a mask of bools and a weight that is stored transposed."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.table, self.norm = nn.Embedding(50, width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.out = nn.Parameter(torch.randn(width, 20).t())
        self.register_buffer("keep", torch.rand(20) > 0.2)

    def forward(self, ids: Tensor) -> dict[str, Any]:
        x = self.table(ids)
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return {"logits": (x @ self.out.t()).masked_fill(~self.keep, 0.0), "last": (x[:, -1], ids.shape[1])}


def batch(seed: int = 0, rows: int = 2, tokens: int = 9) -> Tensor:
    return torch.randint(0, 50, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@functools.cache
def model() -> Block:
    torch.manual_seed(0)
    return Block().eval()


RECIPE = Recipe(alpha=0.5, rotate=32)


@functools.cache
def compiled(recipe: Recipe = RECIPE, seed: int = 0) -> sqcompile.CompiledModel:
    batches = [batch(seed + i) for i in range(4)]
    return sqcompile.compile(model(), batches, recipe=recipe, backend="eager", progress=False)


def load(path: Path) -> sqcompile.CompiledModel:
    return sqcompile.load(path, backend="eager")


def equal(a: Any, b: Any) -> bool:
    """Whether two results are the same, to the bit and in their structure."""
    leaves = [torch.utils._pytree.tree_flatten(x) for x in (a, b)]
    (x, spec), (y, other) = leaves
    return spec == other and all(
        torch.equal(p, q) if isinstance(p, Tensor) else p == q for p, q in zip(x, y, strict=True)
    )


def manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / manifests.MANIFEST).read_text())


def write_manifest(path: Path, meta: dict[str, Any]) -> None:
    """The manifest with a right checksum, whatever is in it."""
    meta = {k: v for k, v in meta.items() if k != "sha256"}
    sha256 = manifests.sha256_of(json.loads(json.dumps(meta)))
    (path / manifests.MANIFEST).write_text(json.dumps({**meta, "sha256": sha256}))


def copy(path: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(path, to)
    return to
