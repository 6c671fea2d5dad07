"""dearest: the few linears that cost the logits most for their work stay in float (`Recipe.float_work`).

    q, k, v of one layer:  loss 8.5e-4, work 5      Recipe(float_work=0.1)      float: 8.5 times their share
    all others:            loss 11e-4,  work 95              ->                 quantized

Losses are far from even in trained models: in an OPT of 30 linears half of what INT8 costs is in five, which do 8 % of the
work. Linears that read one tensor share its rounding: they are one unit, in float or not. Units are taken dearest first, while
a unit costs several times its share and what the others cost is worth it.
"""

from __future__ import annotations

import math

from torch import fx

from sqcompile.passes.planning.budget import Unit, left_in_float, ranked
from sqcompile.passes.planning.feel import logits_of
from sqcompile.plan.edit import in_float
from sqcompile.plan.plan import Plan
from sqcompile.statistics.observe import Calibration

TIMES = 2.0  # its share of the work, that a unit costs at least
ENOUGH = 3e-4  # nats of KL divergence by the formula, which is 1.2 to 1.5 times as much on other text: below it no more stays in float


def leave_dearest(gm: fx.GraphModule, plan: Plan, calibration: Calibration) -> Plan:
    """The plan with what costs most for its work in float.

    The plan is as it was where nothing is known of what the logits feel, and where the recipe has a limit of its own
    (``max_degradation``).

    Args:
        gm: a traced graph.
        plan: of the graph.
        calibration: its statistics.
    """
    recipe = plan.recipe
    if not recipe.float_work or recipe.max_degradation is not None or not logits_of(gm):
        return plan
    if all(l.loss is None for l in plan.layers):
        return plan
    chosen = dearest(ranked(gm, plan, calibration), recipe.float_work)
    because = {
        name: f"its input {times:.2g} times its share of the INT8 work (float_work={recipe.float_work})"
        for u, times in chosen
        for name in u.names
    }
    return in_float(plan, {l.name: left_in_float(l, because[l.name], True) for l in plan.layers if l.name in because})


def dearest(units: list[Unit], most_work: float) -> list[tuple[Unit, float]]:
    """The units that stay in float, and how many times its share of the work each of them costs.

    Args:
        units: those first that cost most for their work.
        most_work: the largest share of the work, in [0, 1].
    """
    work, loss = sum(u.work for u in units), sum(u.loss for u in units)
    chosen: list[tuple[Unit, float]] = []
    rest, room = loss, most_work * work
    for u in units:
        # of an endless loss, which is no estimate, nothing can be said of the shares
        if not math.isfinite(loss) or rest <= ENOUGH or not u.work or (times := u.loss / loss * work / u.work) < TIMES:
            break
        if u.work <= room:
            chosen.append((u, times))
            rest, room = rest - u.loss, room - u.work
    return chosen
