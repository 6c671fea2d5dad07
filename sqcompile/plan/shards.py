"""shards: whether a plan is that of a process, and plans of several processes those of one model.

Each process of a sharded model has a plan of its own. What they decide is the same in all of them, as each decision asks for
collectives while weights are quantized; static scales of inputs and smoothing scales are those of the process's own channels.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch

from sqcompile.errors import PlanError
from sqcompile.plan.entries import Shard
from sqcompile.plan.plan import Plan
from sqcompile.process.parallel import Parallel


def shard_of(parallel: Parallel) -> Shard | None:
    """What a process's plan is of; None where it holds the whole model."""
    return None if parallel.count == 1 else Shard(parallel.rank, parallel.count)


def check_shard(plan: Plan, shard: Shard | None) -> None:
    """Refuses a plan of other shards.

    Args:
        plan: of a user.
        shard: what this process has of the model; None for all.

    Raises:
        PlanError: saying what to pass.
    """
    if plan.shard == shard:
        return
    if shard is None:
        raise PlanError(
            f"the plan is of {plan.shard} of a sharded model, and this model is whole: calibrate this one, or shard it"
        )
    if plan.shard is None:
        raise PlanError(
            f"the plan is of a whole model, and this one is sharded over {shard.count} processes: calibrate it with device_mesh, "
            "and pass each rank its own plan"
        )
    if plan.shard.count != shard.count:
        raise PlanError(
            f"the plan is of {plan.shard} processes, and this model is sharded over {shard.count}: calibrate it again"
        )
    raise PlanError(f"rank {shard.rank} has the plan of {plan.shard}: pass each rank the plan that it made")


def check_given(plan: Plan, parallel: Parallel) -> None:
    """Refuses plans that users give to processes that hold a model together, where one is of another process, or decides otherwise.

    Raises:
        PlanError: on all of them: they ask for collectives alike, or would wait for each other for ever.
    """
    if parallel.count == 1:
        return
    shard = plan.shard or Shard(-1, 1)
    said = torch.tensor([shard.rank, shard.count, *_decisions(plan)])
    every = parallel.joined(said).view(parallel.count, -1).tolist()
    for rank, (of, count, *digest) in enumerate(every):
        check_shard(replace(plan, shard=None if count == 1 else Shard(of, count)), Shard(rank, parallel.count))
        if digest != every[0][2:]:
            raise PlanError(
                f"the plans of rank 0 and rank {rank} decide differently: pass each rank the plan that it made in one "
                "calibration of all, with the same edits"
            )


def _decisions(plan: Plan) -> bytes:
    """SHA-256 of all that is the same on every process."""
    layers = [replace(l, input_scale=None, loss=None, sqnr_db=None, reason="") for l in plan.layers]
    said = (plan.recipe, plan.call, layers, plan.attention, sorted(plan.scales), sorted(plan.columns))
    return hashlib.sha256(repr(said).encode()).digest()
