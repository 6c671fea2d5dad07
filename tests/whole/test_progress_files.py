"""Progress of what writes and reads files: pages, drawings, saved models and exports."""

from __future__ import annotations

import functools
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_lm, token_batches
from test_progress import Terminal, batches, compiled, stages_of, two_linears
from torch import nn

import sqcompile
from sqcompile import Progress
from sqcompile.cli.report import report
from sqcompile.cli.saved import load_any
from sqcompile.cli.terminal import Terminal as Commands
from sqcompile.compiled.report import Report

pytest.importorskip("altair", reason="altair is not installed")
pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")

Operation = Callable[[Path, Any], Any]


@functools.cache
def made() -> tuple[nn.Module, sqcompile.CompiledModel]:
    """A model, and what it is compiled to."""
    model = two_linears()
    return model, compiled(False, model)


def net() -> sqcompile.CompiledModel:
    return made()[1]


def exported(format: str) -> Operation:
    return lambda path, progress: sqcompile.export(made()[0], net().plan, format, path, progress=progress)


def by_compiled(format: str) -> Operation:
    return lambda path, progress: net().export(format, path, progress=progress)


def loaded(path: Path, progress: Any) -> Any:
    return sqcompile.load(path.parent.with_name("saved"), backend="eager", progress=progress)


REWRITTEN = ["trace", "fold", "insert_qdq"]
# what is done, its stages, and some of their parts
OPERATIONS: dict[str, tuple[Operation, list[str], set[str]]] = {
    "a page": (
        lambda path, progress: net().report.to_html(path.with_suffix(".html"), progress=progress),
        ["draw", "plots", "write"],
        {f"draw: {stage}" for stage in ("traced", "folded", "quantized", "lowered")},
    ),
    "a page of a plan": (
        lambda path, progress: Report.of(net().plan).to_html(path.with_suffix(".html"), progress=progress),
        ["plots", "write"],
        set(),
    ),
    "a drawing": (
        lambda path, progress: net().draw(path.with_suffix(".html"), progress=progress),
        ["draw", "write"],
        {"draw: folded", "draw: lowered"},
    ),
    "a drawing of a stage": (
        lambda path, progress: net().draw(path.with_suffix(".svg"), "folded", progress=progress),
        ["draw", "write"],
        set(),
    ),
    "a saved model": (
        lambda path, progress: net().save(path, progress=progress),
        ["rebuild", "write"],
        {"write: tensors"},
    ),
    "a loaded model": (loaded, ["read", "lower", "emit"], {"lower: pack"}),
    "sqcompile": (exported("sqcompile"), [*REWRITTEN, "write"], {"write: tensors"}),
    "pt2": (exported("pt2"), [*REWRITTEN, "convert", "write"], {"insert_qdq: quantize"}),
    "onnx": (exported("onnx"), [*REWRITTEN, "convert", "write"], {"insert_qdq: quantize"}),
    "sqcompile of a compiled model": (by_compiled("sqcompile"), ["rebuild", "write"], {"write: tensors"}),
    "pt2 of a compiled model": (by_compiled("pt2"), ["rebuild", "convert", "write"], set()),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a directory with a saved model."""
    path = tmp_path_factory.mktemp("base")
    net().save(path / "saved", progress=False)
    return path


@pytest.fixture
def folder(base: Path) -> Iterator[Path]:
    """An empty directory beside the saved model."""
    (path := base / "new").mkdir()
    yield path
    shutil.rmtree(path)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_function_is_told_of_every_stage(name: str, folder: Path) -> None:
    do, names, parts = OPERATIONS[name]
    seen: list[Progress] = []
    do(folder / "made", seen.append)
    assert stages_of(seen) == names and parts <= {p.stage for p in seen}
    assert all(p.done <= p.total for p in seen if p.total is not None)


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_a_function_raises_is_raised_and_nothing_is_written(name: str, folder: Path) -> None:
    do, names, parts = OPERATIONS[name]
    error = ValueError("the server is gone")
    for where in (*names, *parts):

        def tell(now: Progress, where: str = where) -> None:
            if now.stage == where:
                raise error

        with pytest.raises(ValueError) as caught:
            do(folder / "made", tell)
        assert caught.value is error
        assert not [*folder.iterdir()]
    do(folder / "made", False)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_terminal_shows_one_line_and_a_pipe_nothing(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    do, names, _ = OPERATIONS[name]
    do(folder / "made", True)
    assert capsys.readouterr().err == ""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    do(folder / "made", True)
    text = terminal.getvalue()
    assert text.count("\n") == 1 and text.endswith("\n")
    for i, stage in enumerate(names):
        assert f"[{i + 1}/{len(names)}] {stage}" in text
    assert ("compiled" if names[-1] == "emit" else "written") + " in 00:" in text


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_no_progress_is_refused(name: str, folder: Path) -> None:
    with pytest.raises(sqcompile.RecipeError, match=r"progress='yes': True, False, or a function"):
        OPERATIONS[name][0](folder / "made", "yes")
    assert not [*folder.iterdir()]


def test_commands_show_a_line_unless_they_are_quiet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = str(folder.with_name("saved"))
    commands: dict[str, Callable[[Commands], Any]] = {
        "[1/2] plots": lambda terminal: report(saved, str(folder / "r.html"), False, None, terminal),
        "[2/3] lower": lambda terminal: load_any(saved, "eager", None, terminal.progress),
    }
    for shown, do in commands.items():
        for quiet in (False, True):
            terminal = Terminal()
            monkeypatch.setattr(sys, "stderr", terminal)
            do(Commands(quiet=quiet))
            text = terminal.getvalue()
            assert (shown in text, text.count("\n")) == ((False, 0) if quiet else (True, 1))


def test_checkpoints_tell_of_their_blocks(tmp_path: Path) -> None:
    model = tiny_lm("llama")
    found = sqcompile.compile(model, token_batches(), recipe=sqcompile.Recipe(0.5), backend="eager", progress=False)
    for format in ("smoothed", "compressed-tensors"):
        for export in (found.export, lambda *args, **more: sqcompile.export(model, found.plan, *args, **more)):
            seen: list[Progress] = []
            export(format, tmp_path / format, progress=seen.append)
            assert stages_of(seen) == ["trace", "fold", "write"] and "write: blocks" in {p.stage for p in seen}
    seen = []
    sqcompile.load(tmp_path / "compressed-tensors", backend="eager", progress=seen.append)
    assert stages_of(seen) == ["read", "lower", "emit"]


def test_what_is_told_of_changes_nothing(tmp_path: Path) -> None:
    net().save(tmp_path / "told", progress=lambda now: None)
    found = sqcompile.load(tmp_path / "told", backend="eager", progress=lambda now: None)
    assert torch.equal(found(batches(1)[0]), net()(batches(1)[0]))
