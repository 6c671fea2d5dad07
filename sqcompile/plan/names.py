"""names: sites and refusals as a person would write them. Pure functions of parameter names.

Before:  model.layers.0.input_layernorm.weight -> model.layers.0.self_attn.q_proj.weight, ... (and so for each layer)
After:   model.layers.{0..31}: input_layernorm -> q_proj, k_proj, v_proj
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

# which products of an attention run in INT8, in words
PRODUCTS = {"none": "float", "qk": "int8 QKᵀ", "qk_pv": "int8 QKᵀ, PV"}

# A producer without a parameter of its own is named by its node, "rms_norm_3": the operation's name is what a person says.
_OPERATION = re.compile(r"(layer_norm|rms_norm|mul|linear)(_(default|tensor))?(_\d+)?")
_SPOKEN = {"layer_norm": "layernorm", "rms_norm": "rmsnorm", "mul": "scale"}

_RUNS = 4  # ranges of indices that are said one by one where a line is to be short

# A number that is a whole component of a qualified name: the index of a repeated block. Not one of "{0..2, 5}".
_INDEX = re.compile(r"(?:(?<=[. ])|^)\d+(?=[.:, ]|$)(?![^{}]*\})")


@dataclass(frozen=True)
class SiteLabel:
    """One smoothing site in words; ``str`` of it is one line.

    Attributes:
        key: the site's name in ``plan.scales``.
        block: the repeated block its balance layers stand in, "model.layers.0"; "" where there is none.
        producer: what absorbs 1/s; "" where the input of the balance layers is multiplied explicitly.
        balance: the linears that absorb s.
    """

    key: str
    block: str
    producer: str
    balance: tuple[str, ...]

    def __str__(self) -> str:
        layers = ", ".join(collapse(self.balance))
        text = f"{self.producer} -> {layers}" if self.producer else f"{layers} input × 1/s"
        return f"{self.block}: {text}" if self.block else text


class Names:
    """Short names among a model's parameters: as few components as tell a name from the others of its block."""

    def __init__(self, parameters: Iterable[str]) -> None:
        self._parameters = set(parameters)
        self._suffixes: dict[tuple[str, ...], Counter[tuple[str, ...]]] = {}
        for name in self._parameters:
            path = _path(name)
            for block in _blocks(path):
                rest = path[len(block) :]
                counts = self._suffixes.setdefault(block, Counter())
                counts.update(rest[i:] for i in range(len(rest)))

    def block(self, names: Iterable[str]) -> str:
        """The innermost repeated block that all the names stand in, "model.layers.0", or ""."""
        around = [_blocks(_path(n)) for n in names]
        common = [b for b in around[0] if all(b in other for other in around)] if around else [()]
        return ".".join(max(common, key=lambda block: len(block)))

    def short(self, name: str, block: str = "") -> str:
        """The shortest suffix of a parameter's module that nothing else in the block has."""
        path, at = _path(name), tuple(block.split(".")) if block else ()
        if path[: len(at)] != at:
            at = ()
        rest, counts = path[len(at) :], self._suffixes.get(at, Counter())
        own = not name.partition("#")[0].endswith(".weight")  # "norm.g" is not said as "g"
        if any(part.isdigit() for part in rest[:-1]):
            return ".".join(rest)  # in a block of its own, which is part of the name
        for k in range(min(1 + own, len(rest)), len(rest)):
            if counts[rest[-k:]] <= 1 and not rest[-k].isdigit():
                return ".".join(rest[-k:])
        return ".".join(rest)

    def site(self, key: str) -> SiteLabel:
        """The label of a site, from its name in a plan."""
        producer, _, rest = key.partition(" -> ")
        balance = rest.split(", ")
        block = self.block(balance)
        layers = tuple(self.short(n, block) for n in balance)
        return SiteLabel(key, block, "" if producer == "input" else self.producer(producer, block), layers)

    def producer(self, name: str, block: str = "") -> str:
        """A producer's short name; an operation's own name where it has no parameter."""
        operation = _OPERATION.fullmatch(name)
        if operation and name not in self._parameters:
            return _SPOKEN.get(operation[1], operation[1])
        return self.short(name, block)


def site_labels(keys: Iterable[str], linears: Iterable[str]) -> tuple[SiteLabel, ...]:
    """A label for each site, in the order of their linears: a plan that was read has them in that of its file.

    Args:
        keys: names of sites, "producer -> balance layers", as in ``plan.scales``.
        linears: the names of all the model's linears in graph order, which short names must tell apart.
    """
    linears = list(linears)
    at = {name: i for i, name in enumerate(linears)}
    keys = sorted(keys, key=lambda key: min(at.get(n, len(at)) for n in key.partition(" -> ")[2].split(", ")))
    producers = {key.partition(" -> ")[0] for key in keys}
    named = {p for p in producers if p != "input" and not _OPERATION.fullmatch(p)}
    names = Names({*linears, *named})
    return tuple(names.site(key) for key in keys)


