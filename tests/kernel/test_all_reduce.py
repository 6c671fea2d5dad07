"""The sum over GPUs that write to each other's memory; tests/whole/test_gpu_parallel.py has two GPUs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, INTERPRETED, PARTS, kernels, run_in_the_interpreter, same

from sqcompile.kernels import all_reduce as sums

PLACE = 4096  # bytes


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
@pytest.mark.parametrize("part", PARTS)
def test_these_kernels_in_the_interpreter(part):
    run_in_the_interpreter(__file__, part)


class Group:
    """The memory of some GPUs, as one of them sees it when the others have said that they are at its call."""

    def __init__(self, count: int, dtype: torch.dtype) -> None:
        from sqcompile.kernels.triton.all_reduce import BLOCKS, memory_bytes

        self.count, self.dtype, self.blocks = count, dtype, BLOCKS
        self.memory = [torch.zeros(memory_bytes(PLACE, count), dtype=torch.uint8, device=DEVICE) for _ in range(count)]
        self.addresses = torch.tensor([m.data_ptr() for m in self.memory], device=DEVICE)
        self.calls = [torch.zeros(BLOCKS, dtype=torch.int32, device=DEVICE) for _ in range(count)]

    def flags(self, rank: int) -> Tensor:
        """How often the blocks of each GPU have been called, int32 [count, BLOCKS], as a GPU was told."""
        return self.memory[rank][2 * self.count * PLACE :].view(torch.int32).view(self.count, self.blocks)

    def place(self, rank: int, call: int, sender: int, size: int) -> Tensor:
        """Where a GPU's memory has what another sent it."""
        half = self.memory[rank][: 2 * self.count * PLACE].view(self.dtype).view(2, self.count, -1)
        return half[call & 1, sender, :size]

    def summed(self, rank: int, x: list[Tensor]) -> Tensor:
        """What one GPU gets, the others being through with their writing."""
        from sqcompile.kernels.triton.all_reduce import all_reduce

        call = (int(self.calls[rank][0]) + 1 + 2**31) % 2**32 - 2**31
        for other in range(self.count):
            if other != rank:
                self.place(rank, call, other, x[0].numel()).copy_(x[other])
                self.flags(rank)[other] = call
        out = torch.full_like(x[rank], -1.0)
        all_reduce(x[rank], out, self.addresses, self.calls[rank], PLACE, rank, self.count)
        for other in range(self.count):
            if other != rank:
                same(self.place(other, call, rank, x[0].numel()), x[rank])
                same(self.flags(other)[rank], torch.full_like(self.flags(other)[rank], call))
        return out


