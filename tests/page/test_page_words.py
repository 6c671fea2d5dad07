"""What a page says in words where numbers are missing, infinite or none, and of attentions."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import page_cases
import pytest
from plan_cases import dynamic_plan, static_plan

import sqcompile
from sqcompile import Evaluation, Plan
from sqcompile.compiled.report import Report
from sqcompile.page.attention import attention_rows
from sqcompile.page.data import data_of
from sqcompile.page.facts import Facts, Subject, facts_of
from sqcompile.page.words import saved


def with_layers(plan: Plan, **fields: Any) -> Plan:
    """The plan with other values for all of its linears in INT8; a function gets the linear's place."""
    layers = []
    for i, l in enumerate(plan.layers):
        new = {n: x(i) if callable(x) else x for n, x in fields.items()}
        layers.append(dataclasses.replace(l, **new) if l.quantized else l)
    return dataclasses.replace(plan, layers=tuple(layers))


def texts(facts: Facts) -> str:
    return "\n".join(f"{f.level}: {f.text}" for f in facts.findings)


def card(facts: Facts, title: str) -> tuple[str, str]:
    return next((value, note) for name, value, note in facts.cards if name.startswith(title))


def test_what_was_not_measured_is_said() -> None:
    plan = page_cases.synthetic(2)
    whole = facts_of(Subject(plan))
    assert "good: Every linear in INT8 keeps 20 dB or more" in texts(whole) and "known of" not in texts(whole)
    assert "expect +" in texts(whole) and " linears." not in whole.findings[0].text
    some = facts_of(Subject(with_layers(plan, sqnr_db=lambda i: 31.0 if i < 3 else None, loss=lambda i: 1e-4 if i < 5 else None)))  # fmt: skip
    assert "look: Every linear whose SQNR is known keeps 20 dB" in texts(some)
    assert "SQNR is known of 3 of the 14 linears in INT8." in texts(some)
    assert "expect +0.05 % of perplexity, of 5 of 14 linears." in texts(some)
    assert card(some, "Perplexity, expected") == ("+0.05 %", "by gradients on the calibration sample, not measured; of 5 of 14 linears")  # fmt: skip
    assert card(some, "Lowest SQNR")[1].endswith("known of 3 of 14 linears")
    none = facts_of(Subject(with_layers(plan, sqnr_db=None, loss=None)))
    assert "look: SQNR is known of none of the 14 linears in INT8." in texts(none)
    assert card(none, "Quality")[0] == "not measured" and card(none, "Lowest SQNR")[0] == "not known"


def test_exact_outputs_are_said_to_be_exact() -> None:
    plan = with_layers(page_cases.synthetic(2), sqnr_db=math.inf, loss=0.0)
    facts = facts_of(Subject(plan))
    assert card(facts, "Lowest SQNR") == ("exact", "of every linear whose SQNR is known")
    assert "lowest SQNR exact" in repr(plan)
    some = with_layers(plan, sqnr_db=lambda i: 30.0 + i if i < 3 else math.inf)
    found = str(Report.of(some)), plan._repr_html_(), some._repr_html_(), Report.of(some)._repr_html_()
    assert "30.0 dB..exact" in found[0] and ">exact<" in found[1] and ">30.0..exact<" in found[3]
    other = with_layers(plan, sqnr_db=40.0)
    pairs = [(plan, other), (other, plan), (some, plan), (plan, plan)]
    found = (*found, *(f(sqcompile.compare(*p)) for p in pairs for f in (str, lambda c: c._repr_html_())))
    assert not any(re.search(r"\binf\b|\bnan\b", text) for text in found)
    assert sqcompile.compare(some, other).mean_sqnr_db == (31.0, 40.0) and sqcompile.compare(plan, plan).mean_sqnr_db is None  # fmt: skip
    data = data_of(some)["layers"]
    assert data["exact"].count(1) == 11 and [x for x in data["sqnr"] if x is not None] == [30.0, 31.0, 32.0]
    layers = tuple(sqcompile.LayerError(f"{i}", f"{i}", db, 5) for i, db in enumerate((30.0, *[math.inf] * 6)))
    told = str(Evaluation("x", 1, 5, relative_error=0.1, cosine=1.0, layers=layers))
    assert "exact" in told and "median of all     exact" in told and "inf" not in told


