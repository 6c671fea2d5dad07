"""CompiledModel.export: the same checkpoint as of its float model and its plan, or a word why there is none."""

from __future__ import annotations

import gc

import pytest
import torch
from checkpoint_cases import planned, weights
from families import build

import sqcompile
from sqcompile import ArtifactError, StageError


def test_the_same_files_as_of_model_and_plan(tmp_path):
    model, _, plan = planned("opt")
    net = sqcompile.compile(model, plan=plan, backend="eager", progress=False)
    for format in ("smoothed", "compressed-tensors"):
        done = net.export(format, tmp_path / "net")
        assert done.format == format and str(tmp_path / "net") == done.path
        sqcompile.export(model, plan, format, tmp_path / "plan")
        ours, others = weights(tmp_path / "net"), weights(tmp_path / "plan")
        assert ours.keys() == others.keys() and all(torch.equal(t, others[n]) for n, t in ours.items())
        assert (tmp_path / "net" / "config.json").read_text() == (tmp_path / "plan" / "config.json").read_text()
    with pytest.raises(ArtifactError, match="there is no format 'gguf'"):
        net.export("gguf", tmp_path / "none")
    net.save(tmp_path / "saved")
    loaded = sqcompile.load(tmp_path / "saved", backend="eager")
    with pytest.raises(StageError, match=r"no float weights to export: pass the float model to sqcompile\.export"):
        loaded.export("smoothed", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_model_that_changed_or_is_gone_is_not_exported(tmp_path):
    model, call = build("opt")
    net = sqcompile.compile(model, [call], recipe=sqcompile.Recipe(0.5), backend="eager", progress=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[5] += 1
    with pytest.raises(StageError, match="parameters changed since it was compiled"):
        net.export("smoothed", tmp_path / "out")
    del model
    gc.collect()  # the error above holds frames, and they hold the model
    with pytest.raises(StageError, match="the float model was freed"):
        net.export("smoothed", tmp_path / "out")
    assert not (tmp_path / "out").exists()
