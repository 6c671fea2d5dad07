"""recipes: a Recipe from the options of a command: a preset or a file first, then what single options say."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from sqcompile.cli.terminal import CommandError
from sqcompile.errors import RecipeError
from sqcompile.files.bounded_json import read_object
from sqcompile.files.regular import read_regular, said
from sqcompile.plan.recipe import PRESETS, Recipe, resolve_recipe

_MOST_BYTES = 2**20


def recipe_from(base: str, options: Mapping[str, Any]) -> Recipe:
    """The recipe.

    Args:
        base: the name of a preset, or the path of a JSON object with fields of a Recipe.
        options: fields that the command line gives; None for those that it leaves open.

    Raises:
        RecipeError: for a preset or a value that there is not.
        CommandError: for a file that cannot be read.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if isinstance(given.get("alpha"), str):
        given["alpha"] = _alpha(given["alpha"])
    if isinstance(given.get("rotate"), str) and given["rotate"].isdigit():
        given["rotate"] = int(given["rotate"])
    if isinstance(given.get("overrides"), str):
        given["overrides"] = _object(given["overrides"], "--overrides")
    return dataclasses.replace(_base(base), **given)


def _base(base: str) -> Recipe:
    if base in PRESETS or not base.endswith(".json"):
        return resolve_recipe(base)
    if not os.path.exists(base):
        raise CommandError(f"there is no {base}: pass one of {', '.join(PRESETS)}, or a JSON file")
    try:
        text = read_regular(base, _MOST_BYTES, "a recipe").decode("utf-8")
    except (OSError, ValueError) as e:
        raise CommandError(f"{base} cannot be read ({said(e)})") from e
    fields = _object(text, base)
    known = [f.name for f in dataclasses.fields(Recipe)]
    if unknown := [name for name in fields if name not in known]:
        raise RecipeError(f"{base} has the field {unknown[0]!r}: a recipe has {', '.join(known)}")
    for name in ("alpha", "skip"):
        if isinstance(fields.get(name), list):
            fields[name] = tuple(fields[name])
    return Recipe(**fields)


def _alpha(text: str) -> Any:
    """ "auto", a number, or several with commas between them."""
    if text == "auto":
        return text
    try:
        found = tuple(map(float, text.split(",")))
    except ValueError as e:
        raise RecipeError(f"--alpha {text}: 'auto', a number in [0, 1], or several as in 0.3,0.5,0.7") from e
    return found if len(found) > 1 else found[0]


def _object(text: str, what: str) -> dict[str, Any]:
    try:
        return read_object(text, what)
    except (ValueError, json.JSONDecodeError) as e:
        raise CommandError(f"{what} is no JSON object ({said(e)})") from e
