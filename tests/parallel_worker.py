"""One process of tests/whole/test_parallel.py: a shard of some models, compiled, and what came of it as JSON."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

import sqcompile
from sqcompile.kernels.reference import quantize, token_scale, weight_scale
from sqcompile.kernels.targets import Target
from sqcompile.passes.ir.about import about
from sqcompile.passes.lowering.lower import lower
from sqcompile.process import ranks

SIZE = 2
STYLES = {
    **{name: ColwiseParallel() for name in ("q", "k", "v", "up")},
    **{name: RowwiseParallel() for name in ("o", "down")},
}


class Block(nn.Module):
    """[B, S, 32] of [B, S, 32]: attention of as many heads of 8 channels as the projections have, and an MLP; all with biases."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.after = nn.LayerNorm(32), nn.LayerNorm(32)
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        with torch.no_grad():
            self.norm.weight[3], self.after.weight[5] = 20.0, 30.0

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(torch.relu(self.up(self.after(x))))


class Plain(nn.Module):
    """[B, N] of [B, 32], by one linear."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.up = nn.Linear(32, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


def batches(seed: int = 0) -> list[Tensor]:
    return list(torch.randn(4, 2, 6, 32, generator=torch.Generator().manual_seed(seed)).unbind(0))


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def sharded(mesh: Any) -> nn.Module:
    return parallelize_module(Block().eval(), mesh, STYLES)


def settled(plan: sqcompile.Plan) -> list[Any]:
    """What was decided of each linear; static scales of what is not sharded."""
    return [
        (l.name, l.quantized, l.smoothing, l.alpha, l.rotation, l.loss, l.sqnr_db)
        + (() if l.name.startswith(("o.", "down.")) else (l.input_scale,))
        for l in plan.layers
    ]


def int8(x: Tensor, w: Tensor, scale: Tensor | None = None) -> Tensor:
    """x W^T with x quantized per token and W per row, by their own largest values or by other scales [N, 1]."""
    by, scale = token_scale(x), weight_scale(w, True) if scale is None else scale
    return (quantize(x, by).float() @ quantize(w, scale).float().t()) * by * scale.flatten()


def by_rows(x: Tensor, w: Tensor) -> Tensor:
    """The same, with x quantized per token and shard, and W by the largest values of all of it."""
    parts = zip(x.chunk(SIZE, -1), w.chunk(SIZE, -1), strict=True)
    return sum((int8(a, b, weight_scale(w, True)) for a, b in parts), torch.zeros(()))


def emulated(m: Block, s: dict[str, Tensor], x: Tensor) -> Tensor:
    """What the processes should compute together, without any of them: by the smoothing scales of the four sites."""
    first, values, second, hidden = s.values()

    def norm(n: nn.LayerNorm, x: Tensor, s: Tensor) -> Tensor:
        return F.layer_norm(x, (32,), n.weight / s, n.bias / s)

    h = norm(m.norm, x, first)
    q, k = (int8(h, f.weight * first) + f.bias for f in (m.q, m.k))
    v = int8(h, m.v.weight * first / values[:, None]) + m.v.bias / values
    heads = (t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in (q, k, v))
    x = x + (by_rows(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2), m.o.weight * values) + m.o.bias)
    up = int8(norm(m.after, x, second), m.up.weight * second / hidden[:, None]) + m.up.bias / hidden
    return x + (by_rows(torch.relu(up), m.down.weight * hidden) + m.down.bias)


def in_one_process() -> tuple[sqcompile.CompiledModel, sqcompile.Plan, nn.Module]:
    """The block compiled with one α, and planned with choices, before there is a group; and the block, which stages need."""
    one = sqcompile.Recipe(alpha=0.5)
    model = Block().eval()
    compiled = sqcompile.compile(model, batches(), recipe=one, backend="eager", progress=False)
    return compiled, sqcompile.calibrate(model, batches(), progress=False), model


def block(mesh: Any, whole: sqcompile.CompiledModel) -> dict[str, Any]:
    """Of a block with one α, beside the same in one process."""
    x, float_model, model = batches(1)[0], Block().eval(), sharded(mesh)
    compiled = sqcompile.compile(
        model, batches(), recipe=whole.plan.recipe, backend="eager", progress=False, device_mesh=mesh
    )
    stages = {name: compiled.stages[name] for name in ("traced", "folded", "quantized", "lowered")}
    parallel, own, wanted = about(stages["traced"]).parallel, stages["quantized"], whole.stages["quantized"]
    scales, weights = {}, {}
    for name, s in compiled.plan.scales.items():
        scales[name] = parallel.joined(s) if name.startswith(("v.", "up.")) else s
    for name, dim in parallel.dims.items():
        if name.endswith("weight"):
            part = wanted.get_buffer(f"{name}_int8").chunk(SIZE, dim)[mesh.get_local_rank()]
            of_rows = wanted.get_buffer(f"{name}_scale")
            of_rows = of_rows.chunk(SIZE)[mesh.get_local_rank()] if dim == 0 else of_rows
            different = (own.get_buffer(f"{name}_int8").int() - part.int()).abs()
            weights[name] = [int(different.max()), relative(own.get_buffer(f"{name}_scale"), of_rows)]
    of_a_gpu = lower(stages["quantized"], target=Target.named("cuda-sm90"))
    with torch.no_grad():
        wanted_y, y = float_model(x), compiled(x)
        return {
            "of a gpu": [
                str(n.target) for n in of_a_gpu.graph.nodes if "reduce" in str(n.target) or "c10d" in str(n.target)
            ],
            "on a gpu": relative(of_a_gpu(x), y),
            "scales": {name: relative(s, whole.plan.scales[name]) for name, s in scales.items()},
            "weights": weights,
            "all_reduce": [str(n.args[0]) for n in stages["lowered"].graph.nodes if "all_reduce" in str(n.target)],
            "collectives": sum("_c10d" in str(n.target) for n in stages["lowered"].graph.nodes),
            "folded": relative(stages["folded"](x), wanted_y),
            "quantized": relative(stages["quantized"](x), y),
            "emulated": relative(y, emulated(float_model, scales, x)),
            "whole": relative(y, whole(x)),
            "error": [relative(y, wanted_y), relative(whole(x), wanted_y)],
            "other size": list(compiled(torch.randn(3, 4, 32)).shape),
            "layers": settled(compiled.plan),
            "sites": [s.partition(" -> ")[0] for s in scales],
            "refused": [l.reason for l in compiled.plan.layers if l.smoothing == "multiplied"],
            "left": [type(p).__name__ for p in model.parameters()],
        }


def chosen(mesh: Any) -> dict[str, Any]:
    """What recipes with choices choose."""
    found: dict[str, Any] = {}
    for name, recipe in {"default": "default", "static": sqcompile.Recipe(activation="per_tensor_static")}.items():
        plan = sqcompile.calibrate(sharded(mesh), batches(), recipe=recipe, progress=False, device_mesh=mesh)
        found[name] = settled(plan)
    again = sqcompile.compile(sharded(mesh), plan=plan, backend="eager", progress=False, device_mesh=mesh)
    with torch.no_grad():
        found["error"] = relative(again(batches(1)[0]), Block()(batches(1)[0]))
    return found


def backend(mesh: Any) -> dict[str, Any]:
    """Through torch.compile."""
    model, x = sharded(mesh), batches(1)[0]
    options = {"compiler": "eager", "calibration_steps": 2}
    compiled = torch.compile(model, backend="smoothquant", options=options)
    with torch.no_grad():
        first = relative(compiled(batches()[0]), Block()(batches()[0]))
        for batch in batches()[1:]:
            compiled(batch)
        plan = sqcompile.plan_of(compiled)
        return {"first": first, "error": relative(compiled(x), Block()(x)), "layers": settled(plan)}


def llama(folder: Path) -> dict[str, Any]:
    """A model of transformers, sharded as it says itself."""
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(folder / "llama").eval()
    model = AutoModelForCausalLM.from_pretrained(folder / "llama", tp_plan="auto", tp_size=SIZE).eval()
    ids = [torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    tp = model.lm_head.weight.device_mesh
    compiled = sqcompile.compile(
        model, ids, recipe=sqcompile.Recipe(alpha=0.5), backend="eager", progress=False, device_mesh=tp
    )
    calls = [str(n.target) for n in compiled.stages["lowered"].graph.nodes]
    options = {"compiler": "eager", "plan": compiled.plan}
    model.forward = torch.compile(model.forward, backend="smoothquant", options=options)
    with torch.no_grad():
        logits = whole(ids[0]).logits
        return {
            "folded": relative(compiled.stages["folded"](ids[0]).logits, logits),
            "error": relative(compiled(ids[0]).logits, logits),
            "collectives": {n: sum(n in c for c in calls) for n in ("all_reduce", "all_gather")},
            "plan": repr(compiled.plan),
            "generated": model.generate(ids[0], max_new_tokens=4, do_sample=False, pad_token_id=0).tolist(),
            "own": [
                sqcompile.generate(model, x, max_new_tokens=4, do_sample=False, pad_token_id=0).tolist()
                for x in (ids[0], ids[0][:1])
            ],
            "wanted": whole.generate(ids[0], max_new_tokens=4, do_sample=False, pad_token_id=0).tolist(),
        }


def said(call: Callable[[], Any], kind: type[Exception] = sqcompile.SQCompileError) -> str:
    """What a call refuses with; "" if it does not."""
    try:
        call()
    except kind as e:
        return f"{type(e).__name__}: {e}"
    return ""


def refusals(mesh: Any, rank: int) -> dict[str, str]:
    """What each wrong call says."""
    names = {"mesh_dim_names": ("dp", "tp")}
    uneven = parallelize_module(Plain(33), mesh, {"up": ColwiseParallel()})
    partial = RowwiseParallel(input_layouts=Replicate(), output_layouts=Partial())
    unsummed = parallelize_module(Plain(32), mesh, {"up": partial})
    calls: dict[str, Callable[[], Any]] = {
        "whole model": lambda: sqcompile.calibrate(Block().eval(), batches(), device_mesh=mesh),
        "no mesh": lambda: sqcompile.compile(sharded(mesh), batches()),
        "two dims": lambda: sqcompile.compile(
            sharded(mesh), batches(), device_mesh=init_device_mesh("cpu", (1, 2), **names)
        ),
        "no DeviceMesh": lambda: sqcompile.compile(sharded(mesh), batches(), device_mesh="tp"),
        "uneven": lambda: sqcompile.compile(uneven.eval(), [torch.randn(4, 32)], device_mesh=mesh),
        "attention": lambda: sqcompile.calibrate(
            sharded(mesh), batches(), recipe=sqcompile.Recipe(attention="qk"), device_mesh=mesh
        ),
        "no sum": lambda: sqcompile.compile(unsummed.eval(), [torch.randn(4, 32)], device_mesh=mesh),
        "other data": lambda: sqcompile.calibrate(sharded(mesh), batches(rank), device_mesh=mesh),
    }
    return {name: said(call) for name, call in calls.items()}


@contextlib.contextmanager
def group(rank: int, folder: Path) -> Iterator[Any]:
    """The mesh of the processes."""
    torch.set_num_threads(1)
    ranks.BEAT = 0.1
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(SIZE))
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=SIZE)
    yield init_device_mesh("cpu", (SIZE,))
    distributed.destroy_process_group()


def main(rank: int, folder: Path) -> None:
    warnings.simplefilter("ignore")
    alone = None if (folder / "llama").exists() else in_one_process()
    with group(rank, folder) as mesh:
        if alone is None:
            found = llama(folder)
        else:
            found = {
                "block": block(mesh, alone[0]),
                "chosen": {**chosen(mesh), "alone": settled(alone[1])},
                "backend": backend(mesh),
                "refusals": refusals(mesh, rank),
            }
        (folder / f"found-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
