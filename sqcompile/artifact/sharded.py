"""sharded: the shards of a model as one directory, which the processes write together, whole or not at all.

out/
    sharded.json      how many there are, SHA-256 of each one's manifest, and of it all
    rank-0-of-2/      what `directory.save` writes of a whole model; its plan says whose shard it is
    rank-1-of-2/
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx

from sqcompile.artifact.directory import described, path_name, versions, write
from sqcompile.artifact.manifest import (
    FORMAT,
    manifest,
    read_manifest,
    sha256_of,
    write_manifest,
)
from sqcompile.capture.inputs import Forward
from sqcompile.errors import ArtifactError, CalibrationError, PlanError, SQCompileError
from sqcompile.files.directory import SHARDED, directory_of, flush
from sqcompile.files.regular import said
from sqcompile.plan.plan import Plan
from sqcompile.process.parallel import Parallel
from sqcompile.process.ranks import Ranks, together

_FIELDS = {"format", "versions", "shards"}
_MOST = 2**16  # processes


def save_shard(
    quantized: Callable[[], fx.GraphModule],
    parallel: Parallel,
    plan: Plan,
    call: Forward,
    path: str | os.PathLike[str],
    most: int,
) -> None:
    """Writes this process's shard, and the first process a directory of all. Each process calls it.

    Args:
        quantized: gives the graph of the quantized stage, which all processes make together.
        parallel: the processes.
        plan, call, most: as for `directory.save`.
        path: as there, on a disk that all of them see.

    Raises:
        ArtifactError: in each of them, if one cannot save something of the model, or cannot write.
    """
    name = path_name(path)
    with as_artifact(), together(group=parallel.group) as ranks:
        try:
            _save(quantized(), plan, call, name, most, ranks)
        except (ArtifactError, PlanError) as e:
            raise ArtifactError(f"the model cannot be saved to {name}: {e}") from e
        except SQCompileError:
            raise
        except Exception as e:  # whatever the system has to say of it
            raise ArtifactError(f"the model cannot be saved to {name} ({said(e)})") from e


def _save(quantized: fx.GraphModule, plan: Plan, call: Forward, name: str, most: int, ranks: Ranks) -> None:
    meta = described(quantized, call)
    with directory_of(ranks, name) as temporary:
        if not os.path.isdir(temporary):
            raise ArtifactError(f"rank {ranks.rank} does not see {temporary}: pass a path that all processes see")
        own = os.path.join(temporary, _folder(ranks.rank, ranks.count))
        os.mkdir(own)
        try:
            digest = write(own, meta, quantized, plan, most)
            for file in os.listdir(own):
                flush(os.path.join(own, file))
            flush(own)
            written = ranks.tell("own shard", digest)
            if ranks.first:
                for rank, sha256 in enumerate(written):
                    if _digest(os.path.join(temporary, _folder(rank, ranks.count))) != sha256:
                        raise ArtifactError(f"rank {rank} writes to another disk: pass a path that all processes see")
                meta = {"format": FORMAT, "versions": versions(), "shards": written}
                write_manifest(os.path.join(temporary, SHARDED), meta)
        except BaseException:
            shutil.rmtree(own, ignore_errors=True)
            raise


def shard_in(path: str | os.PathLike[str], parallel: Parallel, ranks: Ranks) -> str:
    """The directory of this process's shard. Each process calls it.

    Args:
        path: what `save_shard` was given.
        parallel: the processes.
        ranks: these, as they tell each other of errors.

    Raises:
        ArtifactError: if there is none, it is damaged, or of another number of processes.
        CalibrationError: if another process was given another one.
    """
    name = path_name(path)
    try:
        shards = _shards(name)
        if len(shards) != parallel.count:
            raise ArtifactError(
                f"it has the shards of {len(shards)} processes, and device_mesh has {parallel.count}: load it in as many as "
                "saved it, or compile the model with these and save that"
            )
        ranks.agree({"another saved model": (json.dumps(shards), "pass every rank the same directory")})
        own = os.path.join(name, _folder(parallel.rank, parallel.count))
        if _digest(own) != shards[parallel.rank]:
            raise ArtifactError(f"{os.path.basename(own)} is of another model: copy the directory again")
        return own
    except ArtifactError as e:
        raise ArtifactError(f"{name} cannot be loaded: {e}") from e
    except SQCompileError:
        raise
    except Exception as e:
        raise ArtifactError(f"{name} cannot be loaded ({said(e)}): save the model again") from e


def _shards(name: str) -> list[str]:
    path = os.path.join(name, SHARDED)
    if not os.path.isdir(name):
        raise ArtifactError("there is no such directory: pass what CompiledModel.save was given")
    if not os.path.lexists(path):
        raise ArtifactError("it has no shards: leave device_mesh out, or save a model that was compiled with it")
    shards: Any = read_manifest(path, _FIELDS)["shards"]
    if not isinstance(shards, list) or not 1 < len(shards) <= _MOST or not all(isinstance(s, str) for s in shards):
        raise ArtifactError(f"{SHARDED} has no list of shards: save the model again")
    return shards


def _digest(folder: str) -> str | None:
    """SHA-256 of a shard's manifest; None where there is no shard."""
    return sha256_of(manifest(folder)) if os.path.isdir(folder) else None


def _folder(rank: int, count: int) -> str:
    return f"rank-{rank}-of-{count}"


@contextlib.contextmanager
def as_artifact() -> Iterator[None]:
    """What processes say of each other is an ArtifactError."""
    try:
        yield
    except CalibrationError as e:
        raise ArtifactError(str(e)) from e
