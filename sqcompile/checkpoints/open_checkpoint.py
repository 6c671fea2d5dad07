"""open_checkpoint: a directory of transformers -> a model whose parameters are its files, mapped into memory.

    config.json + model-00001-of-00002.safetensors, ...
->
    LlamaForCausalLM, each parameter a tensor over a mapping of its file

Nothing is read until somebody looks at a parameter, and what was read can be dropped at any time (`memory_limit`). What a
file does not have as the model does, such as experts matrix by matrix, or in another dtype, is made once, into a temporary
file, and mapped from there.
"""

from __future__ import annotations

import os
import re
from typing import Any

import torch
from torch import Tensor, nn

from sqcompile.checkpoints.conversion import Conversion, Group
from sqcompile.checkpoints.read_files import CONFIG, read_json
from sqcompile.checkpoints.shards import Stored, stored
from sqcompile.checkpoints.skeleton import known_config, skeleton
from sqcompile.errors import ArtifactError, SQCompileError
from sqcompile.files.regular import said
from sqcompile.process.interrupts import checkpoint, deferred
from sqcompile.process.spool import Spool

_GENERATION = "generation_config.json"


def open_checkpoint(
    path: str | os.PathLike[str],
    model: Any = None,
    *,
    dtype: torch.dtype | None = None,
    temporary: str | os.PathLike[str] | None = None,
) -> Any:
    """Opens a float checkpoint of transformers that need not fit in memory: it is read as it is used.

    The model is the one that ``from_pretrained`` gives, bit by bit. It may be larger than memory, as its parameters lie in
    the files: with `memory_limit`, what was read of them is given back. Keep the files as they are, as long as the model.
    No code of the directory is run, and nothing is downloaded.

    Args:
        path: a directory with config.json and safetensors files.
        model: an AutoModel class, a class of models, or a function of a configuration that gives a model;
            AutoModelForCausalLM by default.
        dtype: of the parameters, as of ``from_pretrained``; by default what config.json says, or else the files. If it is not
            that of the files, the weights are written to a temporary file once.
        temporary: the directory of that file; the system's by default. The file has no name, and goes with the model.

    Returns:
        A model in eval mode.

    Raises:
        ArtifactError: if the directory is none of transformers, is damaged, is quantized already, has weights in pickles, or
            has other tensors than the model.
    """
    try:
        folder = os.path.abspath(os.fsdecode(path))
    except (TypeError, ValueError) as e:
        raise ArtifactError(f"the path of a checkpoint is {path!r}: pass a string or a pathlib.Path") from e
    with deferred():
        try:
            return _opened(folder, model, dtype, None if temporary is None else os.fspath(temporary))
        except SQCompileError as e:
            raise ArtifactError(f"{folder} cannot be opened: {e}") from e
        except OSError as e:
            raise ArtifactError(
                f"{folder} cannot be opened ({said(e)}): make room, or name a directory on another disk with temporary= or TMPDIR"
            ) from e
        except Exception as e:  # of whatever a configuration that fits no model leads to
            raise ArtifactError(f"{folder} cannot be opened ({said(e)}): copy the directory again, whole") from e


def _opened(folder: str, make: Any, dtype: torch.dtype | None, temporary: str | None) -> Any:
    if not os.path.isdir(folder):
        raise ArtifactError("there is no such directory: pass one with config.json and safetensors files")
    config = read_json(folder, CONFIG)
    if "quantization_config" in config:
        raise ArtifactError(
            "its weights are quantized already: pass a float checkpoint (sqcompile.load reads INT8 ones)"
        )
    if dtype is not None and (not isinstance(dtype, torch.dtype) or not dtype.is_floating_point):
        raise ArtifactError(f"dtype={dtype!r}: pass torch.float32, torch.bfloat16 or torch.float16")
    known, own = known_config(config)
    files = stored(folder)
    dtype = dtype or own or next((s.dtype for s in files.values() if s.dtype.is_floating_point), torch.float32)
    if make is None:
        from transformers import AutoModelForCausalLM as make
    known.name_or_path = folder
    model = skeleton(known, make, dtype)
    filler = _Filler(model, files, dtype, temporary)
    filler.fill()
    if os.path.lexists(os.path.join(folder, _GENERATION)) and model.can_generate():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_dict(read_json(folder, _GENERATION))
    return model