def linear_labels(linears: Iterable[str]) -> dict[str, str]:
    """A label for each of a model's linears: "model.layers.0: q_proj"."""
    linears = list(linears)
    names = Names(linears)
    blocks = {n: names.block([n]) for n in linears}
    return {n: f"{b}: {names.short(n, b)}" if b else names.short(n) for n, b in blocks.items()}


def refusal_lines(refusals: Iterable[tuple[str, str]], linears: Iterable[str]) -> list[str]:
    """One line per reason and block: "encoder.layer.{0..11}: output.dense: its input passes gelu, ...".

    Args:
        refusals: linears by name, each with the reason why no parameter can absorb its input scales.
        linears: the names of all the model's linears.
    """
    names = Names(linears)
    groups: dict[tuple[str, str], list[str]] = {}
    for name, reason in refusals:
        block = names.block([name])
        reason = reason.replace(".weight ", " ").replace(f"{block}." if block else "\0", "")
        groups.setdefault((block, reason), []).append(name)
    lines = []
    for (block, reason), members in groups.items():
        text = f"{', '.join(names.short(n, block) for n in members)}: {reason}"
        lines.append(f"{block}: {text}" if block else text)
    return collapse(lines)


def collapse(lines: Iterable[str]) -> list[str]:
    """Lines that differ in the index of a block alone become one: "layers.0: x", "layers.1: x" -> "layers.{0..1}: x"."""
    return [line for line, _ in grouped(lines)]


def grouped(lines: Iterable[str]) -> list[tuple[str, list[int]]]:
    """The lines that `collapse` gives, each with the positions of those it stands for."""
    out = [(line, [i]) for i, line in enumerate(lines)]
    for place in reversed(range(max((len(_INDEX.findall(l)) for l, _ in out), default=0))):
        out = _merge(out, [place])
    return _merge(out, None)


def _merge(lines: list[tuple[str, list[int]]], places: list[int] | None) -> list[tuple[str, list[int]]]:
    """Merges lines equal up to the index at some places; None: all indices, where they differ by a constant."""
    groups: dict[tuple[object, ...], list[tuple[list[int], list[int]]]] = {}
    for line, members in lines:
        found = list(_INDEX.finditer(line))
        chosen = found if places is None else [found[p] for p in places if p < len(found)]
        cuts = [0, *(c for m in chosen for c in m.span()), len(line)]
        between = [line[a:b] for a, b in zip(cuts[::2], cuts[1::2], strict=True)]
        values = [int(m[0]) for m in chosen]
        groups.setdefault((*between, *(v - values[0] for v in values)), []).append((values, members))
    merged = []
    for key, rows in groups.items():
        columns = [_ranges(column) for column in zip(*(values for values, _ in rows), strict=True)]
        between = [str(part) for part in key[: len(columns) + 1]]
        text = between[0] + "".join(c + b for c, b in zip(columns, between[1:], strict=True))
        merged.append((text, [i for _, members in rows for i in members]))
    return merged


def _ranges(values: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> "{0..2, 5}"; a single number stays as it is."""
    runs: list[list[int]] = []
    for v in sorted(set(values)):
        if runs and v == runs[-1][1] + 1:
            runs[-1][1] = v
        else:
            runs.append([v, v])
    text = ", ".join(str(a) if a == b else f"{a}..{b}" for a, b in runs)
    return text if len(runs) == 1 and runs[0][0] == runs[0][1] else f"{{{text}}}"


def abbreviated(name: str) -> str:
    """A name with ranges, where many of them are said as their number: "h.{0..1, 3, 5, 7..8, 10}.fc" -> "h.{7 of 0..10}.fc"."""

    def said(found: re.Match[str]) -> str:
        ends = [[int(n) for n in run.split("..")] for run in found[1].split(", ")]
        if len(ends) <= _RUNS:
            return found[0]
        return f"{{{sum(run[-1] - run[0] + 1 for run in ends)} of {ends[0][0]}..{ends[-1][-1]}}}"

    return re.sub(r"\{(\d[\d., ]*)\}", said, name)


def _path(name: str) -> tuple[str, ...]:
    """The components of a parameter's module; of the parameter itself where it is no ".weight"."""
    base, mark, use = name.partition("#")
    parts = base.removesuffix(".weight").split(".")
    parts[-1] += mark + use
    return tuple(parts)


def _blocks(path: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The blocks a path stands in: its proper prefixes that end in an index, and the whole model."""
    return [(), *(path[: i + 1] for i in range(len(path) - 1) if path[i].isdigit())]
