"""facts: what the page says first, in words and numbers: memory, speed, quality, what stayed in float."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from sqcompile.plan.entries import LayerPlan
from sqcompile.plan.evidence import Evidence, InputEvidence
from sqcompile.plan.names import refusal_lines
from sqcompile.plan.plan import Plan

if TYPE_CHECKING:
    from sqcompile.evaluation import Evaluation

Level = Literal["good", "look", "bad"]

LOW_DB, VERY_LOW_DB = 20.0, 10.0  # a linear whose error has a tenth, or a third, of its output's size
SMALL_LOSS, LARGE_LOSS = 1.0, 3.0  # percent of perplexity
CLIPS = 1e-3  # share of values


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
class Finding:
    """One sentence on whether to trust the model; "look" and "bad" ask for somebody's eyes."""

    level: Level
    text: str


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
        saved = f"{100 * (1 - after / before):.0f} % less, {what}" if before else what
        found.cards.append(("Memory of weights", change(before, after), saved))
    found.cards.append(_quality(plan, evidence, subject.evaluation))
    found.cards.append(_worst(done))
    found.cards.append(_speed(subject))
    found.findings.extend(_findings(plan, evidence, subject.evaluation))
    found.floats.extend(refusal_lines([(l.name, l.reason) for l in left], [l.name for l in plan.layers]))
    found.rows.extend(_rows(subject, evidence, memory))
    return found


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
        value = f"{measured.increase:+.2f} % ± {_error(measured.increase_error, '.2f')}"
        return "Perplexity, measured", value, "beside the float model"
    if measured is not None and measured.perplexity is not None:
        return (
            "Perplexity, measured",
            f"{measured.perplexity:.2f} ± {_error(measured.perplexity_error, '.2f')}",
            "of the INT8 model",
        )
    if measured is not None and measured.relative_error is not None:
        value = f"{100 * measured.relative_error:.2f} % ± {_error(measured.relative_error_error, '.2f', 100)}"
        return "Error of the outputs", value, "measured, relative to the float model's"
    expected = expected_loss(plan)
    if expected is None:
        return "Quality", "not measured", "pass an evaluation on held-out text"
    if evidence.logits:
        return (
            "Perplexity, expected",
            f"+{100 * _expm1(expected):.2g} %",
            "by gradients on the calibration sample, not measured",
        )
    error = 100 * math.sqrt(2 * expected)
    return "Error of the outputs", f"about {error:.2g} %", "by gradients on the calibration sample, not measured"


def expected_loss(plan: Plan) -> float | None:
    """What the roundings of all INT8 linears cost the outputs together, as `LayerPlan.loss`; None where that is not known."""
    losses = [l.loss for l in plan.layers if l.quantized]
    return sum(x for x in losses if x is not None) if any(x is not None for x in losses) else None


def _worst(done: list[LayerPlan]) -> tuple[str, str, str]:
    known = [(l.sqnr_db, l.name) for l in done if l.sqnr_db is not None]
    if not known:
        return "Lowest SQNR of a linear", "not known", "the plan has no numbers of it"
    low, name = min(known)
    return "Lowest SQNR of a linear", f"{low:.1f} dB", f"{name.removesuffix('.weight')}, an error of {_percent(low)}"


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
        return "Speed", "expected", "by a table of this GPU, below"
    return "Speed", "not measured", "pass an evaluation, or compile for a GPU"


def _findings(plan: Plan, evidence: Evidence, measured: Evaluation | None) -> Iterable[Finding]:
    yield from _of_quality(plan, evidence, measured)
    done = [l for l in plan.layers if l.quantized]
    known = [l for l in done if l.sqnr_db is not None]
    low = sorted((l for l in known if (l.sqnr_db or 0) < LOW_DB), key=lambda l: l.sqnr_db or 0.0)
    if low:
        level: Level = "bad" if (low[0].sqnr_db or 0) < VERY_LOW_DB else "look"
        names = _some([l.name.removesuffix(".weight") for l in low])
        yield Finding(level, f"{_count(len(low), 'linear is', 'linears are')} below {LOW_DB:.0f} dB: {names}.")
    elif known:
        yield Finding(
            "good", f"Every INT8 linear keeps {LOW_DB:.0f} dB or more of its output on the calibration sample."
        )
    for text, of in (("has a few tokens many times as large as the others", "spikes"), ("clips more than 0.1 % of the sampled values", "clipped")):  # fmt: skip
        inputs = [i for i in evidence.inputs if (bool(i.spikes) if of == "spikes" else (i.clipped or 0) > CLIPS)]
        if inputs:
            names = _some([i.linears[0].removesuffix(".weight") for i in inputs])
            yield Finding("look", f"{_count(len(inputs), 'input', 'inputs')} of linears {text if len(inputs) == 1 else text.replace('has', 'have').replace('clips', 'clip')}: read by {names}.")  # fmt: skip
    rough = [i for i in evidence.inputs if i.site and i.ratio[1] > 0.5 * i.ratio[0] > 5]
    if rough:
        names = _some([i.linears[0].removesuffix(".weight") for i in rough])
        yield Finding("look", f"Outlier channels stay outliers after smoothing in {_count(len(rough), 'input', 'inputs')}: read by {names}.")  # fmt: skip
    left = len(plan.layers) - len(done)
    if left:
        yield Finding("good" if left < len(done) else "look", f"{_count(left, 'linear stays', 'linears stay')} in float; the reasons stand below.")  # fmt: skip
    if plan.evidence is None or not plan.evidence.inputs:
        yield Finding("look", "This plan has no evidence: an older version made it, or it was read from another tool's file. Channels, tokens, codes and the curves of what was tried are missing here; calibrate again to see them.")  # fmt: skip
    elif any(i.tokens == 0 for i in evidence.inputs):
        yield Finding("look", "The plan was made from activation scales alone: there were no tokens, so nothing was tried, and there are no heat maps and codes of activations.")  # fmt: skip


