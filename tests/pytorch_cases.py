"""A small module, as torch.export captures it."""

from __future__ import annotations

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x)


def exported(*, out=lambda y: y):
    class Changed(Net):
        def forward(self, x):
            return out(self.fc(x["tokens"]))

    rows = torch.export.Dim("rows", min=2, max=64)
    x = {"tokens": torch.randn(3, 4)}
    return torch.export.export(Changed(), (x,), dynamic_shapes=({"tokens": {0: rows}},))


def symbolic_size():
    return next(n for n in exported().graph.nodes if n.name == "linear").meta["val"].shape[0]
