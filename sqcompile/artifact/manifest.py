"""manifest: the JSON file that says what a directory holds, with its own SHA-256. What it says is read whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

from sqcompile.errors import ArtifactError
from sqcompile.files.bounded_json import read_object
from sqcompile.files.directory import MANIFEST, SHARDED
from sqcompile.files.regular import read_regular

FORMAT = 2  # 1 does not say which plan it goes with
_MOST_BYTES = 2**29  # of the manifest
_FIELDS = {"format", "versions", "forward", "calls", "returns", "graph", "tensors", "plan", "code"}


def write_manifest(path: str, meta: dict[str, Any]) -> None:
    """Writes what `read_manifest` reads."""
    with open(path, "w", encoding="utf-8") as f:
        f.write(json.dumps({**meta, "sha256": sha256_of(meta)}))


def manifest(name: str) -> dict[str, Any]:
    """What the manifest of a directory says, which is whole.

    Raises:
        ArtifactError: if there is none, or it is damaged or of another format.
    """
    path = os.path.join(name, MANIFEST)
    if not os.path.isdir(name):
        raise ArtifactError("there is no such directory: pass what CompiledModel.save was given")
    if not os.path.lexists(path):
        if os.path.lexists(os.path.join(name, SHARDED)):
            raise ArtifactError("it has shards of a model: load it in as many processes, with device_mesh")
        raise ArtifactError(f"it has no {MANIFEST}: pass what CompiledModel.save was given")
    return read_manifest(path, _FIELDS)


def read_manifest(path: str, fields: set[str]) -> dict[str, Any]:
    """A file of JSON with a format, its own SHA-256 and some more fields, without its SHA-256. Format 1 has no "plan"."""
    name = os.path.basename(path)
    if os.path.islink(path):
        raise ArtifactError(f"{name} is a link: copy the directory with the files themselves in it")
    meta = read_object(read_regular(path, _MOST_BYTES, "a manifest").decode("utf-8"), name)
    version = meta.get("format")
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise ArtifactError(
            f"it has the format {str(version)[:20]!r}, and this version of sqcompile reads 1 to {FORMAT}: load it with the "
            "version that saved it, or save it again"
        )
    sha256 = meta.pop("sha256", None)
    if meta.keys() != (fields - {"plan"} if version == 1 else fields) or sha256 != sha256_of(meta):
        raise ArtifactError(f"{name} is damaged or was edited: copy the directory again, or save the model again")
    return meta


def sha256_of(meta: dict[str, Any]) -> str:
    """SHA-256 of what a manifest says."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
