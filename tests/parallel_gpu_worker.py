"""One process of tests/whole/test_gpu_parallel.py: its shard on its own GPU, and what came of it as JSON."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from parallel_worker import SIZE, relative
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh

import sqcompile
from sqcompile.backend import smoothquant
from sqcompile.bench.parallel import sharded
from sqcompile.bench.stack import Shape, captured, stack
from sqcompile.kernels.all_reduce import DTYPES, follow_sums

WIDTHS = Shape(512, 1024, 8, 2, 64)


def batches() -> list[Tensor]:
    some = torch.randn(4, 2, 64, WIDTHS.hidden, generator=torch.Generator().manual_seed(0))
    return list(some.to("cuda", torch.bfloat16).unbind(0))


def alone() -> float:
    """The error of one GPU, before there is a group, whose processes would calibrate together."""
    x, model = batches()[0][:, :40], stack(2, WIDTHS)
    with torch.no_grad():
        return relative(sqcompile.compile(model, batches(), backend="eager", progress=False)(x), model(x))


def compiled(mesh: Any, folder: Path) -> dict[str, Any]:
    """Beside the float model; as a CUDA graph; and saved and loaded."""
    x, whole = batches()[0][:, :40], stack(2, WIDTHS)
    found: dict[str, Any] = {}
    with torch.no_grad():
        exact = whole(x)
        model = sharded(whole, mesh)
        plan = sqcompile.calibrate(model, batches(), progress=False, device_mesh=mesh)
        for backend in ("eager", "inductor"):
            ours = sqcompile.compile(model, plan=plan, backend=backend, progress=False, device_mesh=mesh)
            y = ours(x)
            replay, read = captured(ours, x)
            replay()
            calls = [str(n.target) for n in ours.stages["lowered"].graph.nodes]
            found[backend] = {
                "error": relative(y, exact),
                "replayed": relative(read(), y),
                "all_reduce": sum("all_reduce" in c for c in calls),
                "other size": list(ours(torch.randn(3, 7, 512, device="cuda", dtype=torch.bfloat16)).shape),
            }
        ours.save(folder / "saved")
        loaded = sqcompile.load(folder / "saved", device="cuda", backend="inductor", device_mesh=mesh)
        found["loaded"] = relative(loaded(x), y)
    return found


def summed() -> dict[str, Any]:
    """Sums of many sizes beside NCCL's.

    They are queued one after the other, on two streams and in the replays of a CUDA graph, while one process or the other is
    late: each is at most a call ahead, and nothing else keeps them together.
    """
    name, plain, device = (
        distributed.group.WORLD.group_name,
        torch.ops._c10d_functional,
        torch.device("cuda", torch.cuda.current_device()),
    )
    ours, other = torch.ops.sqcompile.all_reduce, torch.cuda.Stream()
    pick = torch.Generator().manual_seed(0)  # the sizes are the same on both
    sizes = [int(torch.randint(1, 24, (), generator=pick)) ** (2 + i % 3) for i in range(200)]
    given = [
        torch.randn(size + 12_000_000 * (i % 50 == 7), device="cuda", dtype=DTYPES[i % len(DTYPES)])
        for i, size in enumerate(sizes)
    ]
    x = torch.randn(33, 64, device="cuda", dtype=torch.bfloat16)
    replay, read = captured(lambda x: ours(ours(x, name) * 0.5, name), x)
    torch.cuda.synchronize()
    got = []
    for i, part in enumerate(given):
        if i % 7 == distributed.get_rank():
            torch.cuda._sleep(300_000)  # cycles of the GPU
        if i % 10 == 3:
            follow_sums(device)  # as whoever replays a graph with sums does
            replay()
        with torch.cuda.stream(other if i % 5 == 0 else torch.cuda.default_stream()):
            got.append(ours(part, name))
    torch.cuda.synchronize()
    equal = [
        torch.equal(y, plain.wait_tensor(plain.all_reduce(part, "sum", name)))
        for part, y in zip(given, got, strict=True)
    ]
    half = plain.wait_tensor(plain.all_reduce(x, "sum", name)) * 0.5
    equal.append(torch.equal(read(), plain.wait_tensor(plain.all_reduce(half, "sum", name))))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
        ours(x, name)
        torch.cuda.synchronize()
    return {"equal": equal, "kernels": [e.key for e in p.key_averages()]}


def replayed(mesh: Any) -> dict[str, Any]:
    """Through torch.compile, with CUDA graphs of its own."""
    model, x = sharded(stack(2, WIDTHS), mesh), batches()[1]
    plan = sqcompile.calibrate(model, batches(), progress=False, device_mesh=mesh)
    plain, graphs = (
        torch.compile(model, backend=smoothquant, options={"plan": plan, "mode": mode})
        for mode in ("default", "reduce-overhead")
    )
    with torch.no_grad():
        want = plain(x)
        torch._dynamo.reset()
        results = [graphs(x).clone() for _ in range(5)]
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
        ) as p:
            graphs(x)
            torch.cuda.synchronize()
    names = [e.key for e in p.key_averages()]
    return {
        "error": max(relative(y, want) for y in results),
        "launched": sum(e.count for e in p.key_averages() if "cudaGraphLaunch" in e.key),
        "reduced": sum(e.count for e in p.key_averages() if "_all_reduce" in e.key and "sqcompile" not in e.key),
        "nccl": sum("nccl" in n.lower() and "kernel" in n.lower() for n in names),
    }


def generated(mesh: Any) -> dict[str, Any]:
    """A language model whose linears are sharded writes what it writes by `model.generate`, a CUDA graph a token."""
    from conftest import tiny_lm
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = tiny_lm("llama", max_position_embeddings=512).cuda()
    styles: dict[str, Any] = {f"model.layers.*.self_attn.{n}_proj": ColwiseParallel() for n in "qkv"}
    styles |= {f"model.layers.*.mlp.{n}_proj": ColwiseParallel() for n in ("gate", "up")}
    styles |= {"model.layers.*.self_attn.o_proj": RowwiseParallel(), "model.layers.*.mlp.down_proj": RowwiseParallel()}
    model = parallelize_module(model, mesh, styles)
    ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(5)).cuda()
    plan = sqcompile.calibrate(model, [ids], progress=False, device_mesh=mesh)
    net = torch.compile(model, backend=smoothquant, options={"plan": plan})
    how: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 24}
    with torch.no_grad():
        return {
            "want": net.generate(ids, **how).tolist(),
            "got": [sqcompile.generate(net, ids, **how, record=True).tolist() for _ in range(2)],
        }


def main(rank: int, folder: Path) -> None:
    warnings.simplefilter("ignore")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(SIZE))
    torch.cuda.set_device(rank)
    faulthandler.dump_traceback_later(280, exit=True)  # where one waits for the other for ever
    one = alone()
    distributed.init_process_group(
        "nccl", init_method=f"file://{folder}/store", rank=rank, world_size=SIZE, device_id=torch.device("cuda", rank)
    )
    mesh = init_device_mesh("cuda", (SIZE,))
    found: dict[str, Any] = {"one": one}
    for name, part in {
        "summed": summed,
        "compiled": lambda: compiled(mesh, folder),
        "replayed": lambda: replayed(mesh),
        "generated": lambda: generated(mesh),
    }.items():
        found[name] = part()
        print(rank, name, found[name], file=sys.stderr)  # shown where the next part fails
    (folder / f"found-{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
