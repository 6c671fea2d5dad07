"""Sites dealt out among ranks: every one sees the choices that it would see in one process, and the plan is the same bytes."""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import tiny_lm
from families import build, token_ids

from sqcompile import Recipe
from sqcompile.capture.call_spec import to_spec
from sqcompile.capture.inputs import as_call
from sqcompile.capture.trace import trace
from sqcompile.passes.ir.graph import find_linears
from sqcompile.passes.labels.match import input_sites, match
from sqcompile.passes.planning import candidates, weight_outliers
from sqcompile.passes.planning.choose import choose
from sqcompile.passes.planning.feel import feel
from sqcompile.passes.planning.sharing import Sharing, help_first, owners, shared
from sqcompile.plan.recipe import resolve_recipe
from sqcompile.process.ranks import Ranks
from sqcompile.statistics.observe import calibrate

WHY = "for a test"


class Thread(Ranks):
    """A rank that is a thread, and gives bytes to the others by queues."""

    shares = True

    def __init__(self, rank: int, count: int, queues: dict[tuple[int, int], queue.Queue[bytes]]) -> None:
        self.rank, self.count, self.queues = rank, count, queues

    def from_first(self, data: bytes) -> bytes:
        if not self.first:
            return self.queues[0, self.rank].get(timeout=60)
        for rank in range(1, self.count):
            self.queues[0, rank].put(data)
        return data

    def to_first(self, data: bytes) -> Iterator[bytes]:
        if self.first:
            yield from [self.queues[rank, 0].get(timeout=60) for rank in range(1, self.count)]
        else:
            self.queues[self.rank, 0].put(data)


def known(family: str, recipe: Recipe, **config: Any) -> tuple[Any, ...]:
    """A graph, what is in it, its statistics, and what the outputs feel; ``config``: of a causal model, beside its own."""
    model, call = build(family)
    if config:
        model = tiny_lm(family, **config)
    gm = trace(model, as_call(model, call))
    sites, refusals = match(gm)
    batches = [{**call, "input_ids": token_ids(seed=seed)} for seed in (1, 2)]
    with torch.no_grad():
        statistics = calibrate(gm, model, batches)
        felt = feel(gm, sites, refusals, statistics, recipe)
    return gm, sites, refusals, statistics, felt, to_spec(as_call(model, call))


