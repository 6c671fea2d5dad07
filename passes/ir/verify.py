"""verify: the graph language between stages. A rewrite that leaves it is a bug, caught where it happens.

With SQCOMPILE_VERIFY=1, as in the tests, each call is also computed again from the values recorded for its arguments:

    %y: f32[s0, 4] = linear(%x, %w)
->
    StageError: folded: %y is recorded as torch.float32 [s0, 4], strides [4, 1]; it gives torch.float32 [s0, 8], strides [8, 1]
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.errors import StageError
from sqcompile.kernels.ops import sqcompile_ops
from sqcompile.passes.ir.about import About, about
from sqcompile.passes.ir.graph import LINEARS, get_tensor, is_mutable, value
from sqcompile.passes.ir.record import call_key
from sqcompile.passes.ir.sizes import free_symbols
from sqcompile.process.interrupts import checkpoint
from sqcompile.pytorch.core import enable_python_dispatcher

# what a model calls itself, through `sqcompile.capture.kv_cache`
_OF_A_CACHE = (
    sqcompile_ops.token_scale.default,
    sqcompile_ops.quantize.default,
    sqcompile_ops.dequantize_tokens.default,
)

STAGES = ("traced", "folded", "quantized", "lowered")


_PRIMES = (3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59)

_right: dict[Any, Any] = {}  # the form of what calls give: graphs repeat their calls, and each other's


def verify(gm: fx.GraphModule, stage: str) -> fx.GraphModule:
    """Checks lint, operators, the record (`About`), recorded values, dtypes and strides; returns the graph.

    Raises:
        StageError: naming the stage, the node and what is wrong with it.
    """
    checkpoint()
    gm.graph.lint()
    if not isinstance(gm.meta.get("about"), About):
        raise StageError(f"{stage}: the graph has no record of what is known of it")
    for n in gm.graph.nodes:
        if n.op == "call_function":
            namespace = getattr(n.target, "namespace", None)
            if namespace is None and not _is_python(n.target):
                raise StageError(f"{stage}: %{n.name} calls {n.target}, which is no operator")
            if is_mutable(n.target):  # a graph's tensors share storage with the model's
                raise StageError(f"{stage}: %{n.name} is {n.target}, which writes to its arguments")
            early = (*LINEARS, *_OF_A_CACHE, *([sqcompile_ops.rotate.default] if stage == "folded" else []))
            if namespace == "sqcompile" and stage in ("traced", "folded") and n.target not in early:
                raise StageError(f"{stage}: %{n.name} is {n.target}, which belongs to a later stage")
        elif n.op not in ("placeholder", "get_attr", "output"):
            raise StageError(f"{stage}: %{n.name} is a {n.op}, expected ATen operators only")
        if n.op != "output" and "val" not in n.meta:
            raise StageError(f"{stage}: %{n.name} has no recorded value")
        if n.op == "get_attr":
            tensor, recorded = get_tensor(gm, str(n.target)), value(n)
            stands_in = tensor.is_meta and about(gm).lazy  # for a weight that is quantized later
            if not stands_in and _form(tensor) != _form(recorded):
                have, want = _in_words(_form(tensor)), _in_words(_form(recorded))
                raise StageError(f"{stage}: {n.target} is {have}, the graph expects {want}")
    if os.environ.get("SQCOMPILE_VERIFY") == "1":
        _compute_again(gm, stage)
    return gm


def _compute_again(gm: fx.GraphModule, stage: str) -> None:
    """Raises StageError where a call gives another value than is recorded, by dtype, device, sizes or strides."""
    for n in (n for n in gm.graph.nodes if n.op == "call_function"):
        args, kwargs = fx.node.map_arg((n.args, n.kwargs), value)
        key = call_key(n.target, args, kwargs)
        if key is None:  # packed for a kernel, or with sizes that depend on values
            continue
        recorded, known = value(n), about(gm).recorded.get(key)
        want = _form(recorded)
        if _right.get(key) == want or (known and _form(known[0]) == want):
            continue
        with about(gm).fake_mode, enable_python_dispatcher(), torch.no_grad():
            gives = n.target(*args, **kwargs)
        found = _right[key] = _form(gives)
        if found == want:
            continue
        sizes = dict(zip(free_symbols(gm), itertools.cycle(_PRIMES)))
        if _form(gives, sizes) != _form(recorded, sizes):
            words = f"%{n.name} is recorded as {_in_words(want)}; it gives {_in_words(found)}"
            raise StageError(f"{stage}: {words}")


@dataclass(frozen=True)
class _TensorForm:
    """What is compared of a tensor; strides None if it is packed. A stride of a size of 1 says nothing."""

    dtype: torch.dtype
    shape: Any
    strides: Any
    device: torch.device


def _form(v: Any, sizes: dict[Any, int] | None = None) -> Any:
    """What is compared of a value, at some sizes or in symbols: Min(8, 8*s0) is 8 at all of them.

    It is no text before there is something to say: printing symbols takes longer than all else that is done here.
    """
    if isinstance(v, (list, tuple)):
        return tuple(_form(x, sizes) for x in v)
    if isinstance(v, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return v.node.expr.xreplace(sizes) if sizes else v.node.expr
    if not isinstance(v, Tensor):
        return v if type(v) is int else str(v)
    shape = _form(tuple(v.shape), sizes)
    strides = None if v.is_mkldnn else _form(v.stride(), sizes)
    if strides is not None:
        strides = tuple(step if size != 1 else "any" for size, step in zip(shape, strides, strict=True))
    return _TensorForm(v.dtype, shape, strides, v.device)


def _in_words(form: Any) -> str:
    if isinstance(form, tuple):
        return ", ".join(map(_in_words, form))
    if not isinstance(form, _TensorForm):
        return str(form)
    strides = "packed" if form.strides is None else f"strides [{_in_words(form.strides)}]"
    return f"{form.dtype} [{_in_words(form.shape)}], {strides}, {form.device}"


def _is_python(target: object) -> bool:
    module = getattr(target, "__module__", "") or ""
    return module in ("_operator", "math") or module.startswith(("torch", "builtins"))
