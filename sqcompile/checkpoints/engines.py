"""engines: what a plan comes to where another engine runs its INT8 linears: compressed-tensors, as vLLM reads it.

Before:  q, k with a static Δ each, v in float; experts static; lm_head quantized
After:   q, k, v in float; experts with a scale for each token; lm_head in float

An engine knows linears by their modules, not by their products. It has one scheme for all experts, and one for linears
that it computes as one: those that read the same value in the same module, such as q, k and v.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch
from torch import fx, nn

from sqcompile.checkpoints.names import CheckpointNames
from sqcompile.checkpoints.parameters import undo_layout
from sqcompile.checkpoints.replan import Changed, as_float, per_token
from sqcompile.checkpoints.skeleton import DTYPES
from sqcompile.errors import FormatError
from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import Linear, constants, find_linears, leaves, nodes_by_name
from sqcompile.plan.entries import LayerPlan
from sqcompile.plan.plan import Plan

_TAKE = "calibrate with Recipe(activation='per_token', rotate='none')"
_HEAD = "stays in float, as engines compute the projection to the vocabulary in float"
_NO_LINEAR = "stays in float, as its weight is not that of an nn.Linear"
_SHARED = "stays in float, as its weight is also read where nothing is quantized"
_EXPERTS = "stays in float, as a checkpoint does not hold its experts one by one"
_OTHER_INPUT = "gets a scale for each token in the place of a static one, which was for another input"
_STATIC = "gets a scale for each token in the place of a static one, as engines have no static scales of experts"


def refuse(plan: Plan, dtype: torch.dtype) -> None:
    """Refuses what compressed-tensors cannot say of INT8, or nobody reads; ``dtype``: of the model.

    Raises:
        FormatError: naming the recipe to take, or how to convert the model.
    """
    if dtype not in DTYPES.values():
        raise FormatError(
            f"the model is of {str(dtype).removeprefix('torch.')}, which no engine reads: convert it, as by model.float(), and "
            "calibrate it again"
        )
    quantized = [l for l in plan.layers if l.quantized]
    if plan.recipe.dtype != "int8":
        raise FormatError(f"the plan is of dtype={plan.recipe.dtype!r}, and this export of INT8: {_TAKE}")
    if any(a.quantized != "none" for a in plan.attention):
        raise FormatError(f"the plan has INT8 attention, for which compressed-tensors has no format: {_TAKE}")
    if any((l.activation or plan.recipe.activation) == "per_tensor" for l in quantized):
        raise FormatError(
            "the plan has one dynamic scale for each input (activation='per_tensor'), which no engine reads: "
            f"{_TAKE}, or activation='per_tensor_static'"
        )


def for_engines(traced: fx.GraphModule, given: Plan, plan: Plan, names: CheckpointNames) -> tuple[Plan, list[Changed]]:
    """The nearest plan that an engine runs, and what was changed.

    Args:
        traced: the graph of the model.
        given: the plan that was asked for.
        plan: what a checkpoint can express of it (`representable`).
        names: of the model.

    Raises:
        FormatError: if nothing is quantized then.
    """
    editor = _Editor(traced, plan, names)
    static = {l.name for l in given.layers if l.input_scale is not None}
    editor.changed += [
        Changed(l.name, _OTHER_INPUT) for l in plan.layers if l.name in static and l.quantized and l.input_scale is None
    ]
    editor.weights()
    editor.experts()
    editor.fused()
    if not any(l.quantized for l in editor.layers.values()):
        raise FormatError(
            f"no linear would be INT8 in the checkpoint ({editor.changed[0].what}): export it as 'smoothed'"
        )
    return dataclasses.replace(plan, layers=tuple(editor.layers.values())), editor.changed


def of_own_forward(plan: Plan, names: CheckpointNames) -> str | None:
    """In words, that transformers cannot run some linears in INT8, whose classes compute by themselves; None if none do.

    compressed-tensors runs those of `torch.nn.Linear.forward`; engines have layers of their own, and need no class.
    """
    modules = dict(names.model.named_modules())
    found = (modules.get(l.name.partition("#")[0].rpartition(".")[0]) for l in plan.layers if l.quantized)
    odd = {type(m).__name__ for m in found if isinstance(m, nn.Linear) and type(m).forward is not nn.Linear.forward}
    if not odd:
        return None
    return (
        f"transformers cannot run it: {', '.join(sorted(odd))} has a forward of its own, to which compressed-tensors gives INT8 "
        "weights. sqcompile.load reads it, and engines that have their own layers for this model"
    )


class _Editor:
    def __init__(self, traced: fx.GraphModule, plan: Plan, names: CheckpointNames) -> None:
        self.names = names
        self.layers = {l.name: l for l in plan.layers}
        self.linears = [l for l in find_linears(traced) if l.name in self.layers]
        self.changed: list[Changed] = []
        nodes = nodes_by_name(traced)
        laid_out = {l.name: undo_layout(nodes[l.weight]) for l in self.linears}
        self.weight = {name: found[0] if found else "" for name, found in laid_out.items()}
        self.readers = _readers(traced)
        aliases = about(traced).aliases
        self.owners = {l.name: aliases.get(self.weight[l.name], ()) for l in self.linears}

    def weights(self) -> None:
        """Linears are modules: of one weight, all uses are alike."""
        modules = dict(self.names.model.named_modules())
        head = self.names.model.get_output_embeddings()
        by_weight: dict[str, list[Linear]] = {}
        for l in self.linears:
            owners = [modules.get(n.rpartition(".")[0]) for n in self.owners[l.name] if n.endswith(".weight")]
            if head is not None and any(m is head for m in owners):
                self._float([l], _HEAD)
            elif not l.experts and not any(isinstance(m, nn.Linear) for m in owners):
                self._float([l], _NO_LINEAR)
            else:
                by_weight.setdefault(self.weight[l.name] or l.name, []).append(l)
        for weight, uses in by_weight.items():
            if self.readers.get(weight, set()) - {l.node for l in uses}:
                self._float(uses, _SHARED)
            self._alike(uses, "use the same weight")

    def experts(self) -> None:
        """Experts have one scheme, which is dynamic."""
        groups: dict[str, list[Linear]] = {}
        for l in self.linears:
            if l.experts:
                groups.setdefault(_parent(self.owners[l.name]), []).append(l)
        for group in groups.values():
            if not all(_apart(self.names, self.owners[l.name], l) for l in group):
                self._float(group, _EXPERTS)
            static = [l for l in group if self.layers[l.name].input_scale is not None]
            self._edit(static, _STATIC, lambda l: per_token(l, sqnr_db=None, loss=None))
            self._alike(group, "are experts of one block")

    def fused(self) -> None:
        """Linears that read the same value in the same module are computed as one."""
        groups: dict[tuple[str, str], list[Linear]] = {}
        for l in self.linears:
            if not l.experts and self.weight[l.name]:
                groups.setdefault((l.x, _parent(self.owners[l.name], 2)), []).append(l)
        for group in groups.values():
            self._alike(group, "are computed as one")

    def _alike(self, group: list[Linear], why: str) -> None:
        """One scheme for linears, and one static scale: the largest, which clips none of their inputs."""
        if len(group) < 2:
            return
        every = [self.layers[l.name] for l in group]
        if len({(l.quantized, l.input_scale is not None) for l in every}) > 1:
            self._float(group, f"stays in float, as linears that {why} need one scheme")
            return
        scales = {l.input_scale for l in every if l.input_scale is not None}
        if len(scales) > 1:
            what = f"takes the largest static scale of the linears that {why}"
            largest = max(scales)
            smaller = [l for l in group if self.layers[l.name].input_scale != largest]
            self._edit(smaller, what, lambda l: dataclasses.replace(l, input_scale=largest, sqnr_db=None, loss=None))

    def _float(self, linears: Iterable[Linear], why: str) -> None:
        self._edit([l for l in linears if self.layers[l.name].quantized], why, lambda l: as_float(l, why))

    def _edit(self, linears: Iterable[Linear], what: str, how: Callable[[LayerPlan], LayerPlan]) -> None:
        for l in linears:
            self.layers[l.name] = how(self.layers[l.name])
            self.changed.append(Changed(l.name, what))


def _readers(traced: fx.GraphModule) -> dict[str, set[str]]:
    """By parameter, the nodes whose value is not constant that read it, or what is computed from it."""
    const, found = constants(traced), dict[str, set[str]]()
    for node in traced.graph.nodes:
        if node not in const:
            for a in node.all_input_nodes:
                for leaf in leaves(a) if a in const else ():
                    found.setdefault(str(leaf.target), set()).add(node.name)
    return found


def _parent(owners: tuple[str, ...], levels: int = 1) -> str:
    """The module around a parameter, or around its module."""
    return owners[0].rsplit(".", levels)[0] if owners else ""


def _apart(names: CheckpointNames, owners: tuple[str, ...], l: Linear) -> bool:
    """Whether a checkpoint holds a weight [E, N, K] as [N', K] for each expert, under names of modules."""
    held = names.of(owners[0]) if owners and owners[0] in names.every else ()
    return (
        held != owners[:1]
        and bool(held)
        and len(held) % (l.experts or 1) == 0
        and all(n.endswith(".weight") for n in held)
    )
