"""Expected speeds: which table a machine has, what INT8 is compared with, and what `min_speedup` leaves in float."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_lm, token_batches

import sqcompile
from sqcompile.kernels import speedup
from sqcompile.kernels.targets import Target


def test_tables_of_processors(monkeypatch):
    """A CPU's is found by its target and whether it has bfloat16; a model in float32 is compared with that."""
    rows = [{"m": 1, "n": 64, "k": 64, "bf16_us": 30.0, "float32_us": 50.0, "int8_us": 10.0}]
    tables = {"x86-vnni-bf16": {"rows": rows}}
    monkeypatch.setattr(speedup, "_content", lambda kind: tables.get(kind, {}))
    monkeypatch.setattr(speedup, "has_bf16", lambda: True)
    speedup._table.cache_clear()
    cpu = torch.device("cpu")
    try:
        for name, want in (("x86-vnni", (3.0, 5.0)), ("x86-avx2", (None, None)), ("reference", (0.0, 0.0))):
            monkeypatch.setattr(speedup.Target, "of", lambda device, name=name: Target.named(name))
            found = (speedup.expected(cpu, 1, 64, 64), speedup.expected(cpu, 1, 64, 64, "float32"))
            assert found == want
    finally:
        speedup._table.cache_clear()


def test_without_kernels_min_speedup_leaves_all_in_float(monkeypatch):
    monkeypatch.setattr(speedup.Target, "of", lambda device: Target.named("reference"))
    recipe = sqcompile.Recipe(alpha=0.5, min_speedup=1.0)
    with pytest.raises(
        sqcompile.NothingToQuantizeError, match=r"cpu has no INT8 kernels here, which min_speedup=1.0 asks"
    ):
        sqcompile.calibrate(tiny_lm("llama"), token_batches(), recipe=recipe, progress=False)


def test_every_shipped_table_is_read_whole():
    for file in (Path(speedup.__file__).parent / "speedups").glob("*.json"):
        content = json.loads(file.read_text())
        assert content["measured"] and content["rows"] and speedup._content(content["name"]) == content
        for row in content["rows"]:
            assert all(us > 0 for name, us in row.items() if name.endswith("_us"))
