"""Tensor parallel: the processes save a model as one directory, whole or not at all, and load each its own shard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import parallel_saving
import pytest
from parallel_cases import run

SHARD = ("model-00001-of-00001.safetensors", "plan.safetensors", "sqcompile.json")
FULL = "(OSError: [Errno 28] No space left on device)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saving")


@pytest.fixture(scope="module")
def both(folder) -> list[dict[str, Any]]:
    return run(parallel_saving.__file__, folder, seconds=240)


@pytest.mark.parametrize("name", ["block", "static", "gathered"])
def test_what_is_loaded_computes_the_same_bits(both, name):
    """Also with a group of another name, and in the quantized stage; saved again it is the same weights."""
    for found in both:
        one = found[name]
        assert one["equal"] and one["quantized"] and one["in another group"] and one["groups"] == 2 and one["plan"]
        assert one["collectives"] == ["all_gather_into_tensor" if name == "gathered" else "all_reduce", "wait_tensor"]
        assert one["files"] == [f"rank-{rank}-of-2/{file}" for rank in (0, 1) for file in SHARD] + ["sharded.json"]
        assert len(one["the same weights"]) == 4 and all(one["the same weights"])


def test_a_file_names_no_group(both, folder):
    for rank in (0, 1):
        text = (folder / "files" / "block" / f"rank-{rank}-of-2" / "sqcompile.json").read_text()
        calls = text.split('"target": "_c10d_functional.all_reduce.default", "args": [')[1:]
        assert len(calls) == 2
        assert all(
            call.partition("}, ")[2].startswith('"sum", "the group of the model\'s processes"]') for call in calls
        )


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("no mesh", "ArtifactError: FOLDER/block cannot be loaded: it has shards of a model: load it in as many processes, with device_mesh", ""),
        ("one shard", "ArtifactError: FOLDER/block/rank-0-of-2 cannot be loaded: it is a shard of a model: pass the directory that holds all of them, in every process, with device_mesh", ""),
        ("a whole model", "ArtifactError: FOLDER/whole cannot be loaded: it has no shards: leave device_mesh out, or save a model that was compiled with it", ""),
        ("nothing there", "ArtifactError: FOLDER/nothing cannot be loaded: there is no such directory: pass what CompiledModel.save was given", ""),
        ("no DeviceMesh", "CaptureError: device_mesh='tp': pass a torch.distributed.device_mesh.DeviceMesh of one dim", ""),
        ("other shards", "ArtifactError: rank 1 failed: FOLDER/swapped cannot be loaded: rank-1-of-2 is of another model: copy the directory again", "ArtifactError: FOLDER/swapped cannot be loaded: rank-1-of-2 is of another model: copy the directory again"),
        ("four processes", "ArtifactError: FOLDER/four cannot be loaded: it has the shards of 4 processes, and device_mesh has 2: load it in as many as saved it, or compile the model with these and save that", ""),
        ("damaged", "ArtifactError: FOLDER/damaged cannot be loaded: sharded.json is damaged or was edited: copy the directory again, or save the model again", ""),
        ("two models", "ArtifactError: rank 1 has another saved model than rank 0: pass every rank the same directory", ""),
        ("code", "ArtifactError: code=True keeps the code of a whole model, and this one is sharded: leave code out", ""),
        ("load code", "ArtifactError: code=True with device_mesh: code is kept of whole models, leave code out", ""),
        ("export", "ArtifactError: the model is sharded, and this process has one shard of it: compile the whole model to export it, or save the shards with compiled.save(directory) in every process", ""),
    ],
)  # fmt: skip
def test_refusals(both, name, first, second):
    """``second``: what the second process says, if it is something else."""
    assert [found["refused"]["said"][name] for found in both] == [first, second or first]


@pytest.mark.parametrize(
    ("name", "rank", "says"),
    [
        ("other files", 0, "FOLDER/other files (FileExistsError: FOLDER/other files has other files in it, which would be removed: pass the path of a new directory, or empty this one)"),
        ("no directory", 0, "FOLDER/nothing/out (FileNotFoundError: there is no directory FOLDER/nothing: make it first)"),
        ("rank 1 is full", 1, f"FOLDER/block {FULL}"),
        ("rank 0 is full", 0, f"FOLDER/block {FULL}"),
        ("no place", 0, f"FOLDER/block {FULL}"),
    ],
)  # fmt: skip
def test_all_or_nothing(both, name, rank, says):
    """One process cannot write: all of them say so, and what was there is there."""
    own, other = both[rank]["refused"], both[1 - rank]["refused"]
    assert own["said"][name] == f"ArtifactError: the model cannot be saved to {says}"
    assert other["said"][name] == f"ArtifactError: rank {rank} failed: the model cannot be saved to {says}"
    for found in (own, other):
        assert found["kept"] == [True, True]
        assert not [file for file in found["left"] if file.startswith(".")]
