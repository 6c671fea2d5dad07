"""words: numbers as the page says them."""

from __future__ import annotations

import math


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


def saved(before: int, after: int) -> str:
    """What weights take beside before: 48 % less."""
    share = 100 * (after / before - 1) if before else 0.0
    if round(share) == 0:
        return "as much as before"
    return f"{share:.0f} % more" if share > 0 else f"{-share:.0f} % less"


def percent(db: float) -> str:
    """An error of so many dB as a share."""
    return f"{100 * 10 ** (-max(db, -1000.0) / 20):.2g} % of its output"


def error_of(x: float | None, form: str, times: float = 1.0) -> str:
    """A standard error; "?" of one that is not known, as of a single window."""
    return "?" if x is None or math.isnan(x) else format(x * times, form)


def told(x: float, form: str) -> str:
    """A number that was measured, which may be none."""
    return "not a number" if math.isnan(x) else format(x, form)


def known_error(x: float | None) -> float:
    """A standard error to reckon with; 0 of one that is not known."""
    return 0.0 if x is None or math.isnan(x) else x


def grown(x: float) -> float:
    """By what share perplexity grows with x nats."""
    return math.expm1(x) if x < 700 else math.inf


def count(n: int, one: str, many: str) -> str:
    """1 linear, 2 linears."""
    return f"{n} {one if n == 1 else many}"


def some(names: list[str]) -> str:
    """The first of a list."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
