"""legend: what the colours of boxes and the chips on them mean."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable
from typing import Any

from sqcompile.plan.said import decibels

# role -> (text of the chip, its width)
CHIPS = {"producer": ("1/s", 22.0), "balance": ("s", 14.0), "explicit": ("× 1/s", 31.0)}
CHIP_WORDS = {
    "producer": "absorbs 1/s", "balance": "absorbs s", "explicit": "input is multiplied by 1/s",
}  # fmt: skip

# (classes that a box must have, classes that it must not have, what the colour means)
_COLOURS = [
    ("norm producer", "", "norm or scale that absorbs 1/s"),
    ("linear quantized", "explicit", "linear in INT8"),
    ("linear quantized explicit", "", "linear in INT8, x·(1/s) multiplied before quantization"),
    ("linear float", "", "linear that stays in float"),
    ("attention", "quantized float", "attention"),
    ("attention quantized", "", "attention in INT8"),
    ("attention float", "", "attention that stays in float"),
    ("linear balance", "quantized float", "linear that absorbs s"),
    ("linear refused", "quantized float balance", "linear whose x·(1/s) is multiplied before quantization"),
]
# SQNR in dB at which the next colour begins
_STEPS = [20.0, 25.0, 30.0, 35.0, 40.0]


def classes(data: dict[str, Any]) -> str:
    """The CSS classes of a box: what it is, then its roles, then its step of SQNR. They carry the colours."""
    step = [] if data["sqnr"] is None else [f"db{bisect.bisect_right(_STEPS, data['sqnr'])}", "has-db"]
    return " ".join(["node", "linear" if data["linears"] else data["kind"], *sorted(data["roles"]), *step])


def legend(boxes_of: Iterable[dict[str, Any]]) -> list[tuple[str, str]]:
    """The colours that are in a drawing of such boxes: (classes, what they mean)."""
    every = [*boxes_of]
    boxes, runs_in = [set(classes(data).split()) for data in every], next((data["format"] for data in every), "INT8")
    return [
        (f"node {want}", text.replace("INT8", runs_in) if "linear" in want else text)
        for want, without, text in _COLOURS
        if any(set(want.split()) <= c and not c & set(without.split()) for c in boxes)
    ]


def sqnr_legend() -> list[tuple[str, str]]:
    """The same of colours by SQNR."""
    words = [f"below {_STEPS[0]:.0f} dB", *(f"{a:.0f} to {b:.0f}" for a, b in itertools.pairwise(_STEPS))]
    return [(f"node db{i}", text) for i, text in enumerate([*words, f"{_STEPS[-1]:.0f} dB and above"])]


def spoken(data: dict[str, Any]) -> str:
    """A box in one line, for a pointer on it and for those who hear it."""
    roles = data["roles"]
    words = [data["label"], data["detail"]]
    words += [word for role, word in CHIP_WORDS.items() if role in roles]
    words += [f"in {data['format']}"] if "quantized" in roles else ["in float"] if "float" in roles else []
    if "refused" in roles and not roles & {"quantized", "float"}:
        words.append("no parameter can absorb 1/s: x·(1/s) is multiplied before quantization")
    if data["sqnr"] is not None:
        words.append(decibels(data["sqnr"]))
    return ", ".join(w for w in words if w)
