"""directory: a compiled model as a directory, written whole or not at all, and read with every field checked.

out/
    sqcompile.json                      signature, calls, graph of the quantized stage, index of tensors, the plan's SHA-256,
                                        and its own
    plan.safetensors                    the plan, as `Plan.save` writes it
    model-00001-of-00001.safetensors    int8 weights, scales, and what stays in float
    code.zip                            if asked for: see `code`
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.artifact import calls, graphs, structures
from sqcompile.artifact.code import write_code
from sqcompile.artifact.manifest import FORMAT, manifest, sha256_of, write_manifest
from sqcompile.artifact.tensors import SHARD, Tensors, write_tensors
from sqcompile.capture.inputs import Forward
from sqcompile.errors import ArtifactError, CalibrationError, PlanError
from sqcompile.files.beside import copy_beside
from sqcompile.files.directory import MANIFEST, check_replaceable, directory_of
from sqcompile.files.regular import said
from sqcompile.files.weights import Later
from sqcompile.files.work import Work, sha256_of_file
from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import constants, get_tensor, value
from sqcompile.passes.ir.lazy import Weights
from sqcompile.plan.plan import Plan
from sqcompile.plan.shards import shard_of
from sqcompile.process.parallel import ALONE, Parallel
from sqcompile.process.ranks import ALONE as ONE_PROCESS
from sqcompile.process.ranks import Ranks
from sqcompile.version import VERSION

PLAN = "plan.safetensors"


def save(
    quantized: fx.GraphModule,
    plan: Plan,
    call: Forward,
    path: str | os.PathLike[str],
    most: int = SHARD,
    code: bool = False,
    target: str | None = None,
    beside: str | None = None,
    kept: Work | None = None,
    ranks: Ranks = ONE_PROCESS,
) -> None:
    """Writes a directory. Of several ranks, each calls it with the same arguments, and rank 0 puts it into its place.

    Args:
        quantized: the graph of the quantized stage. Lazy weights (``About.lazy``) are made as they are written.
        plan: what was decided.
        call: how the model is called.
        path: where to; an artifact that is there is replaced when the new one is whole.
        most: bytes of a file.
        code: whether to compile it, and to write the code, too; for the ``target`` that `load` would be given.
        beside: a directory whose tokenizer and configuration are copied; None for none.
        kept, ranks: see `write_tensors`.

    Raises:
        ArtifactError: if something of the model cannot be saved, or the directory cannot be written.
        CalibrationError: where another rank has failed or is dead.
    """
    name = check_saved_to(path) if ranks.first else path_name(path)
    meta = described(quantized, call)
    try:
        with directory_of(ranks, name, None if kept is None else kept.folder) as folder:
            write(folder, meta, quantized, plan, most, kept, ranks)
            if beside is not None and ranks.first:
                copy_beside(beside, folder, config=True)
            if code and ranks.first:
                meta["code"] = write_code(folder, target)
                write_manifest(os.path.join(folder, MANIFEST), meta)
    except CalibrationError:  # another rank's
        raise
    except (ArtifactError, PlanError) as e:
        raise ArtifactError(f"the model cannot be saved to {name}: {e}") from e
    except Exception as e:  # whatever the system has to say of it
        raise ArtifactError(f"the model cannot be saved to {name} ({said(e)})") from e


def described(quantized: fx.GraphModule, call: Forward) -> dict[str, Any]:
    """What a manifest says of a graph, but for its tensors.

    Raises:
        ArtifactError: if something of it cannot be saved.
    """
    return {
        "format": FORMAT,
        "versions": versions(),
        "forward": calls.forward_to_json(call),
        "calls": calls.captured_to_json(about(quantized).calls),
        "returns": structures.to_json(about(quantized).out_spec),
        "graph": graphs.to_json(quantized),
        "code": None,
    }


def write(
    folder: str,
    meta: dict[str, Any],
    quantized: fx.GraphModule,
    plan: Plan,
    most: int,
    kept: Work | None = None,
    ranks: Ranks = ONE_PROCESS,
) -> str:
    """Writes the files of a graph that ``meta`` describes, and adds its tensors to that; returns the manifest's SHA-256."""
    meta["tensors"] = write_tensors(folder, _tensors(quantized), most, kept, ranks)
    if ranks.first:
        plan.save(os.path.join(folder, PLAN))
        meta["plan"] = sha256_of_file(os.path.join(folder, PLAN))
        write_manifest(os.path.join(folder, MANIFEST), meta)
    return sha256_of(meta)


def check_saved_to(path: str | os.PathLike[str]) -> str:
    """The path of a directory that a model can be saved to.

    Raises:
        ArtifactError: if what is there cannot be replaced.
    """
    name = path_name(path)
    try:
        check_replaceable(os.path.realpath(name))
    except (OSError, ValueError) as e:  # of a path with a zero in it, too
        raise ArtifactError(f"the model cannot be saved to {name} ({said(e)})") from e
    return name


