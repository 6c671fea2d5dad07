"""Plan: everything decided about a model, without its weights or its data. Serializable.

Keyed by parameter names, so that a plan applies to any graph captured from the same model.
"""

from __future__ import annotations

import dataclasses
import os
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from sqcompile.errors import PlanError, RecipeError
from sqcompile.plan import edit
from sqcompile.plan.checks import check_values
from sqcompile.plan.entries import AttentionPlan, LayerPlan, Shard
from sqcompile.plan.evidence import Evidence
from sqcompile.plan.evidence_file import check_evidence
from sqcompile.plan.evidence_file import decoded as decoded_evidence
from sqcompile.plan.evidence_file import encoded as encoded_evidence
from sqcompile.plan.file import bytes_of, checksum, parts_of, read_plan_file, write_plan_file
from sqcompile.plan.recipe import LM_HEAD, Recipe, resolve_recipe
from sqcompile.plan.said import said, shown

# 2 had no checksum, and "lm_head" among what its recipe skips where 3 has ``Recipe.lm_head``; 4 has rotations, and
# 5 evidence, 6 whose shard it is of, and 7 what is taken off inputs
FORMAT = 7
READABLE = (2, 3, 4, 5, 6, 7)

_T = TypeVar("_T")
_HEADS = "attention: "  # before the names of ``Plan.heads`` in a file
_COLUMNS = "columns: "  # and of ``Plan.columns``
_SHIFTS = "shifts: "  # and of ``Plan.shifts``
_EVIDENCE = "evidence: "  # and of what ``Plan.evidence`` holds


