"""Tensor parallel on two GPUs, through NCCL and NVLink: `make gpu2`."""

from __future__ import annotations

from typing import Any

import parallel_gpu_worker
import pytest
import torch
from parallel_cases import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < parallel_gpu_worker.SIZE, reason="needs two CUDA GPUs"),
]
LAYERS = 2


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(parallel_gpu_worker.__file__, tmp_path_factory.mktemp("gpus"))


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_it_is_as_near_the_float_model_as_one_gpu_is(both, backend):
    one = both[0]["one"]
    assert one < 0.05
    for found in both:
        assert found["compiled"][backend]["error"] <= 1.2 * one
        assert found["compiled"][backend]["other size"] == [3, 7, 512]


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_pair_of_linears_keeps_one_all_reduce_in_a_cuda_graph(both, backend):
    for found in both:
        assert found["compiled"][backend]["all_reduce"] == 2 * LAYERS
        assert found["compiled"][backend]["replayed"] <= 1e-3


def test_what_is_loaded_computes_the_same(both):
    assert all(found["compiled"]["loaded"] <= 1e-3 for found in both)


def test_reduce_overhead_replays_collectives(both):
    for found in both:
        assert found["replayed"]["error"] <= 1e-3
        assert found["replayed"]["launched"] == 1 and found["replayed"]["nccl"] == 0
        assert found["replayed"]["reduced"] == 2 * LAYERS


def test_sums_are_those_of_nccl_without_its_kernels(both):
    for found in both:
        assert found["summed"]["equal"] == 201 * [True]
        assert any("_all_reduce" in k for k in found["summed"]["kernels"])
        assert not any("nccl" in k.lower() for k in found["summed"]["kernels"])


def test_generate_writes_what_the_model_writes(both):
    assert both[0]["generated"] == both[1]["generated"]
    for found in both:
        assert found["generated"]["got"] == 2 * [found["generated"]["want"]]
