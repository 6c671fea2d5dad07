"""findings: what speaks for and against a model in INT8, a sentence each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sqcompile.page.words import count, error_of, grown, known_error, some, told
from sqcompile.plan.evidence import Evidence, InputEvidence
from sqcompile.plan.plan import Plan

if TYPE_CHECKING:
    from sqcompile.evaluation import Evaluation

Level = Literal["good", "look", "bad"]

LOW_DB, VERY_LOW_DB = 20.0, 10.0  # a linear whose error has a tenth, or a third, of its output's size
SMALL_LOSS, LARGE_LOSS = 1.0, 3.0  # percent of perplexity
SMALL_ERROR, LARGE_ERROR = 5.0, 15.0  # percent of the size of output vectors
SMALL_DIFFERENT, LARGE_DIFFERENT = 2.0, 5.0  # percent of answers
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
    dtype = plan.recipe.dtype.upper()
    rest = "" if len(known) == len(done) else f" SQNR is known of {len(known)} of the {len(done)} linears in {dtype}."
    if low:
        level: Level = "bad" if (low[0].sqnr_db or 0) < VERY_LOW_DB else "look"
        names = some([l.name.removesuffix(".weight") for l in low])
        yield Finding(level, f"{count(len(low), 'linear is', 'linears are')} below {LOW_DB:.0f} dB: {names}.{rest}")
    elif known:
        whose = f"Every linear in {dtype}" if not rest else "Every linear whose SQNR is known"
        said = f"{whose} keeps {LOW_DB:.0f} dB or more of its output on the calibration sample.{rest}"
        yield Finding("look" if rest else "good", said)
    elif done:
        yield Finding("look", f"SQNR is known of none of the {len(done)} linears in {dtype}.")
    faint = [a for a in plan.attention if a.quantized != "none" and a.sqnr_db is not None and a.sqnr_db < LOW_DB]
    if faint:
        names = some([a.name for a in faint])
        yield Finding(
            "look", f"The scores of {count(len(faint), 'attention', 'attentions')} are below {LOW_DB:.0f} dB: {names}."
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
        most = measured.increase + 2 * known_error(measured.increase_error)
        level: Level = "good" if most < SMALL_LOSS else "look" if most < LARGE_LOSS else "bad"
        yield Finding(level, f"On {measured.tokens:,} held-out tokens perplexity is {told(measured.increase, '+.2f')} % ± {error_of(measured.increase_error, '.2f')} % against the float model's.")  # fmt: skip
        return
    if measured is not None and measured.relative_error is not None:
        error = 100 * measured.relative_error
        most = error + 200 * known_error(measured.relative_error_error)
        level = "good" if most < SMALL_ERROR else "look" if most < LARGE_ERROR else "bad"
        yield Finding(level, f"On {measured.tokens:,} held-out vectors the error of the outputs is {told(error, '.2f')} % ± {error_of(measured.relative_error_error, '.2f', 100)} % of the float model's.")  # fmt: skip
        return
    if measured is not None and measured.top1 is not None:
        least = measured.top1 - 2 * known_error(measured.top1_error)
        level = "good" if least > 100 - SMALL_DIFFERENT else "look" if least > 100 - LARGE_DIFFERENT else "bad"
        yield Finding(level, f"On {measured.tokens:,} held-out predictions the likeliest answer is the float model's in {told(measured.top1, '.2f')} % ± {error_of(measured.top1_error, '.2f')} %.")  # fmt: skip
        return
    if measured is not None:
        yield Finding("look", "The evaluation has no float model beside it, so that it does not say what was lost.")
        return
    expected = expected_loss(plan)
    expects = ""
    if expected is not None and evidence.logits:
        share = "" if expected.of_all else f", of {expected.known} of {expected.linears} linears"
        expects = (
            f" Gradients on the calibration sample expect +{100 * grown(expected.loss):.2g} % of perplexity{share}."
        )
    yield Finding("look", f"What the model has lost was not measured on held-out data: pass an evaluation (sqcompile eval --against).{expects}")  # fmt: skip


@dataclass(frozen=True)
class Expected:
    """What the roundings of INT8 linears cost the outputs together.

    Attributes:
        loss: as `LayerPlan.loss`, added up.
        known: of how many linears.
        linears: how many there are in INT8.
    """

    loss: float
    known: int
    linears: int

    @property
    def of_all(self) -> bool:
        return self.known == self.linears


def expected_loss(plan: Plan) -> Expected | None:
    """What the INT8 linears of a plan cost; None where that is known of none."""
    every = [l.loss for l in plan.layers if l.quantized]
    known = [x for x in every if x is not None]
    return Expected(sum(known), len(known), len(every)) if known else None