@pytest.mark.parametrize(
    ("family", "recipe", "count"),
    [
        ("llama", resolve_recipe("default"), 2),
        ("opt", resolve_recipe("O3"), 3),
        ("qwen2_moe", Recipe("auto", rotate="auto", activation="per_tensor_static"), 2),
        # a linear in float that reads what linears with static scales read
        ("llama", Recipe("auto", activation="per_tensor_static", skip=("*.q_proj",)), 2),
        ("llama", Recipe((0.3, 0.5, 0.7), weight="per_tensor", rotate="auto"), 2),
        ("llama of many layers", Recipe((0.3, 0.7), rotate="auto"), 2),
    ]
)  # fmt: skip
@torch.no_grad()
def test_the_plan_is_that_of_one_process(family, recipe, count, monkeypatch):
    """With smoothing, without it, and where weights are lost, so that it is chosen anew."""
    config = {"num_hidden_layers": 8} if "of many layers" in family else {}
    gm, sites, refusals, statistics, felt, spec = known(family.partition(" ")[0], recipe, **config)
    tried: Counter[tuple[str, str]] = Counter()
    best = candidates.best
    monkeypatch.setattr(
        candidates, "best", lambda c, s, *a: tried.update([(threading.current_thread().name, s.name)]) or best(c, s, *a)
    )
    lose = find_linears(gm)[2].name
    real = weight_outliers.lost

    def plans(sharing: Any) -> Iterator[bytes]:
        for unsmoothed, lost in ((None, {}), (WHY, {}), (None, {lose: WHY})):
            how = {"unsmoothed": unsmoothed, "felt": felt, "lost": lost, "sharing": sharing}
            yield choose(gm, sites, refusals, statistics, recipe, spec, **how).encoded()
        monkeypatch.setattr(weight_outliers, "lost", lambda c, l: WHY if l.name == lose else real(c, l))
        yield choose(gm, sites, refusals, statistics, recipe, spec, felt=felt, sharing=sharing).encoded()
        monkeypatch.setattr(weight_outliers, "lost", real)

    want = [*plans(None)]
    sites_of_one = Counter(name for _, name in tried.elements())
    tried.clear()
    queues: dict[tuple[int, int], queue.Queue[bytes]] = {
        (a, b): queue.Queue() for a in range(count) for b in range(count)
    }
    helped: list[Any] = []

    def helps(rank: int) -> None:
        with torch.no_grad():
            helped.append(help_first(gm, sites, refusals, recipe, Thread(rank, count, queues)))

    threads = [threading.Thread(target=helps, args=(rank,), name=f"{rank}") for rank in range(1, count)]
    for thread in threads:
        thread.start()
    sharing = shared(Sharing(gm, sites, refusals, statistics, recipe, felt, Thread(0, count, queues)))
    assert sharing is not None
    found = [*plans(sharing)]
    plan = choose(gm, sites, refusals, statistics, recipe, spec, felt=felt, sharing=sharing)
    sharing.end(plan)
    for thread in threads:
        thread.join(60)
    assert found == want and len(set(want)) > 2
    assert [p.encoded() for p in helped] == [plan.encoded()] * (count - 1) and plan.encoded() == want[0]
    by = {name: {n for t, n in tried if t == name} for name, _ in tried}
    assert len(by) == count and sum(map(len, by.values())) == len(sites_of_one)  # each site in one of them


@pytest.mark.parametrize("family", ["llama", "opt", "qwen2_moe", "bert", "t5"])
def test_sites_that_share_a_linear_are_of_one_rank_and_all_have_some(family):
    model, call = build(family)
    gm = trace(model, as_call(model, call))
    (sites, refusals), linears = match(gm), find_linears(gm)
    of_node = {l.node: l.name for l in linears}
    for count in (1, 2, 3):
        found = owners(linears, sites, refusals, count)
        assert found.keys() == {l.name for l in linears} and set(found.values()) == set(range(count))
        for site in [*sites, *input_sites(refusals, set(found))]:
            names = {l.name for l, _ in site.balance} | ({of_node[site.producer]} if site.kind == "linear" else set())
            assert len({found[name] for name in names}) == 1
        load = [sum(l.in_features * l.out_features for l in linears if found[l.name] == rank) for rank in range(count)]
        assert min(load) > 0


def test_what_raises_on_the_first_rank_is_raised_when_the_others_have_been_heard():
    """Else they would be at another step than rank 0, which may go on."""
    gm, sites, refusals, statistics, felt, spec = known("llama", recipe := Recipe(0.5))
    queues: dict[tuple[int, int], queue.Queue[bytes]] = {(a, b): queue.Queue() for a in (0, 1) for b in (0, 1)}
    thread = threading.Thread(target=help_first, args=(gm, sites, refusals, recipe, Thread(1, 2, queues)))
    thread.start()
    sharing = shared(Sharing(gm, sites, refusals, statistics, recipe, felt, Thread(0, 2, queues)))
    with pytest.MonkeyPatch.context() as m, torch.no_grad():
        own = Sharing.own
        m.setattr(Sharing, "own", lambda self, asked: own(self, asked) if self.ranks.rank else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            choose(gm, sites, refusals, statistics, recipe, spec, felt=felt, sharing=sharing)
    with torch.no_grad():
        plan = choose(gm, sites, refusals, statistics, recipe, spec, felt=felt, sharing=sharing)
    sharing.end(plan)
    thread.join(60)
    assert not thread.is_alive()
