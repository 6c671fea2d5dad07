"""folds: the traced graph against the same graph with one site folded, with all of them, and with sets of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.debug.result import SiteError
from sqcompile.debug.run import FOLD, outputs, relative_error
from sqcompile.errors import CaptureError, PlanError, first_line
from sqcompile.passes.attention.chains import find_attentions
from sqcompile.passes.attention.head_sites import HeadSite, match_heads
from sqcompile.passes.ir.graph import get_tensor, nodes_by_name
from sqcompile.passes.ir.verify import verify
from sqcompile.passes.labels.match import Site, input_sites, match
from sqcompile.passes.rewrite.fold import fold
from sqcompile.plan.names import Names, site_labels
from sqcompile.plan.plan import Plan


@dataclass(frozen=True)
class Part:
    """One thing that can be folded alone.

    Attributes:
        name, label: see `SiteError`.
        site: what absorbs its scales; a `HeadSite` for those of attentions.
        scale: float64 [C], or [classes] of a `HeadSite`.
        drawn: whether the scales are no plan's.
    """

    name: str
    label: str
    site: Site | HeadSite
    scale: Tensor
    drawn: bool


def find_parts(gm: fx.GraphModule, plan: Plan) -> list[Part]:
    """Every site of a traced graph that can be folded, in graph order.

    A plan leaves a site alone where smoothing does not help, which may be because folding is wrong there: so such a site
    is folded all the same, by scales from 1/4 to 4. So are the attentions that the plan quantizes and does not smooth.

    Raises:
        PlanError: if the plan smooths what the graph does not have.
    """
    sites, refusals = match(gm)
    explicit = input_sites(refusals, {l.name for l in plan.layers if l.quantized})
    sites += [s for s in explicit if s.name in plan.scales]
    heads = _head_sites(gm, plan)
    _check(plan, {s.name: s.channels for s in sites}, {h.name: h.classes for h in heads})
    generator = torch.Generator().manual_seed(0)
    linears = [l.name for l in plan.layers]
    labels = [str(label) for label in site_labels([s.name for s in sites], linears)]
    parts = []
    for site, label in zip(sites, labels, strict=True):
        scale = plan.scales.get(site.name)
        free = torch.where(site.free, _drawn(site.channels, generator), 1.0) if scale is None else scale.double().cpu()
        parts.append(Part(site.name, label, site, free, scale is None))
    for head in heads:
        scale = plan.heads.get(f"{head.name}/scale")
        classes = _drawn(head.classes, generator) if scale is None else scale.double().cpu()
        parts.append(Part(head.name, _head_label(head, linears), head, classes, scale is None))
    order = {name: i for i, name in enumerate(nodes_by_name(gm))}
    return sorted(parts, key=lambda p: order[_producer(p.site)])


def compare_folds(
    gm: fx.GraphModule, plan: Plan, arguments: Sequence[Any], each: Callable[[list[Part]], Iterable[Part]]
) -> tuple[tuple[SiteError, ...], SiteError, tuple[SiteError, ...], torch.dtype]:
    """The errors of each site alone, of all together and of a smallest wrong set, and the dtype they are of.

    Args:
        gm: a traced graph; it is not changed.
        arguments: one for each of its placeholders.
        each: gives the parts one by one, and may tell the user.

    Raises:
        CaptureError: if the model returns nothing by which two graphs can be compared.
    """
    parts = find_parts(gm, plan)
    want, dtype = _reference(gm, arguments)
    error = partial(_error, gm, plan, arguments, want, dtype)
    errors = {p.name: error([p], p.name, p.label) for p in each(parts)}
    together = (
        error(parts, "all", f"all {len(parts)} sites") if parts else SiteError("all", "no site", 0.0, FOLD[dtype])
    )
    wrong: list[Part] = []
    if together.wrong and not any(e.wrong for e in errors.values()):
        found = smallest_wrong(len(parts), lambda which: error([parts[i] for i in which], "set", "").wrong)
        wrong = [parts[i] for i in found]
    return tuple(errors.values()), together, tuple(errors[p.name] for p in wrong), dtype


def smallest_wrong(count: int, wrong: Callable[[list[int]], bool]) -> list[int]:
    """A set out of ``range(count)`` that is wrong, none of whose members can be left out if more never is less wrong.

    Args:
        wrong: of a set in order; of all it must be True, and of none it counts as False.
    """
    needed: list[int] = []
    end = count  # needed and all before end are wrong
    while end and not (needed and wrong(needed)):
        right = 0  # needed and all before it are not
        while end - right > 1:
            middle = (right + end) // 2
            if wrong([*range(middle), *needed]):
                end = middle
            else:
                right = middle
        end -= 1
        needed.insert(0, end)
    return needed


def _reference(gm: fx.GraphModule, arguments: Sequence[Any]) -> tuple[list[Tensor], torch.dtype]:
    """What the traced graph gives, and the widest dtype it runs in: some operators and devices have no float64."""
    error: Exception | None = None
    for dtype in (torch.float64, torch.float32, _narrowest(gm)):
        try:
            want = outputs(gm, arguments, dtype)
            break
        except Exception as e:
            error = e
    else:
        assert error is not None
        raise CaptureError(
            f"the captured graph does not run on these inputs: {type(error).__name__}: {first_line(error)}. Run the model "
            "itself on them to see why"
        ) from error
    if not any(bool(t.isfinite().any()) for t in want):
        raise CaptureError(
            "the model returns no finite number for these inputs, by which a folded graph could be compared: pass inputs "
            "for which it does, or the submodule that holds the layers"
        )
    return want, dtype


def _error(
    gm: fx.GraphModule,
    plan: Plan,
    arguments: Sequence[Any],
    want: list[Tensor],
    dtype: torch.dtype,
    parts: list[Part],
    name: str,
    label: str,
) -> SiteError:
    drawn = len(parts) == 1 and parts[0].drawn
    try:
        got = outputs(folded(gm, plan, parts), arguments, dtype)
        worst = max(relative_error(y, x) for y, x in zip(got, want, strict=True))
    except Exception as e:  # of one fold, which is what is asked for
        return SiteError(name, label, math.inf, FOLD[dtype], drawn, f"{type(e).__name__}: {first_line(e)}")
    return SiteError(name, label, worst, FOLD[dtype], drawn)


def folded(gm: fx.GraphModule, plan: Plan, parts: Sequence[Part]) -> fx.GraphModule:
    """The graph with some parts folded, and no other; nor shifted, as W c is kept in float32, and errors are of float64."""
    sites = {p.site.name: p.site for p in parts if isinstance(p.site, Site)}
    heads = {p.site.name: p.site for p in parts if isinstance(p.site, HeadSite)}
    only = replace(
        plan,
        scales={p.name: p.scale for p in parts if p.name in sites},
        heads={f"{p.name}/scale": p.scale for p in parts if p.name in heads},
        layers=tuple(replace(l, smoothing="none") for l in plan.layers),
        shifts={},
    )
    return verify(fold(gm, [*sites.values()], only, [*heads.values()]), "folded")


def _head_sites(gm: fx.GraphModule, plan: Plan) -> list[HeadSite]:
    """Of the attentions that the plan smooths, and of the others that it quantizes."""
    quantized = {a.name: a.smoothing == "folded" for a in plan.attention if a.quantized != "none"}
    found = [a for a in find_attentions(gm) if a.name in quantized and not a.refused] if quantized else []
    smoothed, others = (match_heads(gm, [a for a in found if quantized[a.name] is s])[0] for s in (True, False))
    return smoothed + others


def _check(plan: Plan, sites: dict[str, int], heads: dict[str, int]) -> None:
    for name, s in plan.scales.items():
        if sites.get(name) != len(s):
            raise PlanError(f"the plan smooths {name!r}, which this model does not have: calibrate this model")
    for name, s in plan.heads.items():
        attention, _, what = name.rpartition("/")
        if what == "scale" and heads.get(attention) != len(s):
            raise PlanError(
                f"the plan smooths the attention {attention!r}, which this model lacks: calibrate this model"
            )


def _producer(site: Site | HeadSite) -> str:
    return site.producer if isinstance(site, Site) else site.queries[0][0].producer


def _head_label(head: HeadSite, linears: list[str]) -> str:
    """ "layers.0.self_attn: q_proj × s, k_proj × 1/s"."""
    names = Names({*linears, *(s.name for s, _ in (*head.queries, *head.keys))})
    queries, keys = (
        ", ".join(names.producer(s.name, names.block([s.name])) for s, _ in side) for side in (head.queries, head.keys)
    )
    return f"{head.name}: {queries} × s, {keys} × 1/s"


def _drawn(count: int, generator: torch.Generator) -> Tensor:
    """Scales from 1/4 to 4, float64 [count]."""
    return 2 ** (4 * torch.rand(count, generator=generator, dtype=torch.float64) - 2)


def _narrowest(gm: fx.GraphModule) -> torch.dtype:
    """Of the floating dtypes of a graph's parameters."""
    dtypes = {get_tensor(gm, str(n.target)).dtype for n in gm.graph.find_nodes(op="get_attr")}
    return max((d for d in dtypes if d in FOLD), key=lambda d: torch.finfo(d).eps, default=torch.float32)
