"""The rewrites of a traced graph, top to bottom: fold -> insert_qdq -> lower. Each stage is verified, and printed if asked.

What comes before, trace -> calibrate -> match -> plan, is in `api`; what comes after, emit, in `compiled`.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from torch import fx

from sqcompile.errors import PlanError, StageError
from sqcompile.kernels.targets import Target
from sqcompile.passes.attention.chains import Attention, find_attentions
from sqcompile.passes.attention.head_sites import match_heads
from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import Linear, find_linears, nodes_by_name, value
from sqcompile.passes.ir.text import show_stage
from sqcompile.passes.ir.verify import STAGES, verify
from sqcompile.passes.labels.match import input_sites, match
from sqcompile.passes.labels.shiftable import shiftable
from sqcompile.passes.lowering.integer_products import integer_products
from sqcompile.passes.lowering.lower import lower
from sqcompile.passes.planning.finite import check_vectors
from sqcompile.passes.planning.split import split_attention, split_sites
from sqcompile.passes.planning.uses import as_used
from sqcompile.passes.rewrite.fold import fold
from sqcompile.passes.rewrite.insert_qdq import insert_qdq, quantize_weights
from sqcompile.passes.rewrite.weight_store import Shared
from sqcompile.plan.plan import Plan
from sqcompile.plan.shards import check_shard, shard_of
from sqcompile.process.progress import Enter, silent

log = logging.getLogger("sqcompile")


def rewrite(
    traced: fx.GraphModule,
    plan: Plan,
    until: str,
    shared: Shared | None = None,
    enter: Enter = silent,
    shown: bool = True,
    target: Target | None = None,
    lazy: bool = False,
) -> fx.GraphModule:
    """The rewrites in their order, up to a stage: "traced", "folded", "quantized" or "lowered".

    With ``shared``, the graph is one of several of a model: it may lack sites of the plan, and shares INT8 weights.
    ``target`` is what is lowered for, None for the devices of the graph. ``enter`` is told which rewrite begins. ``shown`` is whether SQCOMPILE_SHOW=1 prints the stages.
    With ``lazy``, the quantized stage has INT8 weights that are made when they are asked for (``About.lazy``).

    Raises:
        StageError: for another stage.
        PlanError: for a plan that is not of this graph.
    """
    if until not in STAGES:
        raise StageError(f"no stage {until!r}: the stages are {', '.join(STAGES)}")
    show = show_stage if shown else (lambda *_: None)
    gm = verify(traced, "traced")
    text = show(gm, "traced", None)
    if until == "traced":
        return gm
    enter("fold")
    linears = find_linears(gm)
    every = find_attentions(gm) if any(a.quantized != "none" for a in plan.attention) else []
    attentions = [a for a in every if not a.refused]
    if shared is not None:
        plan = split_attention([a.name for a in attentions], as_used(plan, linears, every))
    if shared is None:  # else the graph may be one of a sharded model that reads no shard
        check_shard(plan, shard_of(about(gm).parallel))
    check_plan(gm, plan, linears, attentions)
    sites, refusals = match(gm)
    norms = shiftable(gm, sites) if plan.shifts else []
    quantized = {l.name for l in plan.layers if l.quantized}
    sites = sites + input_sites(refusals, quantized)
    if shared is not None:
        sites, plan = split_sites(linears, sites, plan)
    check_vectors(gm, [l for l in linears if l.name in quantized])
    folded = {a.name for a in plan.attention if a.quantized != "none" and a.smoothing == "folded"}
    heads, _ = match_heads(gm, [a for a in attentions if a.name in folded])
    gm = verify(fold(gm, sites, plan, heads, norms, shared), "folded")
    text = show(gm, "folded", text)
    if until == "folded":
        return gm
    enter("insert_qdq")
    gm = verify(insert_qdq(gm, plan, shared, lazy), "quantized")
    text = show(gm, "quantized", text)
    if until == "quantized":
        return gm if lazy else quantize_weights(gm)
    enter("lower")
    gm.graph.owning_module = None  # a cycle, which would keep the plain weights until garbage is collected
    handed_over = [gm]
    del gm  # lower frees each plain int8 weight as it packs it, which no other reference may prevent
    gm = verify(lower(handed_over.pop(), shared, target), "lowered")
    if log.isEnabledFor(logging.DEBUG):
        kernels = Counter(n.target.name().partition("::")[2] for n in gm.graph.nodes if _is_ours(n.target))
        on = "this machine" if target is None else target.name
        log.debug("lowered for %s: %s", on, ", ".join(f"{count} x {name}" for name, count in kernels.items()))
    show(gm, "lowered", text)
    return gm


def on_trial(traced: fx.GraphModule, plan: Plan, shared: Shared | None = None) -> fx.GraphModule:
    """The quantized stage, for running it operation by operation on a few calls: what it gives, as fast as may be."""
    return integer_products(rewrite(traced, plan, "quantized", shared, shown=False, lazy=True))


def _is_ours(target: Any) -> bool:
    return getattr(target, "namespace", "") == "sqcompile"


def check_plan(gm: fx.GraphModule, plan: Plan, linears: list[Linear], attentions: list[Attention]) -> None:
    """Raises PlanError where a plan has not the linears of a traced graph, or not the attentions it quantizes."""
    planned = {l.name: l.shape for l in plan.layers}
    for l in linears:
        if planned.get(l.name) != l.shape:
            shape = " x ".join(map(str, l.shape))
            raise PlanError(f"the plan has no linear {l.name!r} of shape {shape}: calibrate this model")
    have = {a.name: a for a in attentions}
    nodes = nodes_by_name(gm)
    for p in plan.attention:
        if p.quantized == "none":
            continue
        a = have.get(p.name)
        if a is None or (a.heads, a.groups, a.width) != p.shape:
            raise PlanError(
                f"the plan quantizes the attention {p.name!r}, which this model lacks: calibrate this model"
            )
        step = plan.heads.get(f"{p.name}/value_scale")
        if step is not None and step.shape[-1] != value(nodes[a.v]).shape[-1]:
            raise PlanError(f"the plan's values of the attention {p.name!r} are of another width: calibrate this model")
