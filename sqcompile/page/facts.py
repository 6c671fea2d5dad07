"""facts: what the page says first, in words and numbers: memory, speed, quality, what stayed in float."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sqcompile.page.findings import Finding, expected_loss, findings_of
from sqcompile.page.words import change, error_of, grown, percent, saved, size, told
from sqcompile.plan.entries import LayerPlan
from sqcompile.plan.evidence import Evidence, InputEvidence
from sqcompile.plan.names import collapse, refusal_lines
from sqcompile.plan.plan import Plan
from sqcompile.plan.said import attentions_in, decibels

if TYPE_CHECKING:
    from sqcompile.evaluation import Evaluation


_COSTS = re.compile(r"(costs|error is) (\d[\d.e+-]*) %")  # in the reasons of `budget`


@dataclass(frozen=True)
class Subject:
    """What a page is about.

    Attributes:
        plan: what was decided.
        gemms: expected speeds, a line each; empty where none is known.
        evaluation: what was measured; None for nothing.
        weight_bytes: of the compiled model; None where there is none.
        drawing: a page with the drawing of its graph, HTML; None where there is no graph.
        no_drawing: why there is none, in words.
        title: of the page; None for the model's class.
    """

    plan: Plan
    gemms: tuple[str, ...] = ()
    evaluation: Evaluation | None = None
    weight_bytes: int | None = None
    drawing: str | None = None
    no_drawing: str = ""
    title: str | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes of weights. ``linears`` are those that run in INT8; None where a size is not known."""

    linears: tuple[int, int] | None = None
    model: tuple[int, int] | None = None


