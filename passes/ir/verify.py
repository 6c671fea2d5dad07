"""verify: the graph language between stages. A rewrite that leaves it is a bug, caught where it happens."""

from __future__ import annotations

from torch import Tensor, fx

from sqcompile.errors import StageError
from sqcompile.kernels.ops import sqcompile_ops
from sqcompile.passes.ir.graph import LINEARS, get_tensor, is_mutable, value
from sqcompile.process.interrupts import checkpoint

# what a model calls itself, through `sqcompile.capture.kv_cache`
_OF_A_CACHE = (
    sqcompile_ops.token_scale.default,
    sqcompile_ops.quantize.default,
    sqcompile_ops.dequantize_tokens.default,
)

STAGES = ("traced", "folded", "quantized", "lowered")


def verify(gm: fx.GraphModule, stage: str) -> fx.GraphModule:
    """Checks lint, operators, recorded values and dtypes; returns the graph.

    Raises:
        StageError: naming the stage, the node and what is wrong with it.
    """
    checkpoint()
    gm.graph.lint()
    for n in gm.graph.nodes:
        if n.op == "call_function":
            namespace = getattr(n.target, "namespace", None)
            if namespace is None and not _is_python(n.target):
                raise StageError(f"{stage}: %{n.name} calls {n.target}, which is no operator")
            if is_mutable(n.target):  # a graph's tensors share storage with the model's
                raise StageError(f"{stage}: %{n.name} is {n.target}, which writes to its arguments")
            if namespace == "sqcompile" and stage in ("traced", "folded") and n.target not in (*LINEARS, *_OF_A_CACHE):
                raise StageError(f"{stage}: %{n.name} is {n.target}, which belongs to a later stage")
        elif n.op not in ("placeholder", "get_attr", "output"):
            raise StageError(f"{stage}: %{n.name} is a {n.op}, expected ATen operators only")
        if n.op != "output" and "val" not in n.meta:
            raise StageError(f"{stage}: %{n.name} has no recorded value")
        if n.op == "get_attr":
            tensor, recorded = get_tensor(gm, str(n.target)), value(n)
            if isinstance(recorded, Tensor) and (tensor.shape, tensor.dtype) != (recorded.shape, recorded.dtype):
                have, want = (f"{t.dtype} {tuple(t.shape)}" for t in (tensor, recorded))
                raise StageError(f"{stage}: {n.target} is {have}, the graph expects {want}")
    return gm


def _is_python(target: object) -> bool:
    module = getattr(target, "__module__", "") or ""
    return module in ("_operator", "math") or module.startswith(("torch", "builtins"))