@kernels
@pytest.mark.parametrize(
    ("size", "count", "dtype"),
    [
        (1, 2, torch.bfloat16),
        (1000, 2, torch.float32),
        (1024, 3, torch.float32),
        (1030, 3, torch.float16),
        pytest.param(2048, 2, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(7, 3, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_each_gpu_gets_the_sum_and_sends_its_own(size, count, dtype):
    group = Group(count, dtype)
    for call in range(3):  # both halves, and the first again
        x = [
            torch.randn(size, generator=torch.Generator().manual_seed(9 * call + r)).to(DEVICE, dtype)
            for r in range(count)
        ]
        total = x[0].float()
        for other in x[1:]:
            total = total + other.float()
        results = [group.summed(rank, x) for rank in range(count)]
        for y in results:
            same(y, total.to(dtype))
    assert all(bool((c == 3).all()) for c in group.calls)


@kernels
def test_the_number_of_calls_may_overflow():
    group, x = Group(2, torch.float32), [torch.ones(9, device=DEVICE), torch.full((9,), 2.0, device=DEVICE)]
    for calls in group.calls:
        calls.fill_(2**31 - 2)
    for _ in range(3):
        same(group.summed(0, x), torch.full((9,), 3.0, device=DEVICE))
    assert int(group.calls[0][0]) == -(2**31) + 1


HERE = "boot 1"


@pytest.mark.parametrize(
    ("reaches", "joined"),
    [
        ([(HERE, "a", ("b",)), (HERE, "b", ("a", "c"))], True),
        ([(HERE, "a", ("b", "c")), (HERE, "b", ("a", "c")), (HERE, "c", ("a", "b"))], True),
        ([(HERE, "a", ("b",)), (HERE, "b", ("a", "c")), (HERE, "c", ("b",))], False),  # a chain
        ([(HERE, "a", ("b",)), ("boot 2", "b", ("a",))], False),
        ([(HERE, "a", ()), (HERE, "b", ())], False),
        ([(HERE, "a", ("b",)), (HERE, "a", ("b",))], False),  # two processes of one GPU
        ([(HERE, "a", ("b",)), None], False),
        ([(HERE, "a", ())], False),
    ],
)
def test_gpus_that_are_not_all_joined_are_left_to_nccl(reaches, joined):
    assert sums._joined(reaches) == joined


def test_large_tensors_of_many_gpus_are_left_to_nccl():
    def takes(count: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> bool:
        place = sums._PIECE if count == 2 else sums._MOST // (count - 1) // 16 * 16
        exchange = sums.Exchange(torch.empty(0), torch.empty(0), torch.empty(0), place, 0, count)
        return exchange.takes(torch.empty(*shape, dtype=dtype, device="meta"))

    assert takes(2, 8192, 8192) and takes(2, 1, 4096) and not takes(2, 4, dtype=torch.float64)
    assert takes(8, 64, 4096) and not takes(8, 2048, 4096)


def test_without_a_gpu_pytorch_sums(tmp_path):
    """Of one process; tests/whole/test_parallel.py has two."""
    from torch import distributed

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        name = distributed.group.WORLD.group_name
        x = torch.randn(3, 5)
        y = torch.ops.sqcompile.all_reduce(x.t(), name)
        assert torch.equal(y, x.t()) and y.is_contiguous()
    finally:
        distributed.destroy_process_group()


def test_calls_on_several_streams_wait_for_each_other(monkeypatch):
    """Also for CUDA graphs that were replayed between, as whoever replays one says."""

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            waits.append((self.name, other.name))

    waits, device = [], torch.device("cuda", 0)
    now = {"stream": Stream("a")}
    a, b = now["stream"], Stream("b")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: now["stream"])
    monkeypatch.setattr(sums, "_exchanges", {})
    monkeypatch.setattr(sums, "_last", {})
    for stream in (a, b):
        now["stream"] = stream
        sums.follow_sums(device)
    assert waits == []  # nobody sums
    sums._exchanges["0"] = (object(), sums.Exchange(*3 * [torch.empty(0)], 16, 0, 2))
    for stream in (a, a, b, a):
        now["stream"] = stream
        sums.follow_sums(device)
    assert waits == [("b", "a"), ("a", "b")]


def test_a_step_that_fails_in_one_process_fails_in_all(monkeypatch):
    said = []
    near = [("boot", "a", ("b",)), ("boot", "b", ("a",))]

    def told(group, what):
        said.append(what)
        return near if len(said) == 1 else ["", "RuntimeError: of the other"]

    monkeypatch.setattr(sums, "_told", told)
    monkeypatch.setattr(sums, "_reach", lambda device: near[0])
    monkeypatch.setattr(sums, "new_shared_memory", lambda size, device: torch.ones(size, dtype=torch.uint8))
    monkeypatch.setattr(sums, "addresses_of", lambda memory, name: pytest.fail("the other one does not come"))
    monkeypatch.setattr(sums.dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(sums.dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert sums._made("group", "0", torch.device("cuda", 0)) is None
    assert said == [near[0], ""]


def test_without_torch_distributed_there_is_nothing_to_sum():
    code = "import torch; torch.distributed.is_available = lambda: False; import sqcompile; print(sqcompile.Recipe().alpha)"
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert run.stdout == "0.5\n", run.stderr
