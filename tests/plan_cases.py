"""A small model, its plans, and files of them that are not as Plan.save writes them."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import torch
from safetensors import safe_open
from safetensors.torch import load, save_file
from torch import nn

import sqcompile
from sqcompile import Recipe
from sqcompile.plan import file as plan_file
from sqcompile.plan.recipe import resolve_recipe

KEY = "sqcompile_plan"


class Attend(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(32), nn.Linear(32, 16)
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).unflatten(-1, (2, 16)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.mlp(y.transpose(1, 2).flatten(2))


@functools.cache
def dynamic_plan():
    torch.manual_seed(0)
    recipe = Recipe(attention="qk")
    return sqcompile.calibrate(Attend().eval(), [torch.randn(2, 9, 32)], recipe=recipe, progress=False)


@functools.cache
def static_plan():
    torch.manual_seed(0)
    recipe = replace(resolve_recipe("O3"), alpha=0.5, rotate="none")  # every site is smoothed
    return sqcompile.calibrate(Attend().eval(), [torch.randn(2, 9, 32)], recipe=recipe, progress=False)


def parts(plan, path):
    """JSON and tensors of a saved plan."""
    plan.save(path)
    with safe_open(path, "pt") as f:
        return json.loads(f.metadata()[KEY]), load(path.read_bytes())  # not mapped: the file is written over


def write(path, meta, tensors):
    """A file with a right checksum, whatever is in it."""
    if isinstance(meta, dict) and "sha256" in meta:
        meta = {k: v for k, v in meta.items() if k != "sha256"}
        meta["sha256"] = plan_file.checksum(meta, tensors)
    save_file(tensors, path, {KEY: meta if isinstance(meta, str) else json.dumps(meta)})