@dataclass(frozen=True, eq=False)
class Plan:
    """Decisions for one model. Plans are equal if all they decide is, wherever their tensors are.

    Attributes:
        recipe: what was asked for.
        call: shapes and dtypes of the call the model was captured with.
        scales: smoothing scale by site name, float32 [C].
        layers: every linear, in graph order.
        attention: every attention, in graph order; empty where the recipe leaves attention alone.
        heads: tensors of attentions, by attention name and what they are, float32: ``"<name>/scale"`` [classes]
            (smoothing), ``"<name>/query_by"`` [H, D] and ``"<name>/key_by"`` [G, D] (what the scale comes to, for graphs
            that cannot fold it), ``"<name>/key_mean"`` [G, D] (subtracted from the smoothed K), ``"<name>/value_scale"``
            [G, Dv] (static Δ of V in the folded graph).
        columns: s of each smoothed linear's input channels, float32 [K], by linear name: for graphs that hold a linear
            and not all of its site, where it is multiplied explicitly.
        evidence: what calibration saw and tried, for the page of a report; None where that is not known. It is saved, and no
            part of equality.
        shard: of a sharded model, whose: sizes and scales are those of one process then. None of a whole model.
        shifts: what is taken off the inputs of linears before they are divided by s, float32 [K], by linear name. All that
            read one norm have the same.
    """

    recipe: Recipe
    call: Any
    scales: dict[str, Tensor]
    layers: tuple[LayerPlan, ...]
    attention: tuple[AttentionPlan, ...] = ()
    heads: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    evidence: Evidence | None = field(default=None, repr=False)
    shard: Shard | None = None
    shifts: dict[str, Tensor] = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        same = (self.recipe, self.call, self.layers, self.attention, self.shard) == (
            other.recipe, other.call, other.layers, other.attention, other.shard,
        )  # fmt: skip
        return same and all(
            _equal(getattr(self, n), getattr(other, n)) for n in ("scales", "heads", "columns", "shifts")
        )

    def __hash__(self) -> int:
        return hash((self.recipe, self.layers, self.attention, self.shard, frozenset(self.scales)))

    def __repr__(self) -> str:
        return said(self)

    def _repr_html_(self) -> str:
        return shown(self)

    def worst(self, n: int = 5, by: edit.By | None = None) -> tuple[LayerPlan, ...]:
        """The quantized linears that cost most, the worst first.

        Args:
            n: how many at most.
            by: "loss" (what they cost the outputs), "sqnr" (the lowest SQNR of their own output), or None: the loss where
                the plan knows it. Linears of which it is not known are left out.

        Raises:
            PlanError: for another argument.
        """
        return edit.worst(self, n, by)

    def keep_float(self, names: str | LayerPlan | Iterable[str | LayerPlan]) -> Plan:
        """A new plan in which some linears stay in float; all else is as it was, scales of the others included.

        The recipe stays what was asked for. Attentions are left alone.

        Args:
            names: one or several names or patterns of linears, as in ``Recipe.skip``, or entries such as `worst` gives.

        Raises:
            PlanError: for a name that no linear has, with the nearest ones; or if no linear would be quantized any more.
        """
        return edit.keep_float(self, names)

    def check(self) -> None:
        """Checks what can be known without a model: types, ranges, shapes, and that the parts agree.

        Raises:
            PlanError: names the field, its value and what it should be.
        """
        kinds: dict[str, tuple[Any, type | None]] = {
            "recipe": (Recipe, None), "layers": (tuple, LayerPlan), "attention": (tuple, AttentionPlan),
            "scales": (dict, None), "heads": (dict, None), "columns": (dict, None), "shifts": (dict, None),
        }  # fmt: skip
        for name, (kind, part) in kinds.items():
            found = getattr(self, name)
            if not isinstance(found, kind) or (part is not None and not all(isinstance(x, part) for x in found)):
                of = f" of {part.__name__}" if part else ""
                raise PlanError(f"the plan's {name} are no {kind.__name__}{of}: pass what sqcompile.calibrate gives")
        check_values(self)
        check_evidence(self.evidence)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as one safetensors file: the tensors, and all else as JSON in its header.

        The file appears whole or not at all; an old one is replaced, with its permissions.

        Raises:
            PlanError: for a plan that `load` would refuse, or a path that is no regular file or cannot be written.
        """
        self.check()
        write_plan_file(path, *self._parts())

    def encoded(self) -> bytes:
        """The bytes of the file that `save` writes."""
        return bytes_of(*self._parts())

    def _parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a file holds: JSON and tensors."""
        meta: dict[str, Any] = {
            "format": FORMAT,
            "recipe": dataclasses.asdict(self.recipe),
            "call": self.call,
            "layers": [dataclasses.asdict(l) for l in self.layers],
            "attention": [dataclasses.asdict(a) for a in self.attention],
            "shard": None if self.shard is None else dataclasses.asdict(self.shard),
        }
        tensors = self.scales | {_HEADS + k: v for k, v in self.heads.items()}
        tensors |= {_COLUMNS + k: v for k, v in self.columns.items()}
        tensors |= {_SHIFTS + k: v for k, v in self.shifts.items()}
        if self.evidence is not None:
            meta["evidence"], seen = encoded_evidence(self.evidence)
            tensors |= {_EVIDENCE + k: v for k, v in seen.items()}
        return {**meta, "sha256": checksum(meta, tensors)}, tensors

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """Reads a plan.

        Raises:
            PlanError: if the file is no plan, is damaged, or of a newer format.
        """
        meta, tensors = read_plan_file(path)
        try:
            return _checked(meta, tensors)
        except (PlanError, RecipeError) as e:
            raise PlanError(f"{os.fsdecode(path)}: {e}") from e

    @staticmethod
    def decoded(data: bytes) -> Plan:
        """The plan that another process has `encoded`.

        Raises:
            PlanError: if the bytes are not those of a plan.
        """
        return _checked(*parts_of(data))


def given_plan(plan: Any, recipe: str | Recipe | None, data: str | None) -> Plan:
    """The plan that a user passes, checked.

    Args:
        plan: a Plan, or the path of a saved one.
        recipe: what is passed beside it; None for nothing.
        data: the name of what is passed beside it to make a plan from, or None.

    Raises:
        PlanError: if it is none, or does not agree with what is passed beside it.
        RecipeError: for an unknown recipe.
    """
    if isinstance(plan, (str, os.PathLike)):
        plan = Plan.load(plan)
    if not isinstance(plan, Plan):
        said = " ".join(reprlib.repr(plan).split())  # a module has many lines
        raise PlanError(f"plan={said}: pass what sqcompile.calibrate gives, or the path of a saved one")
    plan.check()
    if data is not None:
        raise PlanError(f"plan and {data}: a plan needs no calibration, leave one of them out")
    if recipe is not None and resolve_recipe(recipe) != plan.recipe:
        raise PlanError(f"plan and recipe disagree: the plan is of {plan.recipe}. Leave recipe out, or calibrate again")
    return plan


