"""C++ that is built while something else is done."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from sqcompile.kernels.cpu import build
from sqcompile.pytorch import inductor


@pytest.fixture
def gate(monkeypatch):
    """Holds builds up until it is set; ``seen`` has the names that were built, and the configuration and the priority there."""
    monkeypatch.setattr(build, "_begun", {})
    gate = threading.Event()
    gate.seen = []

    def slow(names):
        assert gate.wait(60)
        priority = os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) if sys.platform == "linux" else 0
        gate.seen.append((names, inductor.config.cpp.cxx, priority))
        if "bad.cpp" in names:
            raise RuntimeError("line 1: no")
        return object()

    monkeypatch.setattr(build, "_build", slow)
    monkeypatch.setattr(inductor, "pick_vec_isa", lambda: gate.seen.append("probed"))
    yield gate
    gate.set()


def test_who_begins_does_not_wait_and_who_needs_it_does(gate):
    with inductor.config.patch("cpp.cxx", ("another compiler",)):
        build.begin(["a.h", "a.cpp"], ["b.cpp"], probe=True)
        build.begin(["a.h", "a.cpp"], probe=True)
    threading.Timer(0.2, gate.set).start()
    first = build.built("a.h", "a.cpp")
    assert first is not None and build.built("a.h", "a.cpp") is first and build.built("b.cpp") is not first
    build._begun[()].result(60)
    assert gate.seen.count("probed") == 1
    found = [entry for entry in gate.seen if entry != "probed"]
    assert sorted(names for names, *_ in found) == [("a.h", "a.cpp"), ("b.cpp",)]
    assert {compiler for _, compiler, _ in found} == {("another compiler",)}
    if sys.platform == "linux" and os.geteuid() == 0:  # a sandbox may forbid it
        assert {priority for *_, priority in found} == {min(19, os.getpriority(os.PRIO_PROCESS, 0) + 5)}


def test_what_does_not_build_is_said_by_who_needs_it(gate, recwarn):
    gate.set()
    build.begin(["bad.cpp"], probe=False)
    build._begun["bad.cpp",].exception(60)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"slower ones of PyTorch.*g\+\+: line 1: no"):
        assert build.built("bad.cpp") is None
    assert gate.seen.count("probed") == 0


def test_what_ctrl_c_ended_is_built_again(gate, monkeypatch):
    gate.set()
    build.begin(["bad.cpp"], probe=False)
    build._begun["bad.cpp",].exception(60)
    monkeypatch.setattr(build, "_build", lambda names: "built")
    assert build.built("bad.cpp") == "built"


def test_who_compiles_waits_for_the_probe_that_has_begun(gate, monkeypatch):
    """Two probes at a time leave each other's flags behind."""
    order = []
    monkeypatch.setattr(inductor, "pick_vec_isa", lambda: (gate.wait(60), order.append("probed")))
    build.probed()  # which nobody has begun
    build.begin(probe=True)
    while not build._begun[()].running():
        pass
    threading.Timer(0.2, gate.set).start()
    build.probed()
    order.append("compiled")
    assert order == ["probed", "compiled"]


def test_what_has_not_begun_is_not_waited_for(gate):
    build.begin(["a.cpp"], ["b.cpp"], ["c.cpp"], probe=False)  # by two threads
    threading.Timer(0.2, gate.set).start()
    assert build.built("c.cpp") is not None and build._begun["c.cpp",].cancelled()


def test_without_threads_who_needs_it_builds(gate, monkeypatch):
    gate.set()

    def none(*args):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(build.ThreadPoolExecutor, "submit", none)
    build.begin(["a.cpp"], probe=True)
    assert build.built("a.cpp") is not None and not build._begun


FORKED = """
import os, threading
from sqcompile.kernels.cpu import build
held = threading.Event()
build._build = lambda names: held.wait(60) and None
build.begin(["a.cpp"], probe=False)
child = os.fork()
if not child:
    build._build = lambda names: "built again"
    os._exit(0 if build.built("a.cpp") == "built again" else 1)
held.set()
_, status = os.waitpid(child, 0)
assert status == 0, status
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_does_not_wait_for_threads_that_it_lacks():
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=120)
