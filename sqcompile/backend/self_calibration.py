"""self_calibration: when a model without a plan has been observed often enough, and the plan that its calls make."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection, Hashable, Sequence

import torch

from sqcompile.backend.bound import Observed
from sqcompile.backend.decide import decide, measured
from sqcompile.backend.floats import PATIENCE
from sqcompile.backend.session import Session
from sqcompile.passes.planning.uses import first_use
from sqcompile.plan.recipe import resolve_recipe
from sqcompile.process.parallel import ALONE
from sqcompile.process.progress import stages
from sqcompile.process.ranks import together


def step(session: Session, observed: Observed, graphs: Sequence[Observed]) -> None:
    """Makes the session's plan if enough calls of the model have been observed, at the beginning of the next.

    The graph at hand must have run often enough. Other sizes, tasks and constants of the code make other graphs, so its
    linears count, too, in whichever graph they ran, once a call at most: each of them once more than that, since a prompt
    is not like the tokens after it; or one of them so often that calls were enough.

    Args:
        session: of the model; it has no plan.
        observed: the graph at hand.
        graphs: all that are observed of this model.
    """
    seen = session.seen.setdefault(threading.get_ident(), set())
    if observed in seen:  # a call runs each graph once at most
        _tear(session, seen)
        seen.clear()
    steps, own = session.options.calibration_steps, observed.observer.batches
    runs = [sum(o.observer.batches for o in graphs if name in o.names) for name in observed.names]
    if own < steps and min(runs) <= steps and max(runs) < PATIENCE * steps:
        seen.add(observed)
        return
    for others in session.seen.values():
        _tear(session, others)
    observers = [o.observer for o in graphs]
    for o in observers:
        o.stop()
    recipe = resolve_recipe(session.options.recipe)
    parallel = next((o.parallel for o in observers if o.parallel.count > 1), ALONE)
    with (
        together(parallel.count > 1, group=parallel.group),
        torch.inference_mode(False),
        stages(("plan",), session.options.progress) as enter,
    ):
        enter("plan")
        try:
            plan = decide(observers, recipe, own if own >= steps else max(runs))
            session.plan = measured(plan, observers, session.torn)
        finally:
            session.forget(compiled=False)  # where no plan came of it, later calls are observed anew


def _tear(session: Session, graphs: Collection[Hashable]) -> None:
    """Takes down what several graphs of one call read."""
    found = [o for o in graphs if isinstance(o, Observed)]
    uses = Counter(name for o in found for name in {first_use(l.name) for l in o.observer.linears})
    session.torn |= {name for name, count in uses.items() if count > 1}
