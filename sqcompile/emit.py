"""emit: a lowered graph becomes a module with the model's own signature and output type."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sqcompile.errors import CaptureError, StageError
from sqcompile.inputs import bind, flatten_like
from sqcompile.passes.graph import clone, get_tensor, set_tensor, value
from sqcompile.plan import Plan
from sqcompile.report import Report
from sqcompile.stages import Stages

BACKENDS = ("inductor", "eager")


class CompiledModel(nn.Module):
    """The compiled model: call it as the model it was made from.

    Attributes:
        plan: what was decided; ``sqcompile.compile(model, plan=compiled.plan)`` gives the same module without data.
        report: one line per linear.
        stages: the graphs "traced", "folded", "quantized" and "lowered".
    """

    def __init__(
        self, lowered: fx.GraphModule, signature: inspect.Signature, plan: Plan, stages: Stages, backend: str
    ) -> None:
        super().__init__()
        self.lowered = lowered
        self.plan, self.report, self.stages = plan, Report.of(plan, lowered), stages
        self._signature = signature
        self._captured, self._out_spec = lowered.meta["captured"], lowered.meta["out_spec"]
        flat, self._used = flatten(lowered)
        self._run: Callable[..., Any] = inductor(flat) if backend == "inductor" else flat
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own signature and output type; no gradients.

        Raises:
            CaptureError: for a call with other arguments than the captured ones.
        """
        try:
            call = bind(self._signature, args, kwargs)
        except TypeError as e:
            raise CaptureError(f"the call does not fit the model's signature {self._signature}: {e}") from e
        leaves = flatten_like(call, self._captured)
        with torch.no_grad():
            out = self._run(*[leaves[i] for i in self._used])
        return pytree.tree_unflatten(list(out), self._out_spec)

    def draw(self, path: str | os.PathLike[str], stage: str = "traced", full: bool = False) -> None:
        """Draws a stage to a .svg or .html file: what absorbs 1/s, what absorbs s, INT8 GEMMs, refusals.

        Args:
            path: where to; the page shows each node's text and reason where the pointer is.
            stage: "traced", "folded", "quantized" or "lowered".
            full: draws every block; otherwise of four and more equal blocks in a row, one.

        Raises:
            DrawError: for another suffix, or a path that cannot be written.
            StageError: if the float model is gone, from which stages are rebuilt, or its parameters changed.
        """
        from sqcompile.draw import draw

        draw(path, self.stages["traced"], self.plan, self.stages[stage], full)

    def weight_bytes(self) -> int:
        """Bytes of all tensors the compiled model holds; a packed weight counts as its int8 values."""
        return sum(tensor_bytes(b) for b in self.lowered.buffers())

    def train(self, mode: bool = True) -> CompiledModel:
        """Only evaluation exists.

        Raises:
            StageError: for ``train(True)``.
        """
        if mode:
            raise StageError("a compiled model cannot be trained: train the float model and compile it again")
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompiledModel:
        raise StageError(
            "a compiled model stays on the device and in the dtype it was compiled for: move the float model, then "
            "sqcompile.compile(model.to(...), plan=compiled.plan), which needs no data"
        )


def emit(
    lowered: fx.GraphModule, signature: inspect.Signature, plan: Plan, stages: Stages, backend: str
) -> CompiledModel:
    """Makes the module.

    Args:
        lowered: the lowered graph. The model's own tensors in it are copied, so that nothing is shared with the model.
        signature: of the model's forward.
        plan, stages: for the user.
        backend: "inductor" compiles the graph once for all shapes; "eager" runs it as it is.
    """
    copies: dict[int, Tensor] = {}  # a tied tensor is copied once
    for n in lowered.graph.find_nodes(op="get_attr"):
        name = str(n.target)
        if name in stages.original:
            tensor = get_tensor(lowered, name)
            set_tensor(lowered, name, _copy(tensor, copies))
    return CompiledModel(lowered, signature, plan, stages, backend)


