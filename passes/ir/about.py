"""about: what is known of a graph beside its nodes, as one typed record in ``gm.meta``.

    gm.meta -> {"about": About(fake_mode=..., aliases={"lm_head.weight": (...)}, captured=..., target=x86-vnni, ...)}

Who captures a graph makes the record (`sqcompile.capture.trace`, `sqcompile.backend.capture`). A copy of the graph has a
copy of it, over the same memories; a pass writes to the record of a graph that is its own. `verify` checks it.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from sqcompile.process.parallel import ALONE, Parallel

if TYPE_CHECKING:
    from sqcompile.capture.captured import Captured
    from sqcompile.kernels.targets import Target
    from sqcompile.passes.rewrite.weight_store import Lazy, Merged
    from sqcompile.pytorch.core import FakeTensorMode

_KEY = "about"
Sizes = dict[Any, int]  # of each free symbol


@dataclass
class About:
    """What is known of a graph.

    Attributes:
        fake_mode: what all recorded values belong to, with the conditions of their symbolic sizes.
        aliases: all qualified names of each tensor of the model, by the one that the graph uses.
        captured: which calls the graph serves; None for a graph of Dynamo, which guards its calls itself.
        out_spec: the pytree of what the model returns; None as above.
        arguments: of a graph of Dynamo: which of its arguments the placeholders are.
        updates: of a graph of Dynamo: the placeholder that each of the first outputs is written back to.
        names: of a graph of Dynamo: the arguments' own names, by placeholder; None for another graph.
        sizes: two choices of sizes that a graph of Dynamo is known to serve.
        conditions: what its sizes fulfil, where that is known for good; else it is asked of ``fake_mode``.
        parallel: the processes that hold the model together, each of which has a graph like this one.
        whole: by linear, scales of the weights of which this process has a part, under the plan at hand: so that only the first
            graph asks the other processes. None while plans are tried.
        target: what it was lowered for; None for the devices of its tensors, or before it is.
        lazy: weights to be quantized, or to be packed, by the name of what holds their place. They keep float weights alive.
        merged: shared weights that the lowered graph holds: they live as long as it.
        recorded: memory of `record`: values by call, of which no graph has one twice.
        taken: how many of them this graph has, and those that it is a copy of.
        values: memory of `labels.interpreter.values_at`.
        found: memory of analyses (`form.once`), of this graph alone: answers hold nodes, and so the graph and its tensors.
    """

    fake_mode: FakeTensorMode
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    captured: Captured | None = None
    out_spec: Any = None
    arguments: list[int] = field(default_factory=list)
    updates: list[str] = field(default_factory=list)
    names: dict[str, str] | None = None
    sizes: tuple[Sizes, Sizes] | None = None
    conditions: list[Any] | None = None
    parallel: Parallel = ALONE
    whole: dict[str, Tensor] | None = None
    target: Target | None = None
    lazy: dict[str, Lazy] = field(default_factory=dict)
    merged: list[Merged] = field(default_factory=list)
    recorded: dict[Hashable, list[Tensor]] = field(default_factory=dict)
    taken: dict[Hashable, int] = field(default_factory=dict)
    values: dict[Hashable, Any] = field(default_factory=dict)
    found: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def calls(self) -> Captured:
        """The calls that a captured model's graph serves; Dynamo's graphs have none."""
        assert self.captured is not None
        return self.captured


def about(gm: fx.GraphModule) -> About:
    """The record of a graph.

    Raises:
        KeyError: for a graph that sqcompile has not captured.
    """
    return gm.meta[_KEY]


def describe_as(gm: fx.GraphModule, record: About) -> None:
    """Gives a graph its record."""
    gm.meta[_KEY] = record


def attached(record: About, **changes: Any) -> About:
    """The record of a graph that gets tensors of its own: memories of calls are shared, what belongs to tensors is not."""
    return replace(record, lazy={}, merged=[], found={}, taken=dict(record.taken), **changes)


def copy_about(old: fx.GraphModule, new: fx.GraphModule) -> None:
    """Gives ``new`` a copy of the record of ``old``; memories of calls are shared, of what is in a graph not."""
    record = about(old)
    describe_as(
        new, replace(record, lazy=dict(record.lazy), merged=list(record.merged), found={}, taken=dict(record.taken))
    )