def _tensors(quantized: fx.GraphModule) -> dict[str, Tensor | Later]:
    """The tensors of a graph by name. Those that are made later are made once, a weight and its scale together."""
    weights = Weights(quantized)
    found: dict[str, Tensor | Later] = {}
    for n in quantized.graph.find_nodes(op="get_attr"):
        name = str(n.target)
        like = get_tensor(quantized, name)
        how = partial(weights.get, name), partial(weights.unwanted, name)
        found[name] = Later(like.dtype, tuple(like.shape), *how) if name in weights else like
    return found


@dataclass(frozen=True)
class Saved:
    """What a directory holds.

    Attributes:
        graph: of the quantized stage, with recorded values, over tensors without data.
        tensors: those of the graph, by name.
        plan, call: as of the model that was saved.
        code: what is said of its code; None without.
        identity: of what is computed: equal for two directories only if they hold the same graph and tensors.
    """

    graph: fx.GraphModule
    tensors: Tensors
    plan: Plan
    call: Forward
    code: Any
    identity: str


def read(path: str | os.PathLike[str], device: torch.device | None, parallel: Parallel = ALONE) -> Saved:
    """Reads a directory.

    Args:
        path: what `save` was given.
        device: where the model is to run; None for where it ran.
        parallel: the processes of which this one loads its shard, which the directory is.

    Raises:
        ArtifactError: if it is no artifact, is damaged, of a newer format, or does not fit this machine.
    """
    name = path_name(path)
    try:
        return _read(name, device, parallel)
    except (ArtifactError, PlanError) as e:
        raise ArtifactError(f"{name} cannot be loaded: {e}") from e
    except Exception as e:  # of whatever a field that is not what it should be leads to
        raise ArtifactError(f"{name} cannot be loaded ({said(e)}): save the model again") from e


def _read(name: str, device: torch.device | None, parallel: Parallel) -> Saved:
    meta = manifest(name)
    here = devices(meta["graph"], device)
    tensors = Tensors(name, meta["tensors"])
    plan = Plan.load(os.path.join(name, PLAN))
    if "plan" in meta and meta["plan"] != sha256_of_file(os.path.join(name, PLAN)):
        raise ArtifactError(f"{PLAN} is another model's: copy the directory again, or save the model again")
    if plan.shard != shard_of(parallel):
        raise ArtifactError(
            "it is a shard of a model: pass the directory that holds all of them, in every process, with device_mesh"
            if parallel.count == 1
            else f"it is not the shard of {shard_of(parallel)}: copy the directory again, or save the model again"
        )
    served, returns = calls.captured_from_json(meta["calls"], here), structures.from_json(meta["returns"])
    gm = graphs.from_json(meta["graph"], tensors.like(), served, returns, here, parallel)
    if unused := tensors.index.keys() - {str(n.target) for n in gm.graph.find_nodes(op="get_attr")}:
        raise ArtifactError(f"its graph does not read the tensor {next(iter(unused))[:100]!r}")
    _check_constants(gm, tensors.nbytes)
    computed = {name: of for name, of in meta.items() if name not in ("code", "plan", "versions")}
    return Saved(gm, tensors, plan, calls.forward_from_json(meta["forward"]), meta["code"], sha256_of(computed))


def devices(graph: Any, given: torch.device | None) -> Callable[[str], torch.device]:
    """What a device of a graph is here.

    Args:
        graph: as of `graphs.to_json`.
        given: where all of it is to run; None for where it ran.

    Raises:
        ArtifactError: if it runs on several devices, of which one is to be all; by what is returned, for a device that this
            machine does not have.
    """
    known = {n["device"] for n in graph["nodes"] if "device" in n}
    if given is not None and len(known) > 1:
        raise ArtifactError(f"it runs on {', '.join(sorted(known))}, and cannot be moved to {given}: leave device out")

    def here(text: str) -> torch.device:
        found = torch.device(text) if given is None else given
        if found.type == "meta":
            raise ArtifactError("its graph has tensors on the meta device, which have no values")
        if found.type == "cuda" and not torch.cuda.is_available():
            raise ArtifactError(f"it runs on {found}, which this machine does not have: pass device='cpu'")
        return found

    return here


def _check_constants(gm: fx.GraphModule, nbytes: int) -> None:
    """Refuses a graph whose constant expressions, which are computed while loading, would fill the memory."""
    for n in constants(gm):
        v = value(n)
        if isinstance(v, Tensor) and v.numel() * v.element_size() > 16 * nbytes + 2**26:
            raise ArtifactError(f"%{n.name} of its graph would take {v.numel() * v.element_size()} bytes")


def versions() -> dict[str, str]:
    """The versions that a model was saved with."""
    return {"sqcompile": VERSION, "torch": torch.__version__}


def path_name(path: Any) -> str:
    """A path as text.

    Raises:
        ArtifactError: for what is none.
    """
    try:
        return os.path.abspath(os.fsdecode(path))
    except (TypeError, ValueError) as e:
        raise ArtifactError(f"the path of a saved model is {path!r}: pass a string or a pathlib.Path") from e
    except OSError as e:  # the working directory was removed
        raise ArtifactError(
            f"there is no working directory to take {path!r} from ({said(e)}): pass a whole path"
        ) from e
