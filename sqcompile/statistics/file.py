"""file: calibration statistics as a safetensors file, for a run that is to go on later. Every field is checked as it is read."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from sqcompile.errors import ArtifactError
from sqcompile.files.bounded_json import read_object
from sqcompile.files.safetensors_files import WeightFile
from sqcompile.files.weights import write_weights
from sqcompile.statistics.input_stats import SIZES, InputStats
from sqcompile.statistics.observe import Calibration
from sqcompile.statistics.sample import Sample, SampledCall

_KEY = "sqcompile_statistics"
_TENSORS = tuple(f.name for f in fields(InputStats) if f.name != "count")
_WHOLE = torch.int64  # dtype of counts


def write_statistics(path: str, calibration: Calibration) -> None:
    """Writes a file.

    Args:
        path: of a file that is not there yet.
        calibration: whose calls have tensors and constants as arguments.

    Raises:
        OSError: if it cannot be written.
    """
    every = list({id(s): s for s in (*calibration.inputs.values(), *calibration.heads.values())}.values())
    at = {id(s): i for i, s in enumerate(every)}
    tensors = {f"{i} {name}": getattr(s, name) for i, s in enumerate(every) for name in _TENSORS}
    calls = []
    for c, call in enumerate(calibration.sample.calls):
        arguments = [None if isinstance(a, Tensor) else {"constant": a} for a in call.arguments]
        tensors |= {f"call {c} {k}": a for k, a in enumerate(call.arguments) if isinstance(a, Tensor)}
        for i, (which, rows) in call.rows.items():
            tensors |= {f"call {c} which {i}": which, f"call {c} rows {i}": rows}
        calls.append({"arguments": arguments, "rows": list(call.rows), "batch": call.batch})
    meta = {
        "batches": calibration.batches,
        "counts": [s.count for s in every],
        "inputs": {name: at[id(s)] for name, s in calibration.inputs.items()},
        "heads": {name: at[id(s)] for name, s in calibration.heads.items()},
        "calls": calls,
        "sample": [calibration.sample.rows, calibration.sample.bytes, calibration.sample.looks],
    }
    write_weights(path, tensors, {_KEY: json.dumps(meta)})


def read_statistics(folder: str, file: str, device: torch.device | None = None) -> Calibration:
    """What `write_statistics` wrote, on a device; None is the CPU.

    Raises:
        ArtifactError: if it is something else.
    """
    f = WeightFile(folder, file)
    meta = read_object(f.metadata.get(_KEY, ""), "the statistics")
    tensors = {name: f.tensor(name).clone().to(device or "cpu") for name in f.places}
    try:
        every = [_stats({n: tensors[f"{i} {n}"] for n in _TENSORS}, count) for i, count in enumerate(meta["counts"])]
        calls = [_call(tensors, c, found) for c, found in enumerate(meta["calls"])]
        rows, size, looks = map(int, meta["sample"])
        inputs, heads = ({str(n): every[i] for n, i in meta[key].items()} for key in ("inputs", "heads"))
        return Calibration(inputs, int(meta["batches"]), heads, Sample(calls, rows, size, looks))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as e:
        raise ArtifactError(f"{os.path.join(folder, file)} has no statistics of a calibration: delete it") from e


def _stats(found: dict[str, Tensor], count: Any) -> InputStats:
    rows, experts = found["rows"], found["tokens"].numel()
    r, k = rows.shape
    channels = {"lowest": (2, k), "highest": (2, k), "offset": (k,)}
    counts = {"half": (r,), "experts": (r,), "keys": (r,), "sizes": (SIZES,), "tokens": (experts,)}
    good = (
        type(count) is int
        and rows.is_floating_point()
        and all(tuple(found[n].shape) == shape for n, shape in (channels | counts).items())
        and all(found[n].dtype == torch.float32 for n in channels)
        and all(found[n].dtype == _WHOLE for n in counts)
    )
    if not good:
        raise ValueError("statistics of other shapes")
    return InputStats(**found, count=count)


def _call(tensors: dict[str, Tensor], c: int, found: Any) -> SampledCall:
    arguments = tuple(
        tensors[f"call {c} {k}"] if a is None else a["constant"] for k, a in enumerate(found["arguments"])
    )
    rows = {int(i): (tensors[f"call {c} which {i}"], tensors[f"call {c} rows {i}"]) for i in found["rows"]}
    if any(len(which) != len(kept) or which.dtype != _WHOLE for which, kept in rows.values()):
        raise ValueError("rows of other shapes")
    return SampledCall(arguments, rows, int(found["batch"]))