def test_memory_that_grows_is_said_to_grow() -> None:
    assert [saved(100, n) for n in (48, 105, 100, 0)] == ["52 % less", "5 % more", "as much as before", "100 % less"]
    plan = page_cases.synthetic(2)
    assert plan.evidence is not None
    plan = dataclasses.replace(plan, evidence=dataclasses.replace(plan.evidence, bytes=10**10))
    grown = card(facts_of(Subject(plan, weight_bytes=15 * 10**9)), "Memory of weights")[1]
    assert grown == "50 % more, all tensors of the model"


@pytest.mark.parametrize(
    ("measured", "level", "text", "value"),
    [
        ({"relative_error": 0.02, "relative_error_error": 0.001, "cosine": 0.999}, "good", "On 96 held-out vectors the error of the outputs is 2.00 % ± 0.10 %", "2.00 % ± 0.10"),
        ({"relative_error": 0.04, "relative_error_error": 0.006}, "look", "4.00 % ± 0.60 %", "4.00 % ± 0.60"),
        ({"relative_error": 0.2, "relative_error_error": math.nan}, "bad", "20.00 % ± ? %", "20.00 % ± ?"),
        ({"top1": 99.0, "top1_error": 0.2, "kl": 1e-3}, "good", "the likeliest answer is the float model's in 99.00 % ± 0.20 %", "99.00 % ± 0.20"),
        ({"top1": 98.0, "top1_error": 0.5, "kl": 1e-3}, "look", "98.00 %", "98.00 % ± 0.50"),
        ({"top1": 90.0, "top1_error": 0.5, "kl": 1e-3}, "bad", "90.00 %", "90.00 % ± 0.50"),
        ({"perplexity": 12.0, "perplexity_error": 0.1}, "look", "no float model beside it", "12.00 ± 0.10"),
        ({"increase": math.nan, "increase_error": math.nan}, "bad", "perplexity is not a number % ± ? %", "not a number % ± ?"),
    ],
)  # fmt: skip
def test_each_kind_of_evaluation_is_judged_by_what_it_measured(
    measured: dict[str, float], level: str, text: str, value: str
) -> None:
    facts = facts_of(Subject(page_cases.synthetic(2), evaluation=Evaluation("x", 8, 96, **measured)))  # type: ignore[arg-type]
    assert facts.findings[0].level == level and text in facts.findings[0].text
    assert facts.cards[2][1] == value


def test_attentions_have_their_scales_their_error_and_their_reason() -> None:
    plan = dynamic_plan()
    (a,) = plan.attention
    (row,) = attention_rows(plan)
    s = plan.heads[f"{a.name}/query_by"]
    smoothing = f"folded, α {a.alpha:.2f}, s {float(s.min()):.3g} to {float(s.max()):.3g}"
    assert row[:3] == (a.name, "INT8 QKᵀ", "2 × 16") and row[3] == smoothing
    assert row[4:] == (
        "Q and K one for each token and head",
        f"{a.sqnr_db:.1f} dB",
        "s folded into q and k; K less its mean",
    )
    (static,) = static_plan().attention
    (row,) = attention_rows(static_plan())
    assert row[1] == "INT8 QKᵀ, PV" and row[4].startswith(f"static: Q {static.q_scale:.3g}, K {static.k_scale:.3g}, V ")
    both = dataclasses.replace(a, quantized="qk_pv", sqnr_db=None, shape=(4, 2, 16))
    (row,) = attention_rows(dataclasses.replace(plan, attention=(both,)))
    assert row[2] == "4 × 16, keys 2 × 16" and row[4].endswith(", V one for each channel")
    assert row[5] == "not known"
    left = dataclasses.replace(a, quantized="none", smoothing="none", alpha=None, sqnr_db=None, reason="no kernel")
    assert attention_rows(dataclasses.replace(plan, attention=(left,)))[0] == (a.name, "float", "2 × 16", "", "", "", "no kernel")  # fmt: skip
    faint = dataclasses.replace(plan, attention=(dataclasses.replace(a, sqnr_db=12.0),))
    assert f"look: The scores of 1 attention are below 20 dB: {a.name}." in texts(facts_of(Subject(faint)))
    assert "The scores of" not in texts(facts_of(Subject(plan)))
