"""Tensor parallel: a plan that is not a process's, and a failure in one process, end all of them in one sentence."""

from __future__ import annotations

from typing import Any

import parallel_faults
import pytest
from parallel_cases import run

NOT_FINITE = (
    "the input of down.weight (node relu) is not finite in calibration batch 0: check the batch and the model's dtype "
    "(float16 overflows at 65504; try bfloat16)"
)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(parallel_faults.__file__, tmp_path_factory.mktemp("faults"), seconds=240)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("own", ""),
        ("own again", ""),
        ("of rank 0", "PlanError: rank 1 has the plan of rank 0 of 2: pass each rank the plan that it made"),
        ("of rank 0, by torch.compile", "PlanError: rank 1 has the plan of rank 0 of 2: pass each rank the plan that it made"),
        ("of a whole model", "PlanError: the plan is of a whole model, and this one is sharded over 2 processes: calibrate it with device_mesh, and pass each rank its own plan"),
        ("for a whole model", "PlanError: the plan is of rank {rank} of 2 of a sharded model, and this model is whole: calibrate this one, or shard it"),
        ("for a whole model, by torch.compile", "PlanError: the plan is of rank {rank} of 2 of a sharded model, and this model is whole: calibrate this one, or shard it"),
        ("of four processes", "PlanError: the plan is of rank 0 of 4 processes, and this model is sharded over 2: calibrate it again"),
        ("edited", "PlanError: the plans of rank 0 and rank 1 decide differently: pass each rank the plan that it made in one calibration of all, with the same edits"),
    ],
)  # fmt: skip
def test_a_plan_is_of_one_process(both, name, says):
    """Every rank says the same of it, where it is refused."""
    assert [found["plans"]["said"][name] for found in both] == [says.format(rank=rank) for rank in (0, 1)]


def test_a_plan_that_one_process_cannot_read(both):
    first, second = (found["plans"]["said"]["not there"] for found in both)
    assert second.startswith("PlanError: FOLDER/nothing is not a sqcompile plan")
    assert first == f"CalibrationError: rank 1 failed: {second.removeprefix('PlanError: ')}"


def test_whose_it_is_is_saved_and_said(both):
    for rank, found in enumerate(both):
        plans = found["plans"]
        assert plans["equal"] == [True, True, rank == 0, False]  # as read again; rank 0's; without its rank
        assert f"the shard of rank {rank} of 2" in plans["repr"] and f"rank {rank} of 2" in plans["html"]


def test_numbers_of_one_process_that_are_not_finite_end_all(both):
    says = [found["faults"]["too large"]["said"] for found in both]
    assert says == [f"CalibrationError: rank 1 failed: {NOT_FINITE}", f"CalibrationError: {NOT_FINITE}"]


def test_an_error_of_one_process_ends_all(both):
    says = [found["faults"]["choice"]["said"] for found in both]
    assert says == ["CalibrationError: rank 1 failed: MemoryError: no room for it", "MemoryError: no room\nfor it"]


@pytest.mark.parametrize(
    "name", ["silent", "silent, static", "in one half", "in one half, by outputs", "too large outputs"]
)
def test_numbers_of_one_process_decide_for_all(both, name):
    """A shard without gradients, with inputs that are zero, or are in one half of the tokens, or with outputs not finite."""
    first, second = (found["faults"][name] for found in both)
    assert first["said"] == second["said"] == ""
    assert first["decided"] == second["decided"] and len(first["decided"]) == (1 if name == "too large outputs" else 2)


@pytest.mark.parametrize("name", ["gradients", "outputs"])
def test_what_fails_in_one_process_is_done_without_in_all(both, name):
    first, second = (found["faults"][name] for found in both)
    assert first["said"] == second["said"] == "" and first["decided"] == second["decided"]
    for found, why in ((first, "rank 1 failed: MemoryError: no room"), (second, "MemoryError: no room")):
        if name == "gradients":
            assert found["reasons"] == [f"chosen by its own error, as the outputs have no gradients: {why}"]
        else:
            [said] = found["warned"]
            assert said.startswith(
                f"whether smoothing helps the outputs was not compared: {why}. The model is smoothed"
            )
