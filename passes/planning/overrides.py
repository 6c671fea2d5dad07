"""overrides: the recipe of each linear, where patterns of ``Recipe.overrides`` name it. Analysis only.

    Recipe(overrides={"*.mlp.*": {"rotate": 32}, "*.up_proj": {"rotate": "none"}})
    %a = linear(%x, %layers.0.mlp.up_proj.weight)
    %b = linear(%a, %layers.0.mlp.down_proj.weight)
->
    %layers.0.mlp.up_proj.weight: Recipe()                  # the later pattern wins
    %layers.0.mlp.down_proj.weight: Recipe(rotate=32)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import fx

from sqcompile.errors import RecipeError
from sqcompile.passes.attention.chains import Attention
from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import Linear
from sqcompile.passes.labels.match import Site
from sqcompile.passes.planning.lm_head import is_lm_head
from sqcompile.plan.edit import named, named_by
from sqcompile.plan.overrides import overridden
from sqcompile.plan.recipe import LM_HEAD, Recipe


def recipe_of(gm: fx.GraphModule, l: Linear, recipe: Recipe) -> Recipe:
    """The recipe of one linear; what it skips is this linear, or nothing, where an override says so.

    Raises:
        RecipeError: if overrides of several patterns contradict each other.
    """
    return _merged(recipe, l.name, lambda pattern: _names(gm, l, pattern))


def recipe_of_attention(a: Attention, recipe: Recipe) -> Recipe:
    """The recipe of one attention, as `recipe_of`."""
    return _merged(recipe, a.name, lambda pattern: named(pattern, a.name))


def said(gm: fx.GraphModule, l: Linear, recipe: Recipe) -> str:
    """What a linear's overrides are, in words; "" where there are none."""
    fields: dict[str, Any] = {}
    for pattern, chosen in recipe.by_pattern:
        fields |= dict(chosen) if _names(gm, l, pattern) else {}
    return "; overridden: " + ", ".join(f"{n}={fields[n]!r}" for n in sorted(fields)) if fields else ""


def check_patterns(gm: fx.GraphModule, linears: list[Linear], recipe: Recipe) -> None:
    """Raises RecipeError for a pattern of ``skip`` or ``overrides`` that names no linear."""
    for what, patterns in (("skip={!r}", recipe.skip), ("overrides[{!r}]", [p for p, _ in recipe.by_pattern])):
        for pattern in patterns:
            if pattern != LM_HEAD and not any(names_linear(gm, l, pattern) for l in linears):
                some = ", ".join(l.name for l in linears[:4])
                raise RecipeError(f"{what.format(pattern)} names no linear of this model; its linears are {some}, ...")


def check_agreement(sites: Sequence[Site], own: Mapping[str, Recipe], floats: Collection[str]) -> None:
    """Checks what linears share: a site has one s and one rotation, and what several linears read is quantized once.

    Args:
        sites: with every quantized linear in one of them.
        own: the recipe of each linear, by name.
        floats: names of the linears that stay in float.

    Raises:
        RecipeError: names two linears, and the field in which they disagree.
    """
    readers: dict[str, list[Linear]] = {}
    for site in sites:
        mine = [l for l, _ in site.balance if l.name not in floats]
        _check_same(mine, own, ("alpha", "smooth", "rotate", "shift"), "are smoothed, shifted and rotated together")
        for l in mine:
            readers.setdefault(l.x, []).append(l)
    for mine in readers.values():
        _check_same(mine, own, ("activation", "rotate"), "read one input, which is quantized once")


def _check_same(linears: list[Linear], own: Mapping[str, Recipe], fields: Sequence[str], why: str) -> None:
    for l in linears[1:]:
        for field in fields:
            one, other = (getattr(own[x.name], field) for x in (linears[0], l))
            if one != other:
                raise RecipeError(
                    f"{linears[0].name} and {l.name} {why}, and overrides give the first {field}={one!r}, the second "
                    f"{field}={other!r}: give both the same, by a pattern that names both"
                )


def _merged(recipe: Recipe, name: str, named: Callable[[str], bool]) -> Recipe:
    own = recipe
    for pattern, fields in recipe.by_pattern:
        if named(pattern):
            own = overridden(own, dict(fields), f"the overrides of {name}", pattern)
    return own


def _names(gm: fx.GraphModule, l: Linear, pattern: str) -> bool:
    """Whether a pattern of overrides names a linear; "lm_head" names the projection back to the vocabulary in any case."""
    return names_linear(gm, l, pattern) or (pattern == LM_HEAD and is_lm_head(gm, l))


def names_linear(gm: fx.GraphModule, l: Linear, pattern: str) -> bool:
    """Whether a pattern names a linear: its module or its weight, by any of the names of a tied weight."""
    aliases = about(gm).aliases.get(l.name.partition("#")[0], (l.name,))
    return any(named_by(pattern, name) for name in aliases)