class _Filler:
    """Puts the tensors of files into a model.

    Attributes:
        made: what is in the temporary file, by name: its offset, dtype and shape.
    """

    def __init__(self, model: Any, files: dict[str, Stored], dtype: torch.dtype, temporary: str | None) -> None:
        import transformers

        if not isinstance(model, transformers.PreTrainedModel):
            raise ArtifactError(f"a {type(model).__name__} is no model of transformers: pass a class of its models")
        self.model, self.files, self.spool = model, files, Spool(temporary)
        self.have = {n: t for n, t in model.state_dict().items() if isinstance(t, Tensor)}
        self.wanted = self._dtypes(dtype)
        self.found: dict[str, Tensor] = {}
        self.made: dict[str, tuple[int, torch.dtype, tuple[int, ...]]] = {}

    def _dtypes(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Of each tensor: some stay in float32, as transformers has it."""
        plan: dict[str, torch.dtype] = getattr(self.model, "_get_dtype_plan", lambda dtype: {})(dtype)
        kept = {re.compile(pattern.replace("*", ".*")): d for pattern, d in plan.items()}
        found = {}
        for name, t in self.have.items():
            found[name] = next((d for pattern, d in kept.items() if pattern.search(name)), t.dtype)
        return found

    def fill(self) -> None:
        """Checks all tensors, makes what has to be made, and replaces the model's own.

        Raises:
            ArtifactError: for one that is missing, is too many, or is not what the model has.
        """
        conversion = Conversion(self.model, self.files)
        self._check_left(conversion)
        for group in conversion.groups.values():
            checkpoint()
            if group.converter is None:
                self._plain(group)
            else:
                self._converted(conversion, group)
        mapped = self.spool.map()
        for name, (offset, dtype, shape) in self.made.items():
            assert mapped is not None
            self.found[name] = mapped.tensor(offset, dtype, shape)
        for name, t in self.found.items():
            self._put(name, t)
        vars(self.model)["_weight_conversions"] = conversion.used
        missing = self.have.keys() - self.found.keys()
        self.model.tie_weights(missing_keys=missing, recompute_mapping=False)
        self._check_missing(missing)

    def _check_left(self, conversion: Conversion) -> None:
        """Refuses tensors that the model has no place for, but for those that transformers leaves out, and other heads'."""
        ignored = [*(getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ())]
        ignored += [r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]  # once of the files, now made anew
        prefix = f"{self.model.base_model_prefix}."
        headed = any(n.startswith(prefix) for n in self.files) and not any(n.startswith(prefix) for n in self.have)
        left = [
            name
            for name, new in conversion.left.items()
            if not any(re.search(pattern, new) for pattern in ignored) and not (headed and not name.startswith(prefix))
        ]
        if left:
            raise ArtifactError(
                f"the model has no place for the tensor {left[0][:100]!r} ({len(left)} such): pass the class of the model "
                "that was saved, or copy the directory again"
            )

    def _check_missing(self, missing: set[str]) -> None:
        """Refuses parameters without values, and buffers that only the files can have."""
        may = [*(getattr(self.model, "_keys_to_ignore_on_load_missing", None) or ())]
        buffers = {n for n, _ in self.model.named_buffers()}
        left = sorted(n for n in missing if n not in buffers or not any(re.search(pattern, n) for pattern in may))
        if left:
            raise ArtifactError(
                f"there is no tensor {left[0]!r} in its files ({len(left)} such): pass the class of the model that was "
                "saved, or copy the directory again"
            )

    def _plain(self, group: Group) -> None:
        """A tensor that a file has."""
        (_, name), *more = group.sources
        if more:
            raise ArtifactError(
                f"{name[:100]!r} and {more[0][1][:100]!r} are one tensor in memory: copy the directory again"
            )
        t = self.files[name]
        self._check(group.name, t.shape, t.dtype, name)
        if t.dtype == self.wanted[group.name] and t.aligned:
            self.found[group.name] = t.file.tensor(t.offset, t.dtype, t.shape)
        else:
            offset = self._room(group.name)
            self.spool.write(offset, t.rows(0, t.shape[0] if t.shape else 1), self.wanted[group.name])

    def _converted(self, conversion: Conversion, group: Group) -> None:
        """Tensors that are made of those of files."""
        moves = conversion.moves(group, self.files, self.have)
        if moves is None:  # made in memory, these alone
            every = {n: self.files[n] for _, n in group.sources}
            values = {n: t.rows(0, t.shape[0] if t.shape else 1) for n, t in every.items()}
            cast = {n: t.to(self.wanted[group.name]) if t.is_floating_point() else t for n, t in values.items()}
            for name, t in conversion.convert(group, cast).items():
                self._check(name, tuple(t.shape), t.dtype, group.sources[0][1])
                self.spool.write(self._room(name), t, self.wanted[name])
            return
        for name, parts in moves.items():
            if name not in self.have:
                raise ArtifactError(f"the model has no place for {name[:100]!r}: try another version of transformers")
            for part in parts:
                self._check(name, tuple(self.have[name].shape), self.files[part.source].dtype, part.source)
            first = self.files[parts[0].source]
            if len(parts) == 1 and first.dtype == self.wanted[name] and first.aligned:
                at = first.offset + parts[0].first * first.row_bytes
                self.found[name] = first.file.tensor(at, first.dtype, self.have[name].shape)
                continue
            offset, row = self._room(name), first.row_bytes // first.dtype.itemsize * self.wanted[name].itemsize
            for part in parts:
                checkpoint()
                rows = self.files[part.source].rows(part.first, part.count)
                self.spool.write(offset + part.to * row, rows, self.wanted[name])

    def _room(self, name: str) -> int:
        shape, dtype = tuple(self.have[name].shape), self.wanted[name]
        offset = self.spool.room(dtype, shape)
        self.made[name] = offset, dtype, shape
        return offset

    def _check(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, source: str) -> None:
        """Raises ArtifactError where a tensor is not of the shape and kind that the model has."""
        want = self.have.get(name)
        if want is None or tuple(want.shape) != shape or want.is_floating_point() != dtype.is_floating_point:
            has = "none" if want is None else f"{str(want.dtype).removeprefix('torch.')} {list(want.shape)}"
            raise ArtifactError(
                f"{source} is {str(dtype).removeprefix('torch.')} {list(shape)}, and the model has {has}: the files are not "
                f"those of {CONFIG}, copy the directory again"
            )
        if not dtype.is_floating_point and dtype != want.dtype:
            raise ArtifactError(f"{source} is of {dtype}, and the model has {want.dtype}: copy the directory again")

    def _put(self, name: str, t: Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(owner)
        old = getattr(module, leaf)
        setattr(module, leaf, nn.Parameter(t, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else t)
