"""Saving what was loaded, over what is there, and after the float model was written to."""

from __future__ import annotations

import os

import pytest
import torch
from artifact_cases import batch, compiled, equal, load, manifest
from torch import nn

import sqcompile
from sqcompile import ArtifactError, Recipe, StageError


class Pairs(nn.Module):
    """Takes an even number of tokens, which is a condition of its sizes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return self.down(torch.relu(self.up(self.norm(x)))).view(x.shape[0], -1, 2, 32).sum(2)


def test_sizes_have_their_names_when_a_loaded_model_is_saved_again(tmp_path):
    """Conditions and graph speak of the same ones."""
    model, batches = Pairs().eval(), [torch.randn(2, 6, 32), torch.randn(3, 8, 32)]
    net = sqcompile.compile(model, batches, recipe=Recipe(0.5), backend="eager", progress=False)
    net.save(tmp_path / "first")
    assert manifest(tmp_path / "first")["calls"]["conditions"]
    load(tmp_path / "first").save(tmp_path / "second")
    assert manifest(tmp_path / "first") == manifest(tmp_path / "second")
    again, x = load(tmp_path / "second"), torch.randn(4, 10, 32)
    assert torch.equal(again(x), net(x))


@pytest.mark.parametrize("how", ["norm", "weight"])
def test_a_write_behind_the_count_of_writes_is_seen_before_anything_is_saved(how, tmp_path):
    model, x = Pairs().eval(), torch.randn(2, 6, 32)
    net = sqcompile.compile(model, [x], recipe=Recipe(0.5), backend="eager", progress=False)
    if how == "norm":
        model.norm.bias.data.add_(5)
    else:
        model.up.weight.data.mul_(3)
    for write in (lambda: net.save(tmp_path / "net"), lambda: net.export("pt2", tmp_path / "net.pt2")):
        with pytest.raises(StageError, match="parameters changed since it was compiled"):
            write()
    assert not any(tmp_path.iterdir())


def test_a_directory_with_somebody_elses_files_is_not_replaced(tmp_path):
    net = compiled()
    net.save(tmp_path / "net")
    (tmp_path / "net" / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"has 'notes\.txt', which sqcompile has not written and would remove"):
        net.save(tmp_path / "net")
    assert (tmp_path / "net" / "notes.txt").read_text() == "mine" and equal(
        load(tmp_path / "net")(batch()), net(batch())
    )


def test_the_working_directory_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "here" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "inner")
    net = compiled()
    for path in (".", ".."):
        with pytest.raises(ArtifactError, match="is the working directory, or has it"):
            net.save(path)
    net.save("net")
    assert os.getcwd() == str(tmp_path / "here" / "inner") and equal(load("net")(batch()), net(batch()))
