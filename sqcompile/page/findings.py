"""findings: what speaks for and against a model in INT8, a sentence each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sqcompile.page.words import count, error_of, grown, some
from sqcompile.plan.evidence import Evidence, InputEvidence
from sqcompile.plan.plan import Plan

if TYPE_CHECKING:
    from sqcompile.evaluation import Evaluation

Level = Literal["good", "look", "bad"]

LOW_DB, VERY_LOW_DB = 20.0, 10.0  # a linear whose error has a tenth, or a third, of its output's size
SMALL_LOSS, LARGE_LOSS = 1.0, 3.0  # percent of perplexity
CLIPS = 1e-3  # share of values


@dataclass(frozen=True)
class Finding:
    """One sentence on whether to trust the model; "look" and "bad" ask for somebody's eyes."""

    level: Level
    text: str


def findings_of(plan: Plan, evidence: Evidence, measured: Evaluation | None) -> Iterable[Finding]:
    """The sentences, what was measured first."""
    yield from _of_quality(plan, evidence, measured)
    done = [l for l in plan.layers if l.quantized]
    known = [l for l in done if l.sqnr_db is not None]
    low = sorted((l for l in known if (l.sqnr_db or 0) < LOW_DB), key=lambda l: l.sqnr_db or 0.0)
    if low:
        level: Level = "bad" if (low[0].sqnr_db or 0) < VERY_LOW_DB else "look"
        names = some([l.name.removesuffix(".weight") for l in low])
        yield Finding(level, f"{count(len(low), 'linear is', 'linears are')} below {LOW_DB:.0f} dB: {names}.")
    elif known:
        yield Finding(
            "good",
            f"Every linear in {plan.recipe.dtype.upper()} keeps {LOW_DB:.0f} dB or more of its output on the calibration sample.",
        )
    shared = {
        l.name for l in done if (l.activation or plan.recipe.activation) != "per_token"
    }  # one scale for all tokens
    names_of = {l.name for l in done}
    inputs_done = [i for i in evidence.inputs if not names_of.isdisjoint(i.linears)]  # an edited plan may have fewer
    spiky = [i for i in inputs_done if i.spikes and not shared.isdisjoint(i.linears)]
    clipped = [i for i in inputs_done if (i.clipped or 0) > CLIPS]
    for inputs, one, many in (
        (spiky, "has one scale and a few tokens many times as large as the others", "have one scale and a few tokens many times as large as the others"),
        (clipped, "clips more than 0.1 % of the sampled values", "clip more than 0.1 % of the sampled values"),
    ):  # fmt: skip
        if inputs:
            what = f"{count(len(inputs), 'input', 'inputs')} of linears {one if len(inputs) == 1 else many}"
            yield Finding("look", f"{what}: read by {_read_by(inputs)}.")
    rough = [i for i in inputs_done if i.site and i.ratio[1] > 0.5 * i.ratio[0] > 5]
    if rough:
        what = f"Outlier channels stay outliers after smoothing in {count(len(rough), 'input', 'inputs')}"
        yield Finding("look", f"{what}: read by {_read_by(rough)}.")
    left = len(plan.layers) - len(done)
    if left:
        yield Finding("good" if left < len(done) else "look", f"{count(left, 'linear stays', 'linears stay')} in float; the reasons stand below.")  # fmt: skip
    if plan.evidence is None or not plan.evidence.inputs:
        yield Finding("look", "This plan has no evidence: an older version made it, or it was read from another tool's file. Channels, tokens, codes and the curves of what was tried are missing here; calibrate again to see them.")  # fmt: skip
    elif any(i.tokens == 0 for i in evidence.inputs):
        yield Finding("look", "The plan was made from activation scales alone: there were no tokens, so nothing was tried, and there are no heat maps and codes of activations.")  # fmt: skip


def _read_by(inputs: list[InputEvidence]) -> str:
    return some([i.linears[0].removesuffix(".weight") for i in inputs])


def _of_quality(plan: Plan, evidence: Evidence, measured: Evaluation | None) -> Iterable[Finding]:
    if measured is not None and measured.increase is not None:
        most = measured.increase + 2 * (measured.increase_error or 0.0)
        level: Level = "good" if most < SMALL_LOSS else "look" if most < LARGE_LOSS else "bad"
        yield Finding(level, f"On {measured.tokens:,} held-out tokens perplexity is {measured.increase:+.2f} % ± {error_of(measured.increase_error, '.2f')} % against the float model's.")  # fmt: skip
        return
    if measured is not None:
        yield Finding("look", "The evaluation has no float model beside it, so that it does not say what was lost.")
        return
    expected = expected_loss(plan)
    told = ""
    if expected is not None and evidence.logits:
        told = f" Gradients on the calibration sample expect +{100 * grown(expected):.2g} % of perplexity."
    yield Finding("look", f"What the model has lost was not measured on held-out data: pass an evaluation (sqcompile eval --against).{told}")  # fmt: skip


def expected_loss(plan: Plan) -> float | None:
    """What the roundings of all INT8 linears cost the outputs together, as `LayerPlan.loss`; None where that is not known."""
    losses = [l.loss for l in plan.layers if l.quantized]
    return sum(x for x in losses if x is not None) if any(x is not None for x in losses) else None
