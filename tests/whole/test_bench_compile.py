"""The benchmark of how long compiling takes."""

from __future__ import annotations

import pytest

from sqcompile.bench import latency


def test_rows_of_the_table():
    found = {**dict.fromkeys(latency.STAGES, 0.25), "plan": 1.5, "plan: choose": 1.0, "all": 3.25}
    line = latency.row("a model", "none", found)
    assert line == "| a model | none | 3.2 | 0.2 | 0.2 | 0.2 | 1.5 | 0.2 | 0.2 | 0.2 | 0.2 |"


def test_caches_are_filled_by_another_model_and_by_the_same(monkeypatch, capsys):
    runs = []
    seconds = dict.fromkeys((*latency.STAGES, "all"), 1.0)
    monkeypatch.setattr(latency, "in_a_process", lambda case, caches, threads: runs.append((case, caches)) or seconds)
    latency.main(["--cases", "16 such layers", "--threads", "2"])
    cases, caches = zip(*runs, strict=True)
    assert cases == ("16 such layers", "anything", "16 such layers", "16 such layers")
    assert len({caches[0], caches[1]}) == 2 and len(set(caches[1:])) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 16")]
    assert [line.split(" | ")[1] for line in lines] == ["none", "of another model", "of this model"]


@pytest.mark.slow
def test_a_process_measures_one_case(tmp_path):
    found = latency.in_a_process("anything", str(tmp_path), 1)
    assert set(latency.STAGES) <= found.keys() and 0 < sum(found[s] for s in latency.STAGES) <= found["all"]
    assert any(tmp_path.iterdir())
