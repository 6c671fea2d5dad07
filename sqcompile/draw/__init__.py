"""draw: the stages of a graph as pictures, coloured by what smoothing and quantization do with each norm and linear."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import fx

from sqcompile.draw.condense import condense
from sqcompile.draw.page import document, fragment
from sqcompile.draw.repeats import fold_repeats
from sqcompile.draw.roles import Roles, roles_of
from sqcompile.draw.svg import render
from sqcompile.errors import DrawError
from sqcompile.plan.plan import Plan
from sqcompile.process.progress import Show
from sqcompile.process.progress import stages as told

__all__ = ["Roles", "condense", "document", "draw", "fold_repeats", "fragment", "roles_of"]

_SUFFIXES = (".svg", ".html")
_COLOURS = ("role", "sqnr")


def draw(
    path: str | os.PathLike[str],
    stages: Mapping[str, fx.GraphModule],
    plan: Plan | None = None,
    stage: str = "traced",
    full: bool = False,
    colour: str = "role",
    progress: Show = True,
) -> None:
    """Writes a drawing: .svg of one stage, or .html of all of them, to look around in.

    Args:
        path: where to.
        stages: graphs by stage; "traced" is among them. An .svg file looks at "traced" and ``stage`` alone.
        plan: what was decided; without one, the sites and refusals of `match` are shown.
        stage: the one to draw, or to begin with.
        full: draws every block; otherwise four and more equal blocks in a row are drawn as one.
        colour: "role", what is done with a box, or "sqnr", its signal to quantization noise ratio.
        progress: as for `sqcompile.compile`; its stages are "draw" and "write".

    Raises:
        DrawError: for another suffix or colour, or a path that cannot be written.
    """
    suffix = check_path(path)
    if colour not in _COLOURS:
        raise DrawError(f"colour={colour!r}: choose one of {', '.join(_COLOURS)}")
    with told(("draw", "write"), progress) as enter:
        enter("draw")
        if suffix == ".html":
            text = document(stages, plan, Path(path).stem, stage=stage, full=full, colour=colour)
        else:
            roles = roles_of(stages["traced"], plan)
            graph = condense(stages[stage], roles)
            text = render(graph if full else fold_repeats(graph), roles.reasons, colour == "sqnr")
        enter("write")
        try:
            Path(path).write_text(text, encoding="utf-8")
        except OSError as e:
            hint = "name a file in a folder you can write"
            raise DrawError(f"cannot write {os.fspath(path)} ({e.strerror}): {hint}") from e


def check_path(path: str | os.PathLike[str]) -> str:
    """The suffix of a drawing's file.

    Raises:
        DrawError: for another one than .svg and .html.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in _SUFFIXES:
        raise DrawError(f"cannot draw to {os.fspath(path)!r}: name a file that ends in .svg or .html")
    return suffix
