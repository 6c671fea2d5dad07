"""One process of tests/whole/test_parallel_saving.py: shards that are saved and loaded, and what is said where they cannot be."""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from parallel_worker import SIZE, Block, Plain, batches, group, said, sharded
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import sqcompile
from sqcompile.artifact import manifest
from sqcompile.artifact import sharded as files
from sqcompile.files import directory as directories
from sqcompile.passes.ir.about import about

X = batches(1)[0]


def run(model: Any, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        return model(x)


def listed(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def saved(mesh: Any, folder: Path) -> dict[str, Any]:
    """Each model as it is computed after it was loaded, beside the one that was saved."""
    found: dict[str, Any] = {}
    gathered = parallelize_module(Plain(64).eval(), mesh, {"up": ColwiseParallel(output_layouts=Replicate())})
    static = sqcompile.Recipe(activation="per_tensor_static")
    models: dict[str, tuple[Any, Any, Tensor]] = {
        "block": (sharded(mesh), sqcompile.Recipe(alpha=0.5), X),
        "static": (sharded(mesh), static, X),
        "gathered": (gathered, static, X[0]),
    }
    for name, (model, recipe, x) in models.items():
        data = batches() if x is X else [b[0] for b in batches()]
        compiled = sqcompile.compile(
            model, data, recipe=recipe, backend="eager", progress=False, device_mesh=mesh, dynamic_shapes="auto"
        )
        if mesh.get_local_rank() == 0:  # what needs no other process asks none: it would not answer
            compiled.stages["quantized"]
        compiled.save(folder / name)
        loaded = sqcompile.load(folder / name, backend="eager", device_mesh=mesh)
        again = sqcompile.load(folder / name, backend="eager", device_mesh=DeviceMesh.from_group(other_group(), "cpu"))
        loaded.save(folder / f"{name} again")
        nodes = loaded.stages["quantized"].graph.nodes
        found[name] = {
            "equal": torch.equal(run(compiled, x), run(loaded, x)),
            "quantized": torch.equal(run(compiled.stages["quantized"], x), run(loaded.stages["quantized"], x)),
            "in another group": torch.equal(run(compiled, x), run(again, x)),
            "groups": len({about(m.lowered).parallel.group.group_name for m in (loaded, again)}),
            "plan": loaded.plan == compiled.plan,
            "collectives": sorted({str(n.target).split(".")[1] for n in nodes if "_c10d" in str(n.target)}),
            "files": listed(folder / name),
            "the same weights": [
                (folder / name / file).read_bytes() == (folder / f"{name} again" / file).read_bytes()
                for file in listed(folder / name)
                if file.endswith(".safetensors")
            ],
        }
    return found


_groups: list[Any] = []


def other_group() -> Any:
    if not _groups:
        _groups.append(distributed.new_group([*range(SIZE)]))
    return _groups[0]


def failing(rank: int, of: int, where: Any, name: str) -> Any:
    """A function fails in one process."""

    def run(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    return mock.patch.object(where, name, run if rank == of else getattr(where, name))


def refused(mesh: Any, rank: int, folder: Path) -> dict[str, Any]:
    """What is said, by all processes, of what cannot be saved or loaded; and what is left then."""
    compiled = sqcompile.load(folder / "block", backend="eager", device_mesh=mesh)
    if rank == 0:
        (folder / "other files").mkdir()
        (folder / "other files" / "mine").write_text("")
        for name in ("swapped", "four", "damaged"):
            shutil.copytree(folder / "block", folder / name)
        shutil.rmtree(folder / "swapped" / "rank-1-of-2")
        shutil.copytree(folder / "static" / "rank-1-of-2", folder / "swapped" / "rank-1-of-2")
        meta = json.loads((folder / "four" / "sharded.json").read_text())
        del meta["sha256"]
        manifest.write_manifest(str(folder / "four" / "sharded.json"), {**meta, "shards": meta["shards"] * 2})
        (folder / "damaged" / "sharded.json").write_text(json.dumps({**meta, "sha256": ""}))
    distributed.barrier()

    def load(name: str, **how: Any) -> Callable[[], Any]:
        return lambda: sqcompile.load(folder / name, backend="eager", **how)

    before = listed(folder / "block")
    calls: dict[str, Callable[[], Any]] = {
        "no mesh": load("block"),
        "one shard": load("block/rank-0-of-2"),
        "a whole model": load("whole", device_mesh=mesh),
        "nothing there": load("nothing", device_mesh=mesh),
        "no DeviceMesh": load("block", device_mesh="tp"),
        "other shards": load("swapped", device_mesh=mesh),
        "four processes": load("four", device_mesh=mesh),
        "damaged": load("damaged", device_mesh=mesh),
        "two models": load("static" if rank else "block", device_mesh=mesh),
        "code": lambda: compiled.save(folder / "block", code=True),
        "load code": lambda: sqcompile.load(folder / "block", code=True, device_mesh=mesh),
        "export": lambda: compiled.export("onnx", "x.onnx"),
        "other files": lambda: compiled.save(folder / "other files"),
        "no directory": lambda: compiled.save(folder / "nothing" / "out"),
    }
    found = {name: said(call).replace(str(folder), "FOLDER") for name, call in calls.items()}
    full = {
        "rank 1 is full": (1, files, "write"),
        "rank 0 is full": (0, files, "write_manifest"),
        "no place": (0, directories, "_put"),
    }
    for name, (of, where, function) in full.items():
        with failing(rank, of, where, function):
            found[name] = said(lambda: compiled.save(folder / "block")).replace(str(folder), "FOLDER")
    distributed.barrier()
    again = sqcompile.load(folder / "block", backend="eager", device_mesh=mesh)
    return {
        "said": found,
        "kept": [listed(folder / "block") == before, torch.equal(run(again), run(compiled))],
        "left": sorted(os.listdir(folder)),
    }


def main(rank: int, folder: Path) -> None:
    warnings.simplefilter("ignore")
    files_in = folder / "files"
    if rank == 0:
        files_in.mkdir()
        model = Block().eval()
        how: dict[str, Any] = {"recipe": sqcompile.Recipe(alpha=0.5), "backend": "eager", "progress": False}
        sqcompile.compile(model, batches(), **how).save(files_in / "whole")
    with group(rank, folder) as mesh:
        found = {**saved(mesh, files_in), "refused": refused(mesh, rank, files_in)}
        (folder / f"found-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