@dataclass(frozen=True)
class Facts:
    """The overview.

    Attributes:
        cards: a few numbers in large print: (title, value, note).
        findings: what speaks for and against the model.
        floats: lines on what stayed in float, each with its reason.
        rows: (name, value) of the rest.
    """

    cards: list[tuple[str, str, str]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    floats: list[str] = field(default_factory=list)
    rows: list[tuple[str, str]] = field(default_factory=list)


def facts_of(subject: Subject) -> Facts:
    """The overview of a page."""
    plan, found = subject.plan, Facts()
    evidence = plan.evidence or Evidence()
    done = [l for l in plan.layers if l.quantized]
    left = [l for l in plan.layers if not l.quantized]
    dtype = plan.recipe.dtype.upper()
    found.cards.append((f"Linears in {dtype}", f"{len(done)} of {len(plan.layers)}", _kinds(done)))
    memory = memory_of(plan, subject.weight_bytes)
    if memory.model or memory.linears:
        before, after = memory.model or memory.linears or (0, 0)
        what = "all tensors of the model" if memory.model else "of the quantized linears"
        found.cards.append(("Memory of weights", change(before, after), f"{saved(before, after)}, {what}"))
    found.cards.append(_quality(plan, evidence, subject.evaluation))
    found.cards.append(_worst(done))
    found.cards.append(_speed(subject))
    found.findings.extend(findings_of(plan, evidence, subject.evaluation))
    found.floats.extend(refusal_lines(_in_common(left), [l.name for l in plan.layers]))
    found.floats.extend(collapse(f"{a.name}: attention: {a.reason}" for a in plan.attention if a.quantized == "none"))
    found.rows.extend(_rows(subject, evidence, memory))
    return found


def _in_common(left: list[LayerPlan]) -> list[tuple[str, str]]:
    """Names and reasons; of those that differ in what a linear costs alone, one reason with the largest cost."""
    kinds = [(l.name, _COSTS.sub(r"\1 up to @ %", l.reason), _COSTS.search(l.reason)) for l in left]
    largest: dict[str, float] = {}
    for _, kind, cost in kinds:
        if cost is not None:
            largest[kind] = max(largest.get(kind, 0.0), float(cost[2]))
    return [(name, kind.replace("@", f"{largest[kind]:.2g}") if cost else kind) for name, kind, cost in kinds]


def memory_of(plan: Plan, weight_bytes: int | None) -> Memory:
    """What weights take before and after, as far as the evidence or a compiled model tells."""
    evidence = plan.evidence or Evidence()
    itemsize = {name: i.itemsize for i in evidence.inputs for name in i.linears}
    seen: dict[str, LayerPlan] = {l.name.partition("#")[0]: l for l in plan.layers if l.quantized}
    known = [l for l in seen.values() if l.name in itemsize]
    if not known:
        return Memory()
    before = sum(math.prod(l.shape) * itemsize[l.name] for l in known)
    after = sum(math.prod(l.shape) + 4 * _scales(l, plan) for l in known)
    whole = None
    if evidence.bytes >= before:
        whole = evidence.bytes, weight_bytes if weight_bytes is not None else evidence.bytes - before + after
    return Memory((before, after), whole)


def _scales(l: LayerPlan, plan: Plan) -> int:
    per_tensor = (l.weight or plan.recipe.weight) == "per_tensor"
    return math.prod(l.shape[:-2]) if per_tensor else math.prod(l.shape[:-1])


def _kinds(done: list[LayerPlan]) -> str:
    folded = sum(l.smoothing == "folded" for l in done)
    multiplied = sum(l.smoothing == "multiplied" for l in done)
    rotated = sum(bool(l.rotation) for l in done)
    parts = [(folded, "smoothed in their weights"), (multiplied, "smoothed at run time"), (rotated, "rotated")]
    return ", ".join(f"{n} {what}" for n, what in parts if n) or "none smoothed"


def _quality(plan: Plan, evidence: Evidence, measured: Evaluation | None) -> tuple[str, str, str]:
    if measured is not None and measured.increase is not None:
        value = f"{told(measured.increase, '+.2f')} % ± {error_of(measured.increase_error, '.2f')}"
        return "Perplexity, measured", value, "beside the float model"
    if measured is not None and measured.perplexity is not None:
        return (
            "Perplexity, measured",
            f"{told(measured.perplexity, '.2f')} ± {error_of(measured.perplexity_error, '.2f')}",
            "of the quantized model",
        )
    if measured is not None and measured.relative_error is not None:
        value = (
            f"{told(100 * measured.relative_error, '.2f')} % ± {error_of(measured.relative_error_error, '.2f', 100)}"
        )
        return "Error of the outputs", value, "measured, relative to the float model's"
    if measured is not None and measured.top1 is not None:
        value = f"{told(measured.top1, '.2f')} % ± {error_of(measured.top1_error, '.2f')}"
        return "Same answer, measured", value, "how often the likeliest is the float model's"
    expected = expected_loss(plan)
    if expected is None:
        return "Quality", "not measured", "pass an evaluation on held-out data"
    how = "by gradients on the calibration sample, not measured"
    how += "" if expected.of_all else f"; of {expected.known} of {expected.linears} linears"
    if evidence.logits:
        return "Perplexity, expected", f"+{100 * grown(expected.loss):.2g} %", how
    return "Error of the outputs, expected", f"about {100 * math.sqrt(2 * expected.loss):.2g} %", how


def _worst(done: list[LayerPlan]) -> tuple[str, str, str]:
    known = [(l.sqnr_db, l.name) for l in done if l.sqnr_db is not None]
    if not known:
        return "Lowest SQNR of a linear", "not known", "the plan has no numbers of it"
    low, name = min(known)
    if low == math.inf:
        note = "of every linear whose SQNR is known"
    else:
        note = f"{name.removesuffix('.weight')}, an error of {percent(low)}"
    note += "" if len(known) == len(done) else f"; known of {len(known)} of {len(done)} linears"
    return "Lowest SQNR of a linear", decibels(low), note


def _speed(subject: Subject) -> tuple[str, str, str]:
    measured = subject.evaluation
    if measured is not None and measured.tokens_per_second is not None:
        value = f"{measured.tokens_per_second:,.0f} tokens/s"
        if measured.float_tokens_per_second:
            times = measured.tokens_per_second / measured.float_tokens_per_second
            return (
                "Speed, measured",
                f"{times:.2f}x",
                f"{value}, the float model {measured.float_tokens_per_second:,.0f}",
            )
        return "Speed, measured", value, "wall time"
    if subject.gemms:
        return "Speed", "expected", "by a table of such a machine, below"
    return "Speed", "not measured", "pass an evaluation"


def _rows(subject: Subject, evidence: Evidence, memory: Memory) -> Iterable[tuple[str, str]]:
    plan, measured = subject.plan, subject.evaluation
    yield "Model", evidence.model or "not known"
    if evidence.dtype:
        yield "Weights of linears in the float model", evidence.dtype
    if memory.linears:
        yield "Weights of the quantized linears", f"{size(memory.linears[0])} before, {size(memory.linears[1])} after"
    if memory.model:
        exact = "the compiled model's tensors" if subject.weight_bytes is not None else "by the plan"
        yield "Whole model", f"{size(memory.model[0])} before, {size(memory.model[1])} after ({exact})"
    tokens = max((i.tokens for i in evidence.inputs), default=0)
    if tokens:
        yield "Calibration", f"{tokens:,} tokens"
    if plan.attention:
        yield "Attention", attentions_in(plan.attention)
    if measured is not None:
        yield "Evaluation", f"{measured.compared}; {measured.windows:,} windows, {measured.tokens:,} predictions"
        for name, value, error in (
            ("Perplexity", measured.perplexity, measured.perplexity_error),
            ("Perplexity of the float model", measured.float_perplexity, measured.float_perplexity_error),
            ("KL divergence, nats", measured.kl, measured.kl_error),
            ("Top-1 agreement, %", measured.top1, measured.top1_error),
            ("Cosine", measured.cosine, measured.cosine_error),
        ):
            if value is not None:
                yield name, f"{told(value, '.4g')} ± {error_of(error, '.2g')}"
    if subject.no_drawing:
        yield "Graph", f"not drawn: {subject.no_drawing}"
    for line in subject.gemms:
        yield "Expected speed", line
    yield "Made with", evidence.versions or "not known"
    yield "Recipe", repr(plan.recipe)


def is_dynamic(plan: Plan, first: LayerPlan) -> bool:
    """Whether a static recipe leaves a linear's input a scale for each token."""
    return plan.recipe.activation == "per_tensor_static" and first.activation == "per_token"


def inputs_of(plan: Plan) -> tuple[InputEvidence, ...]:
    """The evidence that the plan has linears for."""
    shapes: dict[str, Any] = {l.name: l.shape for l in plan.layers}
    every = plan.evidence.inputs if plan.evidence is not None else ()
    return tuple(i for i in every if all(n in shapes and shapes[n][-1] == i.channels for n in i.linears))
