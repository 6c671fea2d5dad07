"""read_scheme: ``quantization_config`` of compressed-tensors, of which every field that decides is checked.

{"targets": ["Linear"], "weights": {...}, "input_activations": {...}} and ["lm_head"]  ->  Scheme per module
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqcompile.errors import ArtifactError

_MOST_PATTERN = 500  # characters
_REPEATED_GROUP = re.compile(r"\)\s*[*+{]")  # what a name may take for ever to be matched with


@dataclass(frozen=True)
class Scheme:
    """How linears are quantized.

    Attributes:
        per_channel: whether each row of a weight has a scale of its own.
        static: whether the input's scale is in the file; else each token has one, found as it runs.
    """

    per_channel: bool
    static: bool


class Schemes:
    """The groups of a checkpoint."""

    def __init__(self, config: Any) -> None:
        """Checks ``quantization_config``.

        Raises:
            ArtifactError: naming the first thing in it that is not INT8 W8A8 as our kernels have it.
        """
        if not isinstance(config, dict) or config.get("quant_method") != "compressed-tensors":
            raise ArtifactError("its quantization_config is not of compressed-tensors: load it with another tool")
        _only(config, "format", ("int-quantized",), "quantization_config")
        _only(config, "quantization_status", ("compressed", None), "quantization_config")
        for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
            if config.get(key):
                raise ArtifactError(f"its quantization_config has a {key}, which is not read: export it without")
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise ArtifactError("its quantization_config has no config_groups: export it again")
        self._ignore = _names(config.get("ignore") or [], "ignore")
        self._groups = [(_names(_group(g, n).get("targets"), f"{n}.targets"), _scheme(g, n)) for n, g in groups.items()]

    def of(self, classes: Sequence[str], names: Sequence[str]) -> Scheme | None:
        """How a module is quantized, by the names of its classes and its own; None for one that stays in float."""
        if any(_matches(rule, names) or rule in classes for rule in self._ignore):
            return None
        for named in (True, False):  # a group that names a module comes before one that names its class
            for rules, scheme in self._groups:
                if any(_matches(r, names) if named else r in classes for r in rules):
                    return scheme
        return None


def _matches(rule: str, names: Sequence[str]) -> bool:
    if rule.startswith("re:"):
        return any(re.match(rule[3:], n) for n in names)
    return rule in names


def _group(group: Any, name: str) -> dict[str, Any]:
    if not isinstance(group, dict):
        raise ArtifactError(f"its group {name[:100]!r} is no object: export it again")
    if group.get("output_activations"):
        raise ArtifactError(f"its group {name[:100]!r} quantizes output_activations, which is not read")
    _only(group, "format", ("int-quantized", None), name)
    return group


def _scheme(group: dict[str, Any], name: str) -> Scheme:
    weights, inputs = group.get("weights"), group.get("input_activations")
    for what, args in (("weights", weights), ("input_activations", inputs)):
        where = f"{name[:100]}.{what}"
        if not isinstance(args, dict):
            raise ArtifactError(f"its {where} is none: only weights and inputs that are both INT8 are read")
        _only(args, "num_bits", (8,), where)
        _only(args, "type", ("int",), where)
        _only(args, "symmetric", (True,), where)
        for key in ("group_size", "block_structure", "actorder"):
            _only(args, key, (None,), where)
    assert isinstance(weights, dict) and isinstance(inputs, dict)
    _only(weights, "strategy", ("channel", "tensor"), f"{name[:100]}.weights")
    _only(weights, "dynamic", (False, None), f"{name[:100]}.weights")
    where = f"{name[:100]}.input_activations"
    _only(inputs, "strategy", ("token", "tensor"), where)
    static = inputs["strategy"] == "tensor"
    _only(inputs, "dynamic", (False, None) if static else (True,), where)
    return Scheme(weights["strategy"] == "channel", static)


def _only(args: dict[str, Any], key: str, taken: tuple[Any, ...], where: str) -> None:
    found = args.get(key)
    if not any(type(found) is type(t) and found == t for t in taken):
        known = " or ".join(str(t) for t in taken if t is not None) or "none"
        raise ArtifactError(f"its {where} has {key}={str(found)[:50]!r}, and only {known} is read")


def _names(rules: Any, where: str) -> list[str]:
    if not isinstance(rules, list) or not all(isinstance(r, str) for r in rules):
        raise ArtifactError(f"its {where[:100]} is no list of names: export it again")
    for r in rules:
        if not r.startswith("re:"):
            continue
        try:
            good = len(r) <= _MOST_PATTERN and not _REPEATED_GROUP.search(r)
            re.compile(r[3:])
        except (re.error, OverflowError, RecursionError):
            good = False
        if not good:
            raise ArtifactError(f"its {where[:100]} has the pattern {r[:100]!r}, which is not read: list the names")
    return rules
