"""names: what a tensor of a model can be called in a graph, of which torch.fx writes Python code.

    head.weight        self.head.weight
    heads.0.weight     getattr(self.heads, "0").weight
    class.weight       self.class.weight                which is no Python
    graph.weight       self.graph.weight                which the module of a graph has for itself

torch.fx escapes nothing in them.
"""

from __future__ import annotations

import keyword
import re
import unicodedata
from collections.abc import Iterable

from torch import fx

from sqcompile.errors import CaptureError

# what the module of a graph has: by its class, by itself, and as what its code takes a call apart
_TAKEN = {*dir(fx.GraphModule), *vars(fx.GraphModule({}, fx.Graph())), "_in_spec", "_out_spec"}
# by the code that torch.fx writes: what it imports, and calls
_USED = {"torch", "fx_pytree", "pytree", "getattr", "device", "inf", "nan", "NoneType", "self"}
_NOT_QUOTED = re.compile('["\\\\\n\r\0\ud800-\udfff]')  # what does not stand for itself between double quotes


def refuse_names(names: Iterable[str]) -> None:
    """Refuses names of parameters and buffers that the module of a graph cannot have.

    Raises:
        CaptureError: naming one.
    """
    for name in names:
        if (why := fault(name)) is not None:
            raise CaptureError(why)


def fault(name: str) -> str | None:
    """Why the module of a graph cannot have a tensor of a name; None if it can."""
    first, *_ = parts = name.split(".")
    if first in _TAKEN:
        return f"a submodule or parameter named {first!r} clashes with torch.fx.GraphModule: rename it"
    wrong = next((part for part in parts if not _is_read(part)), name if name == "self" else None)
    if wrong is None:
        return None
    return (
        f"the parameter or buffer {name!r} has a name that the Python code which torch.fx writes of a graph cannot read: "
        f"rename {wrong!r}, to letters, digits and underscores that are no word of Python's own"
    )


def refuse_arguments(names: Iterable[str]) -> None:
    """Refuses names of keyword arguments that the code of a graph cannot have.

    Raises:
        CaptureError: naming one.
    """
    for name in names:
        if not is_argument(name):
            raise CaptureError(
                f"the argument {name!r} has a name that the Python code which torch.fx writes of a graph cannot read or uses "
                "itself: rename it"
            )


def is_argument(name: str) -> bool:
    """Whether a function of a graph can have an argument of a name."""
    return name.isidentifier() and _is_read(name) and name not in _USED


def _is_read(part: str) -> bool:
    """Whether what torch.fx writes for a part of a name means that part."""
    if part.isidentifier():  # Python reads some letters as others
        return not keyword.iskeyword(part) and unicodedata.normalize("NFKC", part) == part
    return part != "" and _NOT_QUOTED.search(part) is None
