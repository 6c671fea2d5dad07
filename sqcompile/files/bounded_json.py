"""bounded_json: JSON of unknown origin, an object, with bounds on its nesting and on its integers."""

from __future__ import annotations

import json
import re
from typing import Any

_MOST_NESTING = 64
_MOST_DIGITS = 20  # of an integer

_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"?|([\[{])|([\]}])', re.DOTALL)  # whole strings, so that theirs are not counted


def read_object(text: str, what: str) -> dict[str, Any]:
    """The object that a text is.

    Args:
        text: the JSON.
        what: what a message calls it.

    Raises:
        ValueError: if it is none, or is nested too deeply, or has an integer of too many digits.
    """
    depth = 0
    for token in _TOKENS.finditer(text):
        depth += (token[1] is not None) - (token[2] is not None)
        if depth > _MOST_NESTING:
            raise ValueError(f"{what} is nested too deeply")
    found = json.loads(text, parse_int=_integer)
    if not isinstance(found, dict):
        raise ValueError(f"{what} is no object")
    return found


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)