def _copy(tensor: Tensor, copies: dict[int, Tensor]) -> Tensor:
    key = tensor.data_ptr()
    if key not in copies or copies[key].shape != tensor.shape:
        copies[key] = tensor.clone()
    return copies[key]


def tensor_bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def flatten(gm: fx.GraphModule) -> tuple[fx.GraphModule, list[int]]:
    """The graph from flat tensors to a flat tuple, and which leaves of a call it reads."""
    flat = clone(gm)
    flat.graph.set_codegen(fx.graph.CodeGen())
    used = []
    for i, n in enumerate(flat.graph.find_nodes(op="placeholder")):
        if isinstance(value(n), (Tensor, torch.SymInt)):
            used.append(i)
        elif n.users:
            raise StageError(f"input {n.name} is a constant of the capture, and yet the graph reads it")
        else:
            flat.graph.erase_node(n)
    flat.recompile()
    return flat, used


def inductor(
    flat: fx.GraphModule, static: list[tuple[Any, bool]] | None = None, guarded: bool = False
) -> Callable[..., Any]:
    """The graph through Inductor, with the symbolic sizes that its capture gave it.

    With ``static`` calls are recorded and replayed as CUDA graphs, one for each set of sizes: it is what Dynamo calls each
    input, and whether its address never changes. ``guarded`` means that somebody checks sizes before each call (Dynamo),
    so that Inductor may fix some.

    Dynamo is not involved, so nothing is ever recompiled: one artifact serves every shape, sizes of 1 included.
    Freezing makes the packed weights constants, which the oneDNN operators need.
    """
    import torch._inductor.config as config
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx

    if static is not None:
        _name_inputs(flat, static)
    fakes = [value(n) for n in flat.graph.find_nodes(op="placeholder")]
    mode = flat.meta["fake_mode"]
    before = dict(mode.shape_env.replacements) if mode.shape_env else {}
    ranges = dict(mode.shape_env.var_to_range) if mode.shape_env else {}
    # the operators' fakes give exact sizes and strides (tested), which need no check at every call
    options = {
        "freezing": True,
        "triton.cudagraphs": static is not None,
        "size_asserts": False,
        "alignment_asserts": False,
    }
    with torch.no_grad(), config.patch(options), tracing(TracingContext(mode)):
        run: Any = compile_fx(flat, fakes)
    after = dict(mode.shape_env.replacements) if mode.shape_env else {}
    fixed = {k: v for k, v in after.items() if k not in before}
    # no guard is checked at a call: a size assumed to stay below the example's next multiple of a block would go unnoticed
    fixed |= {
        k: mode.shape_env.var_to_range[k] for k, r in ranges.items() if _narrowed(r, mode.shape_env.var_to_range[k])
    }
    if fixed and not guarded:
        raise StageError(
            f"Inductor fixed sizes that are dynamic ({fixed}): pass backend='eager' or dynamic_shapes=None"
        )
    return run


def _narrowed(before: Any, after: Any) -> bool:
    """Whether a size's range became smaller, other than by indices being of 32 bits."""
    return bool(after.lower > before.lower or after.upper < min(before.upper, 2**31 - 1))


def _name_inputs(flat: fx.GraphModule, static: list[tuple[Any, bool]]) -> None:
    """Says of each input what it is as Dynamo does: those of a fixed address (a KV cache) are not copied into a graph."""
    from torch._dynamo.source import LocalSource

    flat.meta["dynamo_compile_id"] = None
    own: Any = flat
    own._param_name_to_source = {name: LocalSource(name) for name, _ in flat.named_buffers(remove_duplicate=False)}
    for n, (source, fixed) in zip(flat.graph.find_nodes(op="placeholder"), static, strict=True):
        n._dynamo_source = source
        if fixed:
            n.meta["tensor_dict"] = {"_dynamo_static_input_type": "guarded"}
