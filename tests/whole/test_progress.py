"""Progress: what a long operation is at, as a line on a terminal and as calls of a function; and what is logged."""

from __future__ import annotations

import dataclasses
import io
import logging
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import sqcompile
from sqcompile import Progress
from sqcompile.process.progress import each, part, seconds_so_far, stages

PIPELINE = ["trace", "calibrate", "match", "plan", "fold", "insert_qdq", "lower", "emit"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def two_linears() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()


def batches(n: int = 3) -> list[torch.Tensor]:
    return [torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(i)) for i in range(n)]


def compiled(progress: Any, model: nn.Module | None = None) -> sqcompile.CompiledModel:
    return sqcompile.compile(model or two_linears(), batches(), recipe="O3", backend="eager", progress=progress)


def stages_of(seen: list[Progress]) -> list[str]:
    return list(dict.fromkeys(p.stage.partition(":")[0] for p in seen))


def test_a_terminal_shows_one_line_and_a_pipe_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled(True)
    assert capsys.readouterr().err == ""  # which is no terminal
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    compiled(True)
    shown = [line.strip() for line in terminal.getvalue().split("\r")]
    assert "\n" not in terminal.getvalue().rstrip() and terminal.getvalue().endswith("\n")
    assert re.fullmatch(r"compiled in \d\d:\d\d", shown[-1])
    found = [m[1] for line in shown if (m := re.match(r"\[\d/8\] (\w+)", line))]
    assert list(dict.fromkeys(found)) == PIPELINE
    assert any(re.fullmatch(r"\[1/8\] trace \d\d:\d\d", line) for line in shown)  # nothing to count: its time
    assert any(re.match(r"\[4/8\] plan: choose \d/\d \|.*\| \d\d:\d\d, .* left", line) for line in shown)
    before = len(terminal.getvalue())
    monkeypatch.setenv("TQDM_DISABLE", "1")  # of whoever wants no bar of any package
    compiled(True)
    monkeypatch.delenv("TQDM_DISABLE")
    compiled(False)
    sqcompile.evaluate(compiled(False), batches(1), against=two_linears(), progress=False)
    assert len(terminal.getvalue()) == before
    assert not [t for t in threading.enumerate() if t.name == "sqcompile-progress"]


def test_a_function_is_told_of_every_stage_in_the_thread_that_compiles() -> None:
    seen: list[Progress] = []
    threads = set()

    def tell(now: Progress) -> None:
        threads.add(threading.get_ident())
        seen.append(now)

    model = two_linears()
    net = compiled(tell, model)
    assert stages_of(seen) == PIPELINE and threads == {threading.get_ident()}
    assert {"plan: gradients", "plan: choose", "plan: compare", "lower: pack"} <= {p.stage for p in seen}
    (last,) = [p for p in seen if p.stage == "calibrate" and p.done == 3]
    assert last.total == 3 and last.remaining == 0.0 and last.seconds > 0
    first = next(p for p in seen if p.stage == "trace")
    assert (first.done, first.total, first.remaining) == (0, None, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.done = 1  # type: ignore[misc]
    seen.clear()
    sqcompile.evaluate(net, batches(2), against=model, progress=tell)
    assert stages_of(seen) == ["evaluate", "layers"] and any(p.done == 2 for p in seen if p.stage == "evaluate")


def test_what_a_function_raises_is_raised_and_the_model_is_untouched() -> None:
    model, x = two_linears(), batches(1)[0]
    before = {n: t.clone() for n, t in model.state_dict().items()}
    versions = {n: t._version for n, t in model.named_parameters()}
    for stage in ("trace", "calibrate", "plan: gradients", "plan: compare", "insert_qdq", "lower: pack", "emit"):
        error = ValueError(f"the server is gone at {stage}")

        def tell(now: Progress, stage: str = stage, error: Exception = error) -> None:
            if now.stage == stage:
                raise error

        with pytest.raises(ValueError) as caught:
            compiled(tell, model)
        assert caught.value is error and error.__context__ is None and error.__cause__ is None
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
        assert versions == {n: t._version for n, t in model.named_parameters()}
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()) and not model.training
    assert torch.equal(compiled(False, model)(x), compiled(False)(x))


