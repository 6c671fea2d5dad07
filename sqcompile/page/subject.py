"""subject: what a page is about, from a Report and what is passed beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqcompile.draw.page import document
from sqcompile.errors import ReportError, StageError
from sqcompile.page.facts import Subject
from sqcompile.plan.plan import Plan
from sqcompile.process.progress import Enter, silent

if TYPE_CHECKING:
    from sqcompile.compiled.report import Report

_MEASURED = ("compared", "windows", "tokens", "perplexity", "increase", "relative_error", "tokens_per_second")
_LONGEST = 200  # characters of a title


def plan_of(report: Report) -> Plan:
    """The plan of a report.

    Raises:
        ReportError: if it was made without one.
    """
    if report.plan is None:
        raise ReportError("this report has no plan, so that there is nothing to show: make it with Report.of(plan)")
    return report.plan


def subject_of(report: Report, evaluation: Any = None, title: Any = None, enter: Enter = silent) -> Subject:
    """What is shown of a report, with its drawing if it has a graph: the stage "draw", of which ``enter`` is told.

    Raises:
        ReportError: for an evaluation or a title that is none, or a report without a plan.
    """
    if evaluation is not None and not all(hasattr(evaluation, name) for name in _MEASURED):
        raise ReportError(f"evaluation is a {type(evaluation).__name__}: pass what sqcompile.evaluate gives")
    if title is not None and not (isinstance(title, str) and 0 < len(title) <= _LONGEST and title.isprintable()):
        raise ReportError(f"title={title!r:.60}: pass one line of text, or None for the model's class")
    plan = plan_of(report)
    picture, why = _drawing(report, plan, enter)
    gemms = tuple(f"{g}, against {g.against}" for g in report.gemms if g.gains)
    return Subject(plan, gemms, evaluation, report.weight_bytes, picture, why, title)


def _drawing(report: Report, plan: Plan, enter: Enter) -> tuple[str | None, str]:
    """The drawing as a page of its own; and in words why there is none, where there might be one."""
    if report.stages is None:
        return None, ""  # a plan alone has no graph
    enter("draw")
    try:
        return document(report.stages, plan), ""
    except StageError as e:  # the float model is gone, or was never here, as of a saved model
        return None, str(e)
