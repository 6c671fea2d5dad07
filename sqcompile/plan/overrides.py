"""overrides: fields of a recipe for some linears, by patterns of names: ``Recipe.overrides`` in one form, checked.

{"*.down_proj": {"rotate": 32, "alpha": 0.8}}   ->   (("*.down_proj", (("alpha", 0.8), ("rotate", 32))),)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from sqcompile.errors import RecipeError

Overrides = tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]

# What may differ from linear to linear. Of these, attentions take skip and min_speedup.
FIELDS = ("activation", "alpha", "lm_head", "min_speedup", "rotate", "shift", "skip", "smooth", "spikes", "weight")

_R = TypeVar("_R")


def canonical(recipe: Any, given: Any) -> Overrides:
    """Overrides as they are kept, in the order given, from a dict of dicts or from that form itself.

    Args:
        recipe: a Recipe that is complete but for its overrides.
        given: whatever a user or a file gives.

    Raises:
        RecipeError: names the pattern, the field and what to write.
    """
    found = []
    for pattern, fields in _pairs(given, f"overrides={given!r}"):
        what = f"overrides[{pattern!r}]"
        if not isinstance(pattern, str) or not pattern:
            raise RecipeError(
                f"{what}: a pattern is a name, or a part or a shell pattern of one, such as '*.down_proj'"
            )
        chosen = dict(_pairs(fields, f"{what}={fields!r}"))
        if not chosen:
            raise RecipeError(f"{what} overrides nothing: pass some of {', '.join(FIELDS)}")
        for name in chosen:
            _check_field(recipe, what, name)
        skip = chosen.get("skip", False)
        if not isinstance(skip, bool):
            raise RecipeError(f"{what}: skip={skip!r}: True leaves what the pattern names in float, or False")
        own = overridden(recipe, chosen, what, pattern)
        found.append((pattern, tuple((n, chosen[n] if n == "skip" else getattr(own, n)) for n in sorted(chosen))))
    return tuple(found)


def overridden(recipe: _R, fields: Mapping[str, Any], what: str, by: str) -> _R:
    """The recipe of what ``fields`` are for; ``by`` is the pattern that names it, which the recipe skips where it is to be.

    Raises:
        RecipeError: as Recipe does; the message begins with ``what``.
    """
    values = {**fields, "overrides": ()}
    if "skip" in fields:
        values["skip"] = (by,) if fields["skip"] else ()
    try:
        return dataclasses.replace(recipe, **values)  # type: ignore[type-var]
    except RecipeError as e:
        raise RecipeError(f"{what}: {e}") from e


def _check_field(recipe: Any, what: str, name: Any) -> None:
    if name in FIELDS:
        return
    if any(f.name == name for f in dataclasses.fields(recipe)):
        raise RecipeError(f"{what} has {name!r}, which is the whole model's: pass Recipe({name}=...)")
    raise RecipeError(f"{what} has {name!r}, which is no field of a recipe: {', '.join(FIELDS)}")


def _pairs(given: Any, what: str) -> list[tuple[Any, Any]]:
    """Keys and values of a mapping, or of a list of pairs, which JSON makes of one."""
    pairs = list(given.items()) if isinstance(given, Mapping) else given
    if not isinstance(pairs, (list, tuple)) or not all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs):
        raise RecipeError(f"{what}: pass a dict of dicts, such as {{'*.down_proj': {{'alpha': 0.8, 'rotate': 32}}}}")
    if not all(isinstance(key, str) for key, _ in pairs):
        raise RecipeError(f"{what}: its keys are strings")
    return [(key, value) for key, value in pairs]
