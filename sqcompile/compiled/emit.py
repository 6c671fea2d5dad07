"""emit: a lowered graph becomes a module with the model's own signature and output type."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from sqcompile.artifact.directory import save
from sqcompile.artifact.sharded import save_shard
from sqcompile.artifact.tensors import SHARD
from sqcompile.capture.captured import asks_for_gradients, contiguous, flatten_like
from sqcompile.capture.inputs import Forward
from sqcompile.checkpoints.export import Exported, source_of
from sqcompile.compiled.inductor import compile_regions, compile_without_constants, inductor
from sqcompile.compiled.report import Report
from sqcompile.compiled.results import with_own_results
from sqcompile.compiled.stages import Graphs, Stages
from sqcompile.errors import ArtifactError, CaptureError, RecipeError, StageError
from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.flat import flatten
from sqcompile.passes.ir.graph import get_tensor, set_tensor
from sqcompile.plan.notebook import titled
from sqcompile.plan.plan import Plan
from sqcompile.plan.said import linears_in
from sqcompile.process.progress import Enter, Show, part, stages
from sqcompile.programs.export import NATIVE, check_target, export, is_program, write_artifact, write_program
from sqcompile.pytorch.core import pytree

BACKENDS = ("inductor", "eager")

_GRAD = (
    "a compiled model computes no gradients, neither backward nor forward, and an argument of this call asks for one: detach it, "
    "or call the model under torch.no_grad()"
)

_UNSAVED = (
    "a compiled model is neither pickled nor copied, since its INT8 weights are packed for this machine: save it with "
    "compiled.save(directory), and load it with sqcompile.load(directory)"
)


def check_compiler(backend: str, regional: bool) -> None:
    """Raises RecipeError for what compiles no graph."""
    if backend not in BACKENDS:
        raise RecipeError(f"backend={backend!r}: choose one of {', '.join(BACKENDS)}")
    if not isinstance(regional, bool):
        raise RecipeError(f"regional={regional!r}: pass True or False")


class CompiledModel(nn.Module):
    """The compiled model: call it as the model it was made from.

    Attributes:
        plan: what was decided; ``sqcompile.compile(model, plan=compiled.plan)`` gives the same module without data.
        report: what was done with each linear, and why.
        stages: the graphs "traced", "folded", "quantized" and "lowered".
        call: how it is called: the signature of the model that it was made from.
    """

    def __init__(
        self,
        lowered: fx.GraphModule,
        call: Forward,
        plan: Plan,
        stages: Stages,
        run: Callable[[fx.GraphModule], Callable[..., Any]],
    ) -> None:
        super().__init__()
        self.lowered = lowered
        self._graphs = Graphs(stages, lowered)
        self.plan, self.report, self.stages = plan, Report.of(plan, lowered, self._graphs), stages
        self.call = call
        self._captured, self._out_spec = about(lowered).calls, about(lowered).out_spec
        flat, self._used = flatten(lowered)
        self._run = with_own_results(run(flat), flat, stages.original)
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own signature and output type; no gradients.

        Raises:
            CaptureError: for a call with other arguments than the captured ones, with sizes that the capture does not serve,
                or with an argument whose gradient is asked for.
        """
        try:
            call = self.call.bind(args, kwargs)
        except TypeError as e:
            raise CaptureError(f"the call does not fit the model's signature {self.call.signature}: {e}") from e
        leaves = flatten_like(call, self._captured)
        used = contiguous(leaves[i] for i in self._used)
        if asks_for_gradients(used):
            raise CaptureError(_GRAD)
        with torch.no_grad():
            out = self._run(*used)
        return pytree.tree_unflatten(list(out), self._out_spec)

    def draw(
        self,
        path: str | os.PathLike[str],
        stage: str = "traced",
        full: bool = False,
        colour: str = "role",
        *,
        progress: Show = True,
    ) -> None:
        """Draws a stage to an .svg file, or all of them to an .html file: what absorbs 1/s and s, what runs in INT8, and why not.

        Args:
            path: where to; in a page each box can be chosen, to read its operations, its site and its numbers.
            stage: "traced", "folded", "quantized" or "lowered"; a page begins with it.
            full: draws every block; otherwise four and more equal blocks in a row are drawn as one, which a page can unfold.
            colour: "role", or "sqnr": by the signal to quantization noise ratio on the calibration sample.
            progress: as for `sqcompile.compile`; its stages are "draw" and "write".

        Raises:
            DrawError: for another suffix or colour, or a path that cannot be written.
            StageError: if the float model is gone, from which stages are rebuilt, or its parameters changed.
        """
        from sqcompile.draw import draw

        draw(path, self._graphs, self.plan, stage, full, colour, progress)

    def save(
        self, path: str | os.PathLike[str], *, shard_bytes: int = SHARD, code: bool = False, progress: Show = True
    ) -> None:
        """Writes a directory that `sqcompile.load` makes a compiled model of, without this model's class and its data.

        It holds the graph, the INT8 weights before they are packed for this machine, what stays in float, and the plan: as
        safetensors and JSON. The directory appears whole or not at all; one that `save` wrote before is replaced.

        Of a model compiled with ``device_mesh`` every process calls it, and writes its shard into the one directory.

        Args:
            path: of the directory; of a sharded model on a disk that all processes see.
            shard_bytes: how large a file of weights may be, unless a single tensor is larger.
            code: also keeps what Inductor compiles for the model, which takes another compilation, in a process of its own.
                `load(path, code=True)` uses it where versions and machine are the same. Not of a sharded model.
            progress: as for `sqcompile.compile`; its stages are "rebuild", of the INT8 weights, and "write".

        Raises:
            ArtifactError: if something of the model cannot be saved, or the directory cannot be written; in every process
                of a sharded model where that is so in one.
            StageError: if the float model is gone, from which the INT8 weights are made, or its parameters changed.
        """
        parallel = about(self.lowered).parallel
        if parallel.count > 1:
            if code:
                raise ArtifactError(
                    "code=True keeps the code of a whole model, and this one is sharded: leave code out"
                )
            with stages(("rebuild", "write"), progress if parallel.rank == 0 else False) as enter:
                save_shard(lambda: self._rebuilt(enter, "write"), parallel, self.plan, self.call, path, shard_bytes)
            return
        target = about(self.lowered).target
        name = None if target is None else target.name
        with stages(("rebuild", "write"), progress) as enter:
            save(self._rebuilt(enter, "write"), self.plan, self.call, path, shard_bytes, code, name)

    def _rebuilt(self, enter: Enter, then: str) -> fx.GraphModule:
        """The quantized stage; ``enter`` is told when that is there, too, and something is done with it."""
        enter("rebuild")
        quantized = self.stages["quantized"]
        enter(then)
        return quantized

    def export(
        self, format: str, path: str | os.PathLike[str], source: Any = None, *, progress: Show = True
    ) -> Exported:
        """Writes what other tools read: a program of this model, or a checkpoint of its float model, which must still be there.

        Args:
            format, path, source: as for `sqcompile.export`.
            progress: as for `sqcompile.compile`; its stages are those of `sqcompile.export`, or "rebuild", of the INT8
                weights, in the place of "trace", "fold" and "insert_qdq".

        Returns:
            What was written, and what of the plan a checkpoint cannot say; it prints well.

        Raises:
            ArtifactError: as `sqcompile.export`.
            StageError: if the float model is gone, or its parameters changed; or, for a checkpoint, if this model was loaded.
        """
        self._check_whole()
        check_target(format, path, source)
        if format != NATIVE and not is_program(format, source):
            return export(self.stages.model(), self.plan, format, path, source, progress=progress)
        names = ("write",) if format == NATIVE else ("convert", "write")
        beside = source_of(None, source) if format == NATIVE and source is not None else None
        with stages(("rebuild", *names), progress) as enter:
            quantized = self._rebuilt(enter, names[0])
            if format == NATIVE:
                return write_artifact(quantized, self.plan, self.call, path, beside)
            return write_program(quantized, self.plan, format, path, enter)

    def _check_whole(self) -> None:
        if about(self.lowered).parallel.count > 1:
            raise ArtifactError(
                "the model is sharded, and this process has one shard of it: compile the whole model to export it, or save "
                "the shards with compiled.save(directory) in every process"
            )

    def __repr__(self) -> str:
        return f"CompiledModel({self._said()})"

    def _repr_html_(self) -> str:
        return titled(f"CompiledModel: {self._said()}", self.report._repr_html_())

    def _said(self) -> str:
        target = about(self.lowered).target
        devices = sorted({str(b.device) for b in self.lowered.buffers()})
        where = f" on {', '.join(devices)}" if target is None else f" for {target.name}"
        what = linears_in(self.plan.layers, self.plan.recipe.dtype)
        return f"{self.call.name or 'model'}, {what}, {self.weight_bytes() / 1e6:.1f} MB{where}"

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

    def state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises StageError: a file of it would lack the packed weights."""
        raise StageError(_UNSAVED)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise StageError(_UNSAVED)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:  # pickle, copy and deepcopy
        raise StageError(_UNSAVED)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompiledModel:
        probes = [torch.empty(0, dtype=d, device=at) for d, at in {(b.dtype, b.device) for b in self.lowered.buffers()}]
        if all((y.dtype, y.device) == (x.dtype, x.device) for x in probes for y in [fn(x)]):
            return self  # part of a module that is moved to where it is
        raise StageError(
            "a compiled model stays on the device and in the dtype it was compiled for: move the float model, then "
            "sqcompile.compile(model.to(...), plan=compiled.plan), which needs no data"
        )


def emit(
    lowered: fx.GraphModule,
    call: Forward,
    plan: Plan,
    stages: Stages,
    backend: str,
    regional: bool,
    constants: bool = True,
) -> CompiledModel:
    """Makes the module.

    Args:
        lowered: the lowered graph. The model's own tensors in it are copied, so that nothing is shared with the model.
        call: how the model is called.
        plan, stages: for the user.
        backend: "inductor" compiles the graph once for all shapes; "eager" runs it as it is.
        regional: see `compile_regions`.
        constants: whether tensors may be constants of Inductor's code, which is then of no use to another process.
    """
    copies: dict[Hashable, Tensor] = {}  # a tied tensor is copied once
    for n in lowered.graph.find_nodes(op="get_attr"):
        name = str(n.target)
        if name in stages.original:
            tensor = get_tensor(lowered, name)
            set_tensor(lowered, name, _copy(tensor, copies))
    compiler = compile_regions if regional else inductor
    if not constants:
        compiler = partial(compile_without_constants, code={}, guarded=False)
    how = {"inductor": compiler, "eager": lambda flat: flat}
    with part("inductor") if backend == "inductor" else nullcontext():
        return CompiledModel(lowered, call, plan, stages, how[backend])


def _copy(tensor: Tensor, copies: dict[Hashable, Tensor]) -> Tensor:
    key = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
    if key not in copies:
        copies[key] = tensor.clone()
    return copies[key]


def tensor_bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()
