"""page: a report as one HTML file that needs nothing else: no network, no other file, no server."""

from __future__ import annotations

import os
from pathlib import Path

from sqcompile.errors import ReportError
from sqcompile.files.regular import replace_file, said
from sqcompile.page.extras import needed
from sqcompile.page.facts import Subject
from sqcompile.page.html import page
from sqcompile.process.progress import Enter, silent

__all__ = ["Subject", "check_path", "page", "write_page"]


def check_path(path: str | os.PathLike[str]) -> str:
    """The path of a page that is to be written.

    Raises:
        ReportError: if it does not end in .html, or its directory does not exist.
    """
    try:
        name = os.fsdecode(path)
    except TypeError as e:
        raise ReportError(f"a report's path is {path!r}: pass a string or a pathlib.Path") from e
    if Path(name).suffix.lower() != ".html":
        raise ReportError(f"a report cannot be written to {name!r}: name a file that ends in .html")
    folder = os.path.dirname(os.path.abspath(name))
    if not os.path.isdir(folder):
        raise ReportError(f"{name} cannot be written, as {folder} is no directory: name a file in one that exists")
    return name


def write_page(path: str | os.PathLike[str], subject: Subject, enter: Enter = silent) -> None:
    """Writes the page of a report, whole or not at all. ``enter`` is told of the stages "plots" and "write".

    Raises:
        ReportError: without the packages of ``sqcompile[report]``, or for a path that cannot be written.
    """
    name = check_path(path)
    enter("plots")
    text = page(subject, *needed("altair", "vl_convert"))
    enter("write")
    try:
        replace_file(name, text.encode())
    except OSError as e:
        raise ReportError(f"{name} cannot be written ({said(e)}): name a file in a folder you can write") from e
