"""explain: one message for a model that cannot be captured: what failed, where in the user's code, what to try."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from sqcompile.errors import CaptureError, first_line
from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.symbols import unbacked
from sqcompile.pytorch.core import CAPTURE_LOGGERS

_VALUES = (
    "keep it a tensor (torch.where, a mask), pass it to forward as an argument, or compile a submodule without it: "
    "a graph has one shape for all values"
)

_DEVICE = "move the batch to the model's device, and what forward makes itself to that of its inputs"

_SIZES = "pass dynamic_shapes=None for static shapes, or the dynamic_shapes that torch.export should use"
_FLEX = (
    'load or build the model with another attention (transformers: attn_implementation="sdpa"): flex_attention computes its '
    "masks by functions, which a captured graph does not hold"
)

# (what the error is or says, what to try), the first that fits
_HINTS: tuple[tuple[str, str], ...] = (
    ("UnsupportedOperator", "register what it does to shapes with torch.library.register_fake, or compile a submodule"),
    (".numpy() is not supported", "compute with torch instead of numpy in forward, or compile a submodule"),
    ("not on the expected device", _DEVICE),
    ("different devices", _DEVICE),
    ("on the same device", _DEVICE),
    ("pytree", "register the type with torch.utils._pytree.register_pytree_node, or return tensors"),
    ("Constraint", _SIZES),
    ("dynamic", _SIZES),
    ("has no attribute", "capture runs forward on fake tensors: use their public methods, or compile a submodule"),
    ("", "run the model itself on this batch, then torch.export.export(model, args, kwargs, strict=False)"),
)


def export_error(model: nn.Module, error: Exception, sizes_are_open: bool = True) -> CaptureError:
    """What to raise for an error of torch.export, whose sizes were open or all fixed."""
    every = traceback.extract_tb(error.__traceback__)
    frames = [f for f in every if is_users(f.filename)]
    where = f" at {frames[-1].filename}:{frames[-1].lineno}: `{frames[-1].line}`" if frames else ""
    what = f"{type(error).__name__}: {first_line(error)}"
    hint = _hint(error, what, sizes_are_open)
    if any(os.path.basename(f.filename) == "flex_attention.py" for f in every):
        hint = _FLEX
    return CaptureError(f"{type(model).__name__} cannot be exported: {what}{where}. What to try: {hint}")


def check_shapes(gm: fx.GraphModule) -> None:
    """Raises CaptureError for an operation whose result has a size that depends on values: labels need shapes."""
    for n in gm.graph.nodes:
        v: Any = n.meta.get("val")
        tensors = [t for t in (v if isinstance(v, (tuple, list)) else [v]) if isinstance(t, torch.Tensor)]
        if n.op == "call_function" and any(unbacked(t) for t in tensors):
            raise CaptureError(
                f"the size of what {operation(n)} gives depends on tensor values, at {source(n)}. What to try: {_VALUES}"
            )


def operation(node: fx.Node) -> str:
    """An operator as a user knows it: ``nonzero`` for aten.nonzero.default."""
    packet = getattr(node.target, "overloadpacket", node.target)
    return getattr(packet, "__name__", str(packet))


def source(node: fx.Node) -> str:
    """The line of the user's code that a node comes from, or the next one downstream that is known, or its name."""
    at: fx.Node | None = node
    while at is not None:
        if line := _users_line(at.meta.get("stack_trace") or ""):
            return line
        at = next(iter(at.users), None)
    return node.name


def users_frame() -> str:
    """The line of the user's code that is running, as `source` gives it."""
    frames = [f for f in traceback.extract_stack() if is_users(f.filename)]
    return f"{frames[-1].filename}:{frames[-1].lineno}: `{frames[-1].line}`" if frames else "an unknown line"


def _users_line(stack_trace: str) -> str | None:
    lines = [line.strip() for line in stack_trace.splitlines()]
    found = [i for i, line in enumerate(lines) if line.startswith("File") and is_users(line.split('"')[1])]
    if not found:
        return None
    _, path, rest = lines[found[-1]].split('"')
    code = lines[found[-1] + 1] if found[-1] + 1 < len(lines) else ""
    return f"{path}:{rest.split('line ')[1].split(',')[0]}" + (f": `{code}`" if code else "")


@contextlib.contextmanager
def one_error() -> Iterator[None]:
    """Keeps PyTorch from showing a failure that we report ourselves: a trace per attempt, and whole graphs."""
    printed = io.StringIO()
    with unlogged():
        with contextlib.redirect_stderr(printed):
            yield
        sys.stderr.write(printed.getvalue())  # the model's own words


@contextlib.contextmanager
def unlogged() -> Iterator[None]:
    """Keeps PyTorch from logging a failure that we report ourselves, or try another way."""
    loggers = [logging.getLogger(name) for name in CAPTURE_LOGGERS]
    disabled = [l.disabled for l in loggers]
    for l in loggers:
        l.disabled = True
    try:
        yield
    finally:
        for l, was in zip(loggers, disabled, strict=True):
            l.disabled = was


def is_users(filename: str) -> bool:
    """Whether a file is the model's own code, and neither PyTorch's nor ours."""
    packages = (sys.modules[name] for name in ("torch", "sqcompile", "sqcompile.passes", "sqcompile.kernels"))
    inside = tuple(os.path.join(folder, "") for package in packages for folder in package.__path__)
    return not filename.startswith((*inside, "<frozen", "<string>", "<eval_with_key>"))


def nested_hint(operator: str) -> str:
    """What to try where a graph has another one inside."""
    if "flex_attention" in operator:
        return _FLEX
    return "remove the context manager or the control flow behind it from the model's forward"


def fixed_sizes(gm: fx.GraphModule) -> str:
    """How the caller of what captured a graph has sizes fixed: of sqcompile's own functions, or torch.compile."""
    return "pass dynamic_shapes=None" if about(gm).captured else "pass dynamic=False to torch.compile"


def _hint(error: Exception, what: str, sizes_are_open: bool) -> str:
    cond = getattr(error, "cond", None)
    if cond is not None:  # GuardOnDataDependentSymNode: a comparison decides a branch, a number is a size or an index
        branch = getattr(cond, "is_Relational", False)
        decides = (
            "the branch depends on tensor values" if branch else "a size or an index is read from a tensor's values"
        )
        return (
            f"{decides}: rewrite it with torch.where, or compile the submodule below it"
            if branch
            else f"{decides}: {_VALUES}"
        )
    return next(hint for pattern, hint in _HINTS if pattern in what and (sizes_are_open or hint != _SIZES))
