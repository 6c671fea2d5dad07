"""The tables of `bench gpu` compare each timed result with exact values: here with few rows, for the comparison alone."""

from __future__ import annotations

import pytest

from sqcompile.bench.gpu import fused_table, gemm_table, rotated_table


@pytest.mark.gpu
@pytest.mark.parametrize(
    "table", [lambda: gemm_table((64,), 0.1), lambda: fused_table(64, 0.1), lambda: rotated_table(64, 0.1)]
)
def test_what_is_timed_is_right(table):
    lines = table()
    assert sum(line.count("|") > 5 for line in lines) >= 6
