"""sharing: the ranks of a process group choose for the sites of a graph together. Rank 0 makes the plan, the others help it.

    sites: {q,k,v}  v->o  {gate,up}  up->down  {q,k,v}'  v->o'  ...
    parts: [     part 0  ][      part 1      ][    part 2    ]          rank = the part's, so that all have like much

What is chosen for a site changes what others cost that share a linear with it, and none else. Sites that hang together by
linears are a part, which one rank chooses for in the order of the graph. So every site sees the choices that it would see in
one process, and the plan is the same bytes.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, fx

from sqcompile.passes.ir.graph import Linear, find_linears, nodes_by_name, value
from sqcompile.passes.labels.match import Refusal, Site, input_sites
from sqcompile.passes.planning import weight_outliers
from sqcompile.passes.planning.candidates import Best, Look, each_best, to_look_at
from sqcompile.passes.planning.choice import Choice, Known
from sqcompile.passes.planning.error import Chooser
from sqcompile.passes.planning.feel import Felt, Reads
from sqcompile.plan.plan import Plan
from sqcompile.plan.recipe import Recipe
from sqcompile.process.ranks import Ranks
from sqcompile.statistics.input_stats import InputStats
from sqcompile.statistics.observe import Calibration

_AT_ONCE = 2**23  # bytes that are sent at once, or the largest tensor
_STATISTICS = [f.name for f in fields(InputStats) if f.name != "count"]
_READS = [f.name for f in fields(Reads)]


@dataclass(frozen=True)
class Asked:
    """What each rank does with its sites.

    Attributes:
        floats: linears that stay in float, and why.
        unsmoothed: why nothing is smoothed; None for the recipe's own choice.
        first: whether it is a first look at each site by itself.
        look: what was decided of all sites; None before, or where nothing is.
    """

    floats: dict[str, str]
    unsmoothed: str | None
    first: bool
    look: Look | None


Answer = tuple[dict[str, Best], dict[str, str]]  # by site what is best, and by linear why its weight is lost


@dataclass(eq=False)
class Sharing:
    """What a rank knows to choose by.

    Attributes:
        gm, sites, refusals: a traced graph and what `match` found in it.
        calibration, felt: of all linears on rank 0, and else of the rank's own ones.
        recipe: the user's choices.
        ranks: the processes.
        known: by what this one did before.
    """

    gm: fx.GraphModule
    sites: Sequence[Site]
    refusals: list[Refusal]
    calibration: Calibration
    recipe: Recipe
    felt: Felt | None
    ranks: Ranks
    known: Known = field(default_factory=Known)

    @functools.cached_property
    def linears(self) -> list[Linear]:
        return find_linears(self.gm)

    @functools.cached_property
    def owner(self) -> dict[str, int]:
        return owners(self.linears, self.sites, self.refusals, self.ranks.count)

    def best(self, asked: Asked) -> Answer:
        """What all ranks find; rank 0 asks them."""
        look = asked.look
        told = None if look is None else [look.rotations, sorted(look.costly)]
        self.ranks.from_first(json.dumps([asked.floats, asked.unsmoothed, asked.first, told]).encode())
        error: Exception | None = None
        try:
            best, lost = self.own(asked)
        except Exception as e:  # when the others have been heard: who tries something may go on without it
            error, best, lost = e, {}, {}
        devices = {
            s.name: self.calibration.inputs[s.balance[0][0].name].absmax.device for s in self._sites(asked.floats)
        }
        for data in self.ranks.to_first(b""):
            more, also = _decoded(data, devices)
            best, lost = best | more, lost | also
        if error is not None:
            raise error
        return {s.name: best[s.name] for s in self._sites(asked.floats) if s.name in best}, lost

    def own(self, asked: Asked) -> Answer:
        """What this rank finds for its sites, and of its linears."""
        how = self.gm, self.calibration, self.recipe, asked.unsmoothed, self.felt, self.known, asked.floats
        chooser = Chooser(*how)
        every = self._sites(asked.floats)
        some = to_look_at(chooser, every, asked.floats) if asked.first else every
        mine = [s for s in some if self.owner[s.balance[0][0].name] == self.ranks.rank]
        best = each_best(chooser, mine, asked.floats, asked.look, asked.first)
        linears = [] if asked.first else [l for l in self.linears if self.owner[l.name] == self.ranks.rank]
        return best, weight_outliers.all_lost(chooser, linears, asked.floats)

    def _sites(self, floats: Mapping[str, str]) -> list[Site]:
        return [*self.sites, *input_sites(self.refusals, {l.name for l in self.linears} - set(floats))]

    def teach(self) -> None:
        """Tells the other ranks what rank 0 knows."""
        groups: dict[int, list[str]] = {}
        for name, stats in self.calibration.inputs.items():
            groups.setdefault(id(stats), []).append(name)
        every = [(names, self.calibration.inputs[names[0]]) for names in groups.values()]
        tensors = {f"input {i} {k}": getattr(s, k) for i, (_, s) in enumerate(every) for k in _STATISTICS}
        meta: dict[str, Any] = {"inputs": [[names, s.count] for names, s in every], "felt": None}
        if self.felt is not None:
            felt_by: dict[Reads, list[str]] = {}
            for name, reads in self.felt.reads.items():
                felt_by.setdefault(reads, []).append(name)
            tensors |= {f"reads {i} {k}": getattr(r, k) for i, r in enumerate(felt_by) for k in _READS}
            tensors |= {f"output {name}": x for name, x in self.felt.outputs.items()}
            meta["felt"] = [[*felt_by.values()], self.felt.why, sorted(self.felt.idle)]
        self.ranks.from_first(json.dumps(meta).encode())
        for part in _parts(tensors):
            self.ranks.from_first(safetensors.torch.save({k: x.cpu().contiguous() for k, x in part.items()}))
        self.ranks.from_first(b"")

    def end(self, plan: Plan) -> None:
        """Tells the other ranks the plan."""
        self.ranks.from_first(b"")
        self.ranks.from_first(plan.encoded())


def shared(sharing: Sharing) -> Sharing | None:
    """What rank 0 asks the others by, who wait in `help_first`; None where there are none."""
    if not sharing.ranks.shares:
        return None
    sharing.teach()
    return sharing


def help_first(
    gm: fx.GraphModule, sites: Sequence[Site], refusals: list[Refusal], recipe: Recipe, ranks: Ranks
) -> Plan:
    """On a rank other than the first: chooses for its sites as often as rank 0 asks, and returns the plan that it made."""
    owner = owners(find_linears(gm), sites, refusals, ranks.count)
    known = _taught(gm, {name for name, rank in owner.items() if rank == ranks.rank}, ranks)
    sharing = Sharing(gm, sites, refusals, known[0], recipe, known[1], ranks)
    while data := ranks.from_first(b""):
        floats, unsmoothed, first, look = json.loads(data)
        asked = Asked(floats, unsmoothed, first, None if look is None else Look(look[0], frozenset(look[1])))
        [*ranks.to_first(_encoded(*sharing.own(asked)))]
    return Plan.decoded(ranks.from_first(b""))


def owners(linears: Sequence[Linear], sites: Sequence[Site], refusals: list[Refusal], count: int) -> dict[str, int]:
    """By linear, the rank that chooses for its sites: the largest parts first, each to the rank that has least to do."""
    part = {l.name: l.name for l in linears}
    of_node = {l.node: l.name for l in linears}

    def root(name: str) -> str:
        while part[name] != name:
            name = part[name]
        return name

    for site in [*sites, *input_sites(refusals, {l.name for l in linears})]:
        names = [l.name for l, _ in site.balance]
        if site.kind == "linear":  # its rows are divided by s
            names.append(of_node[site.producer])
        for name in names[1:]:
            part[root(name)] = root(names[0])
    work = dict.fromkeys(part, 0)
    for l in linears:
        work[root(l.name)] += l.in_features * l.out_features * (l.experts or 1)
    load, of_part = [0] * count, dict[str, int]()
    for name in sorted(filter(work.get, work), key=lambda name: -work[name]):
        of_part[name] = load.index(min(load))
        load[of_part[name]] += work[name]
    return {l.name: of_part[root(l.name)] for l in linears}


def _parts(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    part: dict[str, Tensor] = {}
    for name, x in tensors.items():
        if part and sum(t.nbytes for t in part.values()) + x.nbytes > _AT_ONCE:
            yield part
            part = {}
        part[name] = x
    yield part


def _taught(gm: fx.GraphModule, own: set[str], ranks: Ranks) -> tuple[Calibration, Felt | None]:
    """What rank 0 knows of this rank's own linears."""
    nodes, reads_of = nodes_by_name(gm), {l.name: l.x for l in find_linears(gm)}
    meta = json.loads(ranks.from_first(b""))
    read_by = meta["felt"][0] if meta["felt"] is not None else []
    names = {f"input {i}": names for i, (names, _) in enumerate(meta["inputs"])}
    names |= {f"reads {i}": found for i, found in enumerate(read_by)}
    tensors: dict[str, Tensor] = {}
    while data := ranks.from_first(b""):
        for key, x in safetensors.torch.load(data).items():
            readers = [key.removeprefix("output ")] if key.startswith("output ") else names[key.rpartition(" ")[0]]
            if own.intersection(readers):
                tensors[key] = x.to(value(nodes[reads_of[readers[0]]]).device)
    inputs: dict[str, InputStats] = {}
    for i, (found, count) in enumerate(meta["inputs"]):
        if own.intersection(found):
            stats = InputStats(**{k: tensors[f"input {i} {k}"] for k in _STATISTICS}, count=count)
            inputs |= dict.fromkeys(filter(own.__contains__, found), stats)
    if meta["felt"] is None:
        return Calibration(inputs, 0), None
    reads: dict[str, Reads] = {}
    for i, found in enumerate(read_by):
        if own.intersection(found):
            both = Reads(**{k: tensors[f"reads {i} {k}"] for k in _READS})
            reads |= dict.fromkeys(filter(own.__contains__, found), both)
    outputs = {k.removeprefix("output "): x for k, x in tensors.items() if k.startswith("output ")}
    return Calibration(inputs, 0), Felt(reads, outputs, meta["felt"][1], frozenset(meta["felt"][2]))


def _encoded(best: Mapping[str, Best], lost: Mapping[str, str]) -> bytes:
    tensors = {str(i): b.choice.scales.cpu() for i, b in enumerate(best.values()) if b.choice.scales is not None}
    found = [
        [
            name,
            [b.choice.alpha, b.choice.block, b.choice.dynamic],
            [*b.costs.items()],
            None if b.curve is None else [b.curve[0], [*b.curve[1].items()]],
            b.loss,
        ]
        for name, b in best.items()
    ]
    return safetensors.torch.save(tensors, {"found": json.dumps([found, lost])})


def _decoded(data: bytes, devices: Mapping[str, torch.device]) -> Answer:
    size = int.from_bytes(data[:8], "little")
    found, lost = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["found"])
    scales, best = safetensors.torch.load(data), {}
    for i, (name, (alpha, block, dynamic), costs, curve, loss) in enumerate(found):
        s = scales.get(str(i))
        choice = Choice(None if s is None else s.to(devices[name]), alpha, block, dynamic)
        tried = None if curve is None else (curve[0], {tuple(key): cost for key, cost in curve[1]})
        best[name] = Best(choice, dict(map(tuple, costs)), tried, loss)
    return best, lost