def test_threads_are_told_of_their_own_compilation_alone() -> None:
    seen: dict[int, list[Progress]] = {0: [], 1: []}
    ids: dict[int, set[int]] = {0: set(), 1: set()}

    def work(i: int) -> None:
        def tell(now: Progress) -> None:
            ids[i].add(threading.get_ident())
            seen[i].append(now)

        compiled(tell)

    threads = [threading.Thread(target=work, args=(i,)) for i in seen]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(stages_of(found) == PIPELINE for found in seen.values())
    assert len(ids[0]) == len(ids[1]) == 1 and ids[0] != ids[1]


def test_the_backend_tells_of_its_plan_and_of_each_graph() -> None:
    seen: list[Progress] = []
    options = {"calibration_steps": 1, "compiler": "eager", "progress": seen.append}
    net = torch.compile(two_linears(), backend="smoothquant", options=options)
    with torch.no_grad():
        for x in batches(2):
            net(x)
    assert stages_of(seen) == ["plan", "fold", "insert_qdq", "lower", "emit"]


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("first", [True, False])
def test_what_a_function_raises_comes_out_of_a_compiled_model_as_it_is(first: bool) -> None:
    """In the call that Dynamo compiles in, which has a plan, and in one that ends the model's own calibration."""
    model, x = two_linears(), batches(1)[0]
    gone, cause = [True], KeyError("the cause")

    def tell(now: Progress) -> None:
        if gone and now.stage == "lower":
            try:
                raise OSError("the user's own")
            except OSError:
                raise ValueError("the server is gone") from cause

    options: dict[str, Any] = {"compiler": "eager", "progress": tell}
    options |= {"plan": compiled(False, model).plan} if first else {"calibration_steps": 1}
    net = torch.compile(model, backend="smoothquant", options=options)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"^the server is gone$") as caught:
            for _ in range(2):
                net(x)
        assert type(caught.value.__context__) is OSError and caught.value.__cause__ is cause
        gone.clear()
        assert torch.equal(net(x), net(x)) and not torch.equal(net(x), model(x))


@pytest.mark.parametrize("wrong", ["yes", 1, None])
def test_what_is_no_progress_is_refused(wrong: Any) -> None:
    with pytest.raises(sqcompile.RecipeError, match=r"progress=.*True, False, or a function that takes"):
        compiled(wrong)
    with pytest.raises(sqcompile.RecipeError, match="progress="):
        torch.compile(two_linears(), backend="smoothquant", options={"progress": wrong})(batches(1)[0])


def test_parts_end_with_what_is_in_them() -> None:
    seen: list[tuple[str, int, int | None]] = []

    def tell(now: Progress) -> None:
        seen.append((now.stage, now.done, now.total))

    left: list[Callable[..., None]] = []
    with stages(("a", "b"), tell) as enter:
        enter("a")
        loop = each([1, 2], "loop")
        next(loop)  # it is left, and closed when it is forgotten
        enter("b")
        loop.close()
        with part("c", 1) as add, part("d"):
            left.append(add)
            add()  # of a part that another one is in
        add()  # of a part that is over
        with part("e") as add:
            left.append(add)
    for add in left:
        add()  # when all is over
    begun = ["a", "a: loop", "b", "b: c", "b: d", "b: e"]
    assert [s[0] for s in seen] == begun and [s[2] for s in seen] == [None, 2, None, 1, None, None]
    assert {s[1] for s in seen} == {0}
    assert list(each("xy", "no stage")) == ["x", "y"]  # nobody is told


def test_stages_are_logged_and_passes_with_their_seconds(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="sqcompile"):
        compiled(False)
    ours = [r for r in caplog.records if r.name == "sqcompile"]
    info = [r.getMessage() for r in ours if r.levelno == logging.INFO]
    assert info == PIPELINE
    debug = "\n".join(r.getMessage() for r in ours if r.levelno == logging.DEBUG)
    assert re.search(r"^fold: \d+\.\d\d s$", debug, re.M) and re.search(r"^plan: choose: \d+\.\d\d s$", debug, re.M)
    assert re.search(r"^lowered for this machine: \d+ x \w+", debug, re.M)


def test_seconds_of_a_part_in_itself_are_counted_once() -> None:
    with stages(("emit", "after"), False) as enter:
        enter("emit")
        with part("inductor"):
            for _ in each([1, 2], "inductor"):
                time.sleep(0.05)
        enter("after")
        found = seconds_so_far()
    assert list(found) == ["emit: inductor", "emit", "after"]
    assert 0.1 <= found["emit: inductor"] <= found["emit"]
    assert seconds_so_far() == {}
