"""tensors: safetensors files of bounded size, and an index that says where each tensor is and what its SHA-256 is.

    {"fc.weight_int8": {"file": "model-00001-of-00001.safetensors", "key": "fc.weight_int8", "dtype": "int8",
                        "shape": [8, 4], "sha256": "..."}}

Reading maps the files into memory. Nothing in them is taken on trust: names are those of files in the directory itself,
the files have what the index says and no more, and a tensor is hashed before it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from sqcompile.capture.call_spec import DTYPES, MOST_DIMS
from sqcompile.errors import ArtifactError
from sqcompile.files.directory import flush, link_or_copy, writers
from sqcompile.files.regular import said
from sqcompile.files.safetensors_files import FILE_NAME, WeightFile
from sqcompile.files.weights import Later, write_weights
from sqcompile.files.work import Work, sha256_of_file
from sqcompile.process.interrupts import checkpoint
from sqcompile.process.progress import part
from sqcompile.process.ranks import ALONE, Ranks

SHARD = 4_000_000_000  # bytes of a file, unless one tensor has more
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SMALL = 2**20  # bytes


def write_tensors(
    folder: str,
    tensors: Mapping[str, Tensor | Later],
    most: int = SHARD,
    kept: Work | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Writes tensors into files of a directory; tensors that are one in memory are written once.

    Of several ranks, each calls it with the same tensors, and those that see the directory share the files.

    Args:
        folder: the directory.
        tensors: by name; on any device, of any layout. They are made, and written, in their order.
        most: bytes of a file.
        kept: has files that an earlier run has finished, and takes new ones; rank 0's.
        ranks: the processes.

    Returns:
        The index; on rank 0.

    Raises:
        OSError: if a file cannot be written.
        ArtifactError: for a dtype that files do not have, or where what another rank has written is not there.
        CalibrationError: where another rank has failed or is dead.
    """
    first: dict[Hashable, str] = {}
    index: dict[str, Any] = {}
    shards: list[list[str]] = [[]]
    room = most
    for name, t in tensors.items():
        key = first.setdefault(_memory(name, t), name)
        index[name] = {"key": key, "dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape)}
        order = _order(t)
        if order != list(range(len(t.shape))):
            index[name]["order"] = order
        if key != name:
            continue
        if shards[-1] and t.nbytes > room:
            shards.append([])
            room = most
        shards[-1].append(name)
        room -= t.nbytes
    with part("tensors", sum(map(len, shards))) as wrote:
        _write_shards(folder, tensors, shards, index, kept, ranks, wrote)
    return index


def _write_shards(
    folder: str,
    tensors: Mapping[str, Tensor | Later],
    shards: list[list[str]],
    index: dict[str, Any],
    kept: Work | None,
    ranks: Ranks,
    wrote: Callable[..., None],
) -> None:
    """Writes the files, and notes in the index which tensor is where."""
    files = {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}
    able = writers(ranks, folder)
    left = [*files]
    for file, sums in _finished(folder, files, kept, ranks).items():
        left.remove(file)
        _note(index, file, sums)
        for _ in sums:
            wrote()
    mine = left[able.index(ranks.rank) :: len(able)] if ranks.rank in able else []
    for name in (n for file, names in files.items() if file not in mine for n in names):
        if isinstance(t := tensors[name], Later):
            t.unwanted()
    # in rounds, after each of which rank 0 keeps what all of them have finished
    for at_once in (left[i : i + len(able)] for i in range(0, len(left), len(able))):
        done = ""
        for own in set(at_once).intersection(mine):
            size, sums = _written(os.path.join(folder, own), {n: tensors[n] for n in files[own]}, ranks, wrote)
            sha256 = sha256_of_file(os.path.join(folder, own)) if kept is not None or ranks.count > 1 else ""
            done = json.dumps([size, sha256, sums])
        told = ranks.tell("file of weights", done)
        for rank, file in zip(able, at_once, strict=False):
            size, sha256, sums = json.loads(told[rank])
            _note(index, file, sums)
            path = os.path.join(folder, file)
            if ranks.first and not (os.path.isfile(path) and os.path.getsize(path) == size):
                raise ArtifactError(
                    f"rank {rank} has written {file}, and rank 0 does not see all of it: write to another disk"
                )
            if kept is not None:
                kept.add(file, path, sums, sha256)
            for _ in sums if rank != ranks.rank else ():
                wrote()


def _finished(
    folder: str, files: Mapping[str, list[str]], kept: Work | None, ranks: Ranks
) -> dict[str, dict[str, str]]:
    """By file that an earlier run has finished, what `_note` takes; the files are put into the directory."""
    found = {}
    for file, names in files.items():
        done = None if kept is None else kept.find(file)
        if done is not None and isinstance(done[1], dict) and done[1].keys() == set(names):
            link_or_copy(done[0], os.path.join(folder, file))
            found[file] = done[1]
    told: dict[str, dict[str, str]] = json.loads(ranks.tell("finished files", json.dumps(found))[0])
    return told


def _written(
    path: str, tensors: dict[str, Tensor | Later], ranks: Ranks, wrote: Callable[..., None]
) -> tuple[int, dict[str, str]]:
    """Writes a file, and gives its bytes and the SHA-256 of each tensor."""
    sums: dict[str, str] = {}

    def see(name: str, values: Any) -> None:
        sums[name] = hashlib.sha256(values).hexdigest()
        checkpoint()
        ranks.check()
        wrote()

    try:
        write_weights(path, {n: _dense(t) for n, t in tensors.items()}, see=see)
        if not ranks.first:  # from here alone what another machine has written gets to the disk
            flush(path)
        return os.path.getsize(path), sums
    except BaseException:
        with contextlib.suppress(OSError):  # rank 0 may have removed the directory while the file was begun
            os.unlink(path)
        raise


def _note(index: dict[str, Any], file: str, sums: Mapping[str, str]) -> None:
    """Says of tensors that they are in a file, by the SHA-256 of each."""
    for entry in index.values():
        if entry["key"] in sums:
            entry |= {"file": file, "sha256": sums[entry["key"]]}


def _memory(name: str, t: Tensor | Later) -> Hashable:
    """Equal for tensors that are one in memory."""
    if isinstance(t, Later) or not t.numel():
        return name
    return t.data_ptr(), t.dtype, t.device, tuple(t.shape), t.stride()


def _dense(t: Tensor | Later) -> Tensor | Later:
    """With its dims as a file has them."""
    return t if isinstance(t, Later) else t.permute(_order(t))


def _order(t: Tensor | Later) -> list[int]:
    """The dims from the one with the largest steps in memory to the one with the smallest."""
    dims = range(len(t.shape))
    if isinstance(t, Later) or t.is_contiguous():
        return list(dims)
    steps = t.stride()
    return sorted(dims, key=lambda d: (-steps[d], d))


def _sha256(t: Tensor) -> str:
    return hashlib.sha256(t.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


class Tensors:
    """The tensors of a directory."""

    def __init__(self, folder: str, index: Any) -> None:
        """Looks at the index and at the headers of the files.

        Raises:
            ArtifactError: if the index is none, or a file is missing, damaged, or has other tensors.
        """
        self.folder, self.index = folder, _checked(index)
        files: dict[str, dict[str, Any]] = {}
        for entry in self.index.values():
            files.setdefault(entry["file"], {}).setdefault(entry["key"], entry)
        self._files = {file: WeightFile(self.folder, file) for file in files}
        for file, entries in files.items():
            places = self._files[file].places
            if places.keys() != entries.keys():
                raise ArtifactError(f"{file} has other tensors than the index says: copy the directory again, whole")
            for key, entry in entries.items():
                want = _stored_shape(entry)
                if list(places[key].shape) != want or places[key].dtype != DTYPES[entry["dtype"]]:
                    raise ArtifactError(
                        f"{key} of {file} is {places[key]}, and the index says {entry['dtype']} {want}: copy the directory "
                        "again, whole"
                    )
        self.nbytes = sum(
            math.prod(e["shape"]) * DTYPES[e["dtype"]].itemsize for of in files.values() for e in of.values()
        )
        self._mapped: dict[str, Tensor] = {}

    def like(self) -> dict[str, Tensor]:
        """By name, tensors of the same sizes, steps in memory and dtypes on the meta device."""
        return {
            name: _laid_out(torch.empty(_stored_shape(e), dtype=DTYPES[e["dtype"]], device="meta"), e)
            for name, e in self.index.items()
        }

    def map(self, name: str) -> Tensor:
        """A tensor whose memory is the file's, as long as it lives; a small one is copied. The same one each time.

        Raises:
            ArtifactError: if its values are not those that were saved.
        """
        key = self.index[name]["key"]
        if key not in self._mapped:
            t = self.read(name)
            self._mapped[key] = t if t.nbytes >= _SMALL else t.clone()  # each mapping takes pages around its own
        return self._mapped[key]

    def read(self, name: str) -> Tensor:
        """A tensor that nothing else holds: its memory is given back with it.

        Raises:
            ArtifactError: as `map`.
        """
        entry = self.index[name]
        checkpoint()
        try:
            t = self._files[entry["file"]].tensor(entry["key"])
        except OSError as e:
            raise ArtifactError(f"{entry['file']} cannot be read ({said(e)}): copy the directory again, whole") from e
        if _sha256(t) != entry["sha256"]:
            raise ArtifactError(
                f"{name} in {entry['file']} is damaged: its SHA-256 is another than was saved. Copy the file again"
            )
        return _laid_out(t, entry)


def _checked(index: Any) -> dict[str, Any]:
    """An index of which every field is what it should be."""
    if not isinstance(index, dict):
        raise ArtifactError("it has no index of tensors")
    for name, e in index.items():
        good = (
            isinstance(e, dict)
            and e.keys() - {"order"} == {"key", "dtype", "shape", "file", "sha256"}
            and all(isinstance(e[k], str) for k in ("key", "dtype", "file", "sha256"))
            and FILE_NAME.fullmatch(e["file"])
            and _SHA256.fullmatch(e["sha256"])
            and e["dtype"] in DTYPES
            and isinstance(e["shape"], list)
            and len(e["shape"]) <= MOST_DIMS
            and all(type(s) is int and 0 <= s < 2**48 for s in e["shape"])
            and sorted(e.get("order", range(len(e["shape"])))) == list(range(len(e["shape"])))
        )
        if not good:
            raise ArtifactError(f"its index has the entry {name[:100]!r}: {str(e)[:100]}, which is none")
    return index


def _stored_shape(entry: Mapping[str, Any]) -> list[int]:
    """The sizes as a file has them: in the order of their steps in memory."""
    return [entry["shape"][d] for d in entry.get("order", range(len(entry["shape"])))]


def _laid_out(stored: Tensor, entry: Mapping[str, Any]) -> Tensor:
    """A tensor as it was, of one as a file has it."""
    order = entry.get("order")
    return stored if order is None else stored.permute([order.index(d) for d in range(len(order))])