def _of_quality(plan: Plan, evidence: Evidence, measured: Evaluation | None) -> Iterable[Finding]:
    if measured is not None and measured.increase is not None:
        most = measured.increase + 2 * (measured.increase_error or 0.0)
        level: Level = "good" if most < SMALL_LOSS else "look" if most < LARGE_LOSS else "bad"
        yield Finding(level, f"On {measured.tokens:,} held-out tokens perplexity is {measured.increase:+.2f} % ± {_error(measured.increase_error, '.2f')} % against the float model's.")  # fmt: skip
        return
    if measured is not None:
        yield Finding("look", "The evaluation has no float model beside it, so that it does not say what was lost.")
        return
    expected = expected_loss(plan)
    told = ""
    if expected is not None and evidence.logits:
        told = f" Gradients on the calibration sample expect +{100 * _expm1(expected):.2g} % of perplexity."
    yield Finding("look", f"What the model has lost was not measured on held-out data: pass an evaluation (sqcompile eval --against).{told}")  # fmt: skip


def _rows(subject: Subject, evidence: Evidence, memory: Memory) -> Iterable[tuple[str, str]]:
    plan, measured = subject.plan, subject.evaluation
    yield "Model", evidence.model or "not known"
    if evidence.dtype:
        yield "Weights of linears in the float model", evidence.dtype
    if memory.linears:
        yield "Weights of the INT8 linears", f"{size(memory.linears[0])} before, {size(memory.linears[1])} after"
    if memory.model:
        exact = "the compiled model's tensors" if subject.weight_bytes is not None else "by the plan"
        yield "Whole model", f"{size(memory.model[0])} before, {size(memory.model[1])} after ({exact})"
    tokens = max((i.tokens for i in evidence.inputs), default=0)
    if tokens:
        yield "Calibration", f"{tokens:,} tokens"
    if plan.attention:
        some = sum(a.quantized != "none" for a in plan.attention)
        yield "Attention", f"{some} of {len(plan.attention)} in INT8"
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
                yield name, f"{value:.4g} ± {_error(error, '.2g')}"
    for line in subject.gemms:
        yield "Expected speed against bfloat16", line
    yield "Made with", evidence.versions or "not known"
    yield "Recipe", str(plan.recipe)


def size(n: int) -> str:
    """Bytes in words: 16.1 GB."""
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if n >= one:
            return f"{n / one:#.3g}".rstrip(".") + f" {unit}" if n < 999 * one else f"{n / one:,.0f} {unit}"
    return f"{n} bytes"


def change(before: int, after: int) -> str:
    """Bytes before and after, the unit once where it is one: 16.1 → 8.4 GB."""
    (one, unit), (other, same) = (size(n).rsplit(" ", 1) for n in (before, after))
    return f"{one} → {other} {unit}" if unit == same else f"{one} {unit} → {other} {same}"


def inputs_of(plan: Plan) -> tuple[InputEvidence, ...]:
    """The evidence that the plan has linears for."""
    shapes: dict[str, Any] = {l.name: l.shape for l in plan.layers}
    every = plan.evidence.inputs if plan.evidence is not None else ()
    return tuple(i for i in every if all(n in shapes and shapes[n][-1] == i.channels for n in i.linears))


def _percent(db: float) -> str:
    return f"{100 * 10 ** (-db / 20):.2g} % of its output"


def _error(x: float | None, form: str, times: float = 1.0) -> str:
    return "?" if x is None or math.isnan(x) else format(x * times, form)


def _expm1(x: float) -> float:
    return math.expm1(x) if x < 700 else math.inf


def _count(n: int, one: str, many: str) -> str:
    return f"{n} {one if n == 1 else many}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
