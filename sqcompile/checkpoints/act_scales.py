"""act_scales: the largest input of each linear, in the files of the SmoothQuant authors, which CTranslate2 reads, too.

    {"model.layers.0.self_attn.q_proj": float32 [in_features], ...}       # max|X_j| of each input channel

Such a file is one of `torch.save`. It comes from anywhere: it is read with ``weights_only=True``, as a zip archive alone, of
a bounded size, and each name and tensor in it is looked at.
"""

from __future__ import annotations

import io
import math
import os
import reprlib
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sqcompile.errors import ArtifactError
from sqcompile.files.regular import read_regular, replace_file, said
from sqcompile.passes.ir.graph import module_of
from sqcompile.statistics.observe import Calibration

_MOST_BYTES = 2**30  # some hundred times those of the largest models
_MOST_CHANNELS = 2**24  # of one linear
_MOST_LINEARS = 10**6
_LONGEST_NAME = 1000


def act_scales_of(calibration: Calibration) -> dict[str, Tensor]:
    """The largest input of each linear that was observed: float32 [K] on the CPU, by the linear's module."""
    found: dict[str, Tensor] = {}
    for name, stats in calibration.inputs.items():
        module = module_of(name)
        absmax = stats.absmax.cpu()
        found[module] = torch.maximum(found[module], absmax) if module in found else absmax
    return found


def read_act_scales(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Reads a file of activation scales, such as those of SmoothQuant's authors. Nothing in it is executed.

    Args:
        path: of what `torch.save` made of a dict of vectors.

    Returns:
        float32 [in_features] on the CPU, max|X_j| of each input channel, by the linear's module.

    Raises:
        ArtifactError: if the path is no regular file, or no file of that kind.
    """
    name = _name(path)
    try:
        data = read_regular(name, _MOST_BYTES, "a file of activation scales")
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > _MOST_BYTES:
                raise ValueError("unpacked, it is too large")
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return _checked(found)
    except Exception as e:  # whatever the system and the parsers have to say of it
        raise ArtifactError(
            f"{name} has no activation scales ({said(e)}): pass a file that torch.save made of a dict of names and vectors"
        ) from e


def given_act_scales(scales: Any) -> dict[str, Tensor]:
    """Activation scales that a user passes, float32 [K] on the CPU by the linear's module: a dict of them, or a file's path.

    Raises:
        ArtifactError: as `read_act_scales`, and for a dict that is none of activation scales.
    """
    if not isinstance(scales, Mapping):
        return read_act_scales(scales)
    try:
        return _checked(scales)
    except ValueError as e:
        raise _refused(e) from e


def write_act_scales(path: str | os.PathLike[str], scales: Mapping[str, Tensor]) -> None:
    """Writes a file of activation scales, or nothing: an old file stays whole until the new one is.

    Args:
        path: where to.
        scales: any float dtype [in_features] by the linear's module, as `get_act_scales` gives them; written as float32.

    Raises:
        ArtifactError: for scales that `read_act_scales` would refuse, or a path that cannot be written.
    """
    name = _name(path)
    try:
        whole = _checked(scales)
    except ValueError as e:
        raise _refused(e) from e
    buffer = io.BytesIO()
    torch.save(whole, buffer)
    try:
        replace_file(name, buffer.getvalue())
    except OSError as e:
        hint = "pass a path in a directory that exists and may be written to, on a disk with room"
        raise ArtifactError(f"the activation scales cannot be written to {name} ({said(e)}): {hint}") from e


def _checked(found: Any) -> dict[str, Tensor]:
    """The scales, each a tensor with memory of its own.

    Raises:
        ValueError: naming what is wrong.
    """
    if not isinstance(found, Mapping) or not 0 < len(found) <= _MOST_LINEARS:
        raise ValueError(f"it is a {type(found).__name__} and no dict of linears")
    whole: dict[str, Tensor] = {}
    for name, t in found.items():
        if not isinstance(name, str) or not 0 < len(name) <= _LONGEST_NAME or not name.isprintable():
            raise ValueError(f"{reprlib.repr(name)} is no name of a module")
        if not isinstance(t, Tensor) or t.layout != torch.strided or t.is_meta or not t.dtype.is_floating_point:
            raise ValueError(f"{name} is a {type(t).__name__}, and no float tensor")
        if t.dim() != 1 or not 0 < t.numel() <= _MOST_CHANNELS:
            raise ValueError(f"{name} has the shape {tuple(t.shape)}, and not one number for each channel")
        values = t.detach().to("cpu", torch.float32, copy=True).contiguous()
        inside = (values >= 0) & (values < math.inf)
        if not bool(inside.all()):
            raise ValueError(f"{name} has {float(values[~inside][0])}, which is no largest absolute value")
        whole[name] = values
    return whole


def _refused(e: ValueError) -> ArtifactError:
    return ArtifactError(f"these are no activation scales ({e}): pass a dict of names and vectors")


def _name(path: Any) -> str:
    try:
        return os.fsdecode(path)
    except TypeError as e:
        raise ArtifactError(f"the path is {path!r}: pass a string or a pathlib.Path") from e
