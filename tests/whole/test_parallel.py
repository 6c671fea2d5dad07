"""Tensor parallel: two processes hold a model together, and compile it each for its shard."""

from __future__ import annotations

from typing import Any

import parallel_worker
import pytest
from conftest import tiny_lm
from parallel_cases import run

RANKS = range(parallel_worker.SIZE)
COLUMNS, ROWS = ("q", "k", "v", "up"), ("o", "down")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(parallel_worker.__file__, tmp_path_factory.mktemp("parallel"))


@pytest.fixture(scope="module", params=RANKS)
def found(both, request) -> dict[str, Any]:
    return both[request.param]


def test_a_pair_of_linears_keeps_one_all_reduce(found):
    """Of what INT8 linears give, dequantized; the model itself stays sharded."""
    block = found["block"]
    assert len(block["all_reduce"]) == len(ROWS) and all("int8_linear" in n for n in block["all_reduce"])
    assert block["collectives"] == 2 * len(ROWS)  # each is waited for
    assert block["left"].count("DTensor") == 12


def test_gpus_sum_by_one_operator(found):
    assert found["block"]["of a gpu"] == len(ROWS) * ["sqcompile.all_reduce.default"]
    assert found["block"]["on a gpu"] <= 1e-5


def test_folding_is_exact(found):
    assert found["block"]["folded"] <= 1e-5
    assert found["block"]["sites"] == ["norm.weight", "v.weight", "after.weight", "up.weight"]
    assert found["block"]["refused"] == []


def test_scales_are_those_of_one_process(found):
    """Smoothing scales of all channels, and of the shards one after the other."""
    assert len(found["block"]["scales"]) == 4
    assert all(error <= 1e-6 for error in found["block"]["scales"].values())


def test_int8_weights_are_shards_of_the_whole_ones(found):
    """With the scales of the whole, also where a shard has a part of each row."""
    assert found["block"]["weights"].keys() == {f"{name}.weight" for name in COLUMNS + ROWS}
    for different, of_rows in found["block"]["weights"].values():
        assert different == 0 and of_rows <= 1e-6


def test_it_computes_what_it_says(found):
    """Inputs of sharded channels are quantized by token and shard, dequantized, and then summed; biases are added once."""
    block = found["block"]
    assert block["emulated"] <= 1e-5 and block["quantized"] <= 1e-5
    assert block["whole"] <= 1e-2 and block["error"][0] <= 1.2 * block["error"][1]
    assert block["other size"] == [3, 4, 32]


def test_both_processes_decide_alike(both):
    assert both[0]["chosen"] == both[1]["chosen"] and both[0]["chosen"]["error"] <= 0.05  # that of static scales
    assert both[0]["block"]["layers"] == both[1]["block"]["layers"]
    assert both[0]["backend"] == both[1]["backend"]


def test_they_decide_as_one_process_does(found):
    """Of whole inputs α, the rotation and the cost to the outputs, which comes from gradients, are the same."""
    tp, alone = found["chosen"]["default"], found["chosen"]["alone"]
    for mine, its in zip(tp, alone, strict=True):
        assert mine[:5] == its[:5]  # name, quantized, smoothing, alpha, rotation
        assert mine[5] == pytest.approx(its[5], rel=1e-4 if its[0].startswith(COLUMNS) else 0.2)


def test_torch_compile(found):
    """It calibrates in float, and then runs in INT8."""
    assert found["backend"]["first"] <= 1e-5 < found["backend"]["error"] <= 2e-2
    assert [(name, quantized) for name, quantized, *_ in found["backend"]["layers"]] == [
        (f"{name}.weight", True) for name in ("q", "k", "v", "o", "up", "down")
    ]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("whole model", "CaptureError: device_mesh for a model that is not sharded: shard it (torch.distributed.tensor.parallel.parallelize_module, or transformers' from_pretrained(..., tp_plan='auto')), or leave device_mesh out"),
        ("no mesh", "CaptureError: q.weight is sharded (a DTensor): pass device_mesh=, the mesh that the model is sharded on, or load the float model whole"),
        ("two dims", "CaptureError: device_mesh has 2 dims: pass the one that the model's linears are sharded on, such as mesh['tp']"),
        ("no DeviceMesh", "CaptureError: device_mesh='tp': pass a torch.distributed.device_mesh.DeviceMesh of one dim"),
        ("uneven", "CaptureError: up.weight has 33 channels in dim 0, of which 2 processes have unequal shards: shard it over a number of processes that divides them, or leave it whole"),
        ("no sum", "CaptureError: a sum of several processes that a bias is added to is not summed up by itself: give RowwiseParallel output_layouts=Replicate(), or Shard() of another dim than the last, and use nothing of it before"),
        ("attention", "RecipeError: attention='qk' with device_mesh: products of attention are not quantized in a sharded model, leave attention out"),
        ("other data", "CalibrationError: rank 1 has another first batch than rank 0: pass every rank the same loader, with all batches in one order (no DistributedSampler, and one seed where it shuffles)"),
    ],
)  # fmt: skip
def test_refusals(found, name, says):
    assert found["refusals"][name] == says


@pytest.mark.slow
def test_a_model_of_transformers(tmp_path):
    """Sharded by its own plan, with a sharded vocabulary: compiled, and by torch.compile with the same plan in generate."""
    pytest.importorskip("accelerate")  # transformers wants it to shard a model
    tiny_lm("llama", num_hidden_layers=1).save_pretrained(tmp_path / "llama")
    for found in run(parallel_worker.__file__, tmp_path):
        assert found["folded"] <= 1e-5 < found["error"] <= 2e-2
        # the embedding's, one of attention and one of the MLP; the head's
        assert found["collectives"] == {"all_reduce": 3, "all_gather": 1}
        assert found["generated"] == found["wanted"]
        assert found["own"] == [found["wanted"], found["wanted"][:1]]
