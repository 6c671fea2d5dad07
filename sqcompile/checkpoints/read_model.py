"""read_model: a directory of INT8 weights -> the quantized graph. No int8 weight ever has a float copy.

    config.json + q_proj.weight int8 [N, K], q_proj.weight_scale [N, 1]
->
    model without weights -> trace -> plan -> insert_qdq, with weights that are read as they are packed

A weight that is int8 in the files has a float parameter only for the trace: memory of the system that is never touched.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from sqcompile.capture.call_spec import to_spec
from sqcompile.capture.inputs import Call, Forward
from sqcompile.capture.trace import trace
from sqcompile.checkpoints.names import CheckpointNames
from sqcompile.checkpoints.parameters import undo_layout
from sqcompile.checkpoints.read_experts import Part, parts_of, together
from sqcompile.checkpoints.read_files import CONFIG, Files, identity_of, read_json
from sqcompile.checkpoints.read_scheme import Scheme, Schemes
from sqcompile.checkpoints.skeleton import known_config, skeleton
from sqcompile.errors import ArtifactError, SQCompileError
from sqcompile.files.regular import said
from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import find_linears, nodes_by_name
from sqcompile.passes.ir.verify import verify
from sqcompile.passes.rewrite.insert_qdq import insert_qdq
from sqcompile.passes.rewrite.weight_store import Lazy, Shared
from sqcompile.plan.entries import LayerPlan
from sqcompile.plan.plan import Plan
from sqcompile.plan.recipe import Activation, Recipe


@dataclass(frozen=True)
class ReadModel:
    """What a directory holds.

    Attributes:
        graph: of the quantized stage; its int8 weights are lazy (``About.lazy``), read from the files.
        plan, call: as of a compiled model.
        identity: of its files, see `identity_of`.
    """

    graph: fx.GraphModule
    plan: Plan
    call: Forward
    identity: str


def is_checkpoint(folder: str) -> bool:
    """Whether a directory is one of transformers with quantized weights.

    Raises:
        ArtifactError: if its config.json cannot be read.
    """
    return os.path.lexists(os.path.join(folder, CONFIG)) and "quantization_config" in read_json(folder, CONFIG)


def read_model(folder: str) -> ReadModel:
    """Reads a directory of compressed-tensors INT8 weights.

    Raises:
        ArtifactError: if it is another format, is damaged, or is a model that is not read.
    """
    try:
        return _read(folder)
    except SQCompileError as e:
        raise ArtifactError(f"{folder} cannot be loaded: {e}") from e
    except Exception as e:  # of whatever a configuration that fits no model leads to
        raise ArtifactError(f"{folder} cannot be loaded ({said(e)}): copy the directory again, whole") from e


def _read(folder: str) -> ReadModel:
    config = read_json(folder, CONFIG)
    schemes = Schemes(config.pop("quantization_config", None))
    identity, files = identity_of(folder), Files(folder)
    model = _skeleton(config)
    names = CheckpointNames(model)
    filled = _Filled(model, names, files, schemes)
    filled.fill()
    ids = torch.zeros(2, 16, dtype=torch.int64)
    call = Call((), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    traced = trace(model, call)
    layers = filled.layers(traced)
    plan = Plan(_recipe(layers), to_spec(call), {}, layers)
    gm = insert_qdq(traced, plan, Shared(_memory, lambda key: None))
    by_scale = {f"{name.replace('#', '_use')}_scale": leaf for name, leaf in filled.read.items()}
    lazy = about(gm).lazy
    for name, old in lazy.items():
        leaf = by_scale[old.beside[0]]
        lazy[name] = Lazy(("file", leaf), functools.partial(filled.weight, leaf), old.beside)
    return ReadModel(verify(gm, "quantized"), plan, Forward.of(model), identity)


def _recipe(layers: tuple[LayerPlan, ...]) -> Recipe:
    """Static if any linear is; and what single linears say of themselves."""
    static = any(l.input_scale is not None for l in layers)
    others = {
        l.name: fields
        for l in layers
        if (fields := {f: getattr(l, f) for f in ("activation", "weight") if getattr(l, f) is not None})
    }
    return Recipe(smooth=False, activation="per_tensor_static" if static else "per_token", overrides=others)


def _skeleton(config: dict[str, Any]) -> Any:
    """The model, a causal language model, over memory that nothing has touched."""
    known, dtype = known_config(config)
    import transformers

    classes = config.get("architectures")
    if type(known) not in transformers.AutoModelForCausalLM._model_mapping or (
        classes and not str(classes[0]).endswith(("ForCausalLM", "LMHeadModel"))
    ):
        raise ArtifactError(f"it is {str(classes or known.model_type)[:80]}, and only causal language models are read")
    return skeleton(known, transformers.AutoModelForCausalLM, dtype or torch.float32).requires_grad_(False)


class _Filled:
    """A model whose float tensors are the files'.

    Attributes:
        schemes: of the int8 weights, by their names in memory.
        read: which weight of the model a linear of the graph has, by the linear's name.
    """

    def __init__(self, model: Any, names: CheckpointNames, files: Files, schemes: Schemes) -> None:
        self.model, self.names, self.files = model, names, files
        self.schemes: dict[str, Scheme] = {}
        self.read: dict[str, str] = {}
        self._steps: dict[str, float] = {}
        self._held: dict[str, str] = {}
        self._parts: dict[str, list[Part]] = {}  # of experts
        self._schemes = schemes

    def fill(self) -> None:
        """Checks all tensors, and puts the float ones into the model.

        Raises:
            ArtifactError: for one that is missing, is too many, or is not what the model has.
        """
        used: set[str] = set()
        for name in self.names.saved:
            held, t = self.names.of(name), self.names.every[name]
            owner, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(owner)
            if len(held) != 1 or self._converted(name, t):
                self._parts[name] = parts_of(self.names, name)
                scheme = self._of_experts(name)
            else:
                self._held[name] = held[0]
                linear = leaf == "weight" and isinstance(module, nn.Linear)
                classes = [c.__name__ for c in type(module).__mro__]
                scheme = self._schemes.of(classes, self.names.modules_of(name)) if linear else None
            used.update(held)
            if scheme is None:
                own = getattr(module, leaf)  # the state_dict has a detached alias of it
                own.data = self._floats(name, t)
                continue
            self.schemes[name] = scheme
            self._check(name)
            used.update(f"{n}_scale" for n in held)
            if scheme.static:
                step = f"{held[0].removesuffix('weight')}input_scale"
                self._steps[name] = self.files.scale(step, [[1], []]).item()
                used.add(step)
        if left := sorted(self.files.found.keys() - used - {n for k in self.names.every for n in self.names.of(k)}):
            raise ArtifactError(
                f"the model has no place for the tensor {left[0][:100]!r} ({len(left)} such): export it again"
            )

    def _converted(self, name: str, t: Tensor) -> bool:
        """Whether a checkpoint has the tensor in another shape."""
        stand_in = torch.empty_like(t, device="meta")
        return next(iter(self.names.convert({name: stand_in}).values())).shape != t.shape

    def _of_experts(self, name: str) -> Scheme | None:
        """The scheme of experts, which a checkpoint has as linears."""
        every = [self._schemes.of(["Linear"], [p.name.removesuffix(".weight")]) for p in self._parts[name]]
        if len(set(every)) > 1:
            raise ArtifactError(f"{name} is quantized in several ways: export its experts in one")
        if every[0] is not None and every[0].static:
            raise ArtifactError(f"{name} has experts with static scales, which are not read: export them per token")
        return every[0]

    def _floats(self, name: str, t: Tensor) -> Tensor:
        if name not in self._parts:
            return self.files.floats(self._held[name], t.shape, t.dtype)
        columns = t.shape[2]
        return together(self._parts[name], t.shape, lambda n, rows: self.files.floats(n, (rows, columns), t.dtype))

    def _check(self, name: str) -> None:
        """Looks at an int8 weight, and touches no more of it than the scales."""
        columns = self.names.every[name].shape[-1]
        for part in self._parts.get(name, ()):
            self.files.int8(part.name, (len(part.rows), columns))
            self._scale(name, part.name, len(part.rows))
        if name not in self._parts:
            self.weight(name)

    def _scale(self, name: str, held: str, rows: int) -> Tensor:
        per_channel = self.schemes[name].per_channel
        return self.files.scale(f"{held}_scale", [[rows, 1], [rows]] if per_channel else [[1], []])

    def weight(self, name: str) -> tuple[Tensor, Tensor]:
        """A weight as it is in the files: int8 [N, K], and its scales float32 [N], or [1] per tensor.

        Of experts int8 [E, N, K], made of the files' matrices, and float32 [E, N].
        """
        shape = self.names.every[name].shape
        if name not in self._parts:
            held = self._held[name]
            return self.files.int8(held, shape), self._scale(name, held, shape[0])
        parts = self._parts[name]
        q = together(parts, shape, lambda n, rows: self.files.int8(n, (rows, shape[2])))
        return q, together(parts, shape[:2], lambda n, rows: self._scale(name, n, rows).expand(rows))

    def layers(self, traced: fx.GraphModule) -> tuple[LayerPlan, ...]:
        """What is done with each linear of the graph.

        Raises:
            ArtifactError: if an int8 weight is read otherwise than by linears.
        """
        nodes, found = nodes_by_name(traced), []
        dynamic: Activation | None = "per_token" if self._steps else None  # among static ones, each says so
        for l in find_linears(traced):
            at = undo_layout(nodes[l.weight])
            leaf = next((n for n in (about(traced).aliases.get(at[0], ()) if at else ()) if n in self.schemes), None)
            shape = (l.out_features, l.in_features) if l.experts is None else l.shape
            if leaf is None:
                found.append(
                    LayerPlan(
                        l.name, "experts" if l.experts else "linear", False, "none", "float in the files", shape=shape
                    )
                )
                continue
            if shape != tuple(self.names.every[leaf].shape):
                raise ArtifactError(f"{leaf} is transposed before it is used: this is not read")
            scheme = self.schemes[leaf]
            self.read[l.name] = leaf
            found.append(
                LayerPlan(
                    l.name, "experts" if l.experts else "linear", True, "none", "int8 in the files", shape=shape,
                    input_scale=self._steps.get(leaf),
                    activation=None if scheme.static else dynamic,
                    weight=None if scheme.per_channel or l.experts else "per_tensor",
                )
            )  # fmt: skip
        if idle := sorted(self.schemes.keys() - set(self.read.values())):
            raise ArtifactError(f"{idle[0]} is int8 in the files, and the model does not use it as a linear")
        return tuple(found)


def _memory(tensor: Tensor) -> Hashable:
    """Which memory a tensor is."""
    return tensor.data_ptr(), tuple(tensor.shape)