def _equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        t.dtype == b[name].dtype and torch.equal(t.cpu(), b[name].cpu()) for name, t in a.items()
    )


def _checked(meta: dict[str, Any], tensors: dict[str, Tensor]) -> Plan:
    sha256 = meta.pop("sha256", None)
    plan = _decoded(dict(meta), tensors)
    plan.check()
    if meta["format"] != 2 and sha256 != checksum(meta, tensors):
        raise PlanError("its checksum differs: it was damaged or edited. Copy it again, or calibrate again")
    return plan


def _decoded(meta: dict[str, Any], tensors: dict[str, Tensor]) -> Plan:
    """The plan in a file's JSON, whose fields are known by name, and have any value."""
    version = meta.get("format")
    if type(version) is not int or version not in READABLE:
        raise PlanError(
            f"it has plan format {version!r}, and this version reads {', '.join(map(str, READABLE))}: calibrate again"
        )
    evidence = meta.pop("evidence", None) if version >= 5 else None
    if meta.keys() != {"format", "recipe", "call", "layers", "attention"} | ({"shard"} if version >= 6 else set()):
        raise PlanError(f"its fields are {', '.join(sorted(meta))}, and not recipe, call, layers, attention and shard")
    for name in ("layers", "attention"):
        if not isinstance(meta[name], list):
            raise PlanError(f"its {name} are no list")
    seen = {k.removeprefix(_EVIDENCE): v for k, v in tensors.items() if k.startswith(_EVIDENCE)}
    return Plan(
        _fields(Recipe, _old_recipe(meta["recipe"]) if version == 2 else meta["recipe"]),
        meta["call"],
        {k: v for k, v in tensors.items() if not k.startswith((_HEADS, _COLUMNS, _SHIFTS, _EVIDENCE))},
        tuple(_fields(LayerPlan, l) for l in meta["layers"]),
        tuple(_fields(AttentionPlan, a) for a in meta["attention"]),
        {k.removeprefix(_HEADS): v for k, v in tensors.items() if k.startswith(_HEADS)},
        {k.removeprefix(_COLUMNS): v for k, v in tensors.items() if k.startswith(_COLUMNS)},
        decoded_evidence(evidence, seen) if evidence is not None or seen else None,
        None if meta.get("shard") is None else _fields(Shard, meta["shard"]),
        {k.removeprefix(_SHIFTS): v for k, v in tensors.items() if k.startswith(_SHIFTS)},
    )


def _fields(kind: type[_T], found: Any) -> _T:
    """A dataclass from a JSON object; lists are its tuples."""
    known = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if not isinstance(found, dict):
        raise PlanError(f"a {kind.__name__} in it is no object")
    if unknown := sorted(found.keys() - known.keys()):
        raise PlanError(f"a {kind.__name__} in it has the field {unknown[0]!r}, which this version does not know")
    if missing := [n for n, f in known.items() if n not in found and f.default is dataclasses.MISSING]:
        raise PlanError(f"a {kind.__name__} in it has no field {missing[0]!r}")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in found.items()})


def _old_recipe(recipe: Any) -> Any:
    """The recipe of format 2, where the head is quantized unless "lm_head" is skipped."""
    skip = recipe.get("skip", [LM_HEAD]) if isinstance(recipe, dict) else None
    if not isinstance(skip, list) or "lm_head" in recipe:
        raise PlanError("its recipe is none of format 2")
    return {**recipe, "skip": [name for name in skip if name != LM_HEAD], "lm_head": LM_HEAD not in skip}
