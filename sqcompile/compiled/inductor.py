"""inductor: a lowered graph through Inductor, whole or block by block. Dynamo is not involved."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile import kernels
from sqcompile.compiled.results import changed
from sqcompile.errors import SQCompileError, StageError, first_line
from sqcompile.kernels.cpu.build import probed
from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.explain import fixed_sizes
from sqcompile.passes.ir.graph import constants, value
from sqcompile.passes.lowering.regions import Part, Region, cut, find_repeats
from sqcompile.process.progress import each
from sqcompile.pytorch.core import TracingContext, tracing
from sqcompile.version import VERSION

log = logging.getLogger("sqcompile")

_PRODUCT = re.compile(r"linear|mm\b|matmul|conv|lstm|gru|rnn|einsum|tensordot|bilinear")
_TUNING = (
    "max_autotune", "max_autotune_pointwise", "max_autotune_gemm", "coordinate_descent_tuning", "benchmark_fusion",
    "benchmark_combo_kernel",
)  # fmt: skip


def inductor(flat: fx.GraphModule, guarded: bool = False, part: bool = False) -> Callable[..., Any]:
    """The graph through Inductor, with the symbolic sizes that its capture gave it.

    ``guarded`` means that somebody checks sizes before each call (Dynamo), so that Inductor may fix some. A ``part`` of a
    graph looks itself whether its inputs have the sizes and strides that were recorded.

    Dynamo is not involved, so nothing is ever recompiled: one artifact serves every shape, sizes of 1 included.
    Freezing folds what depends on constants alone, and packs float weights for oneDNN. It takes a third of Inductor's time,
    and what is frozen is of no use to another process: so only a graph that has such things is frozen.
    """
    from sqcompile.pytorch.inductor import cache_of, compile_fx, config, open_sizes  # here, as it takes its time

    fakes = [value(n) for n in flat.graph.find_nodes(op="placeholder")]
    mode = about(flat).fake_mode
    before = dict(mode.shape_env.replacements) if mode.shape_env else {}
    ranges = dict(mode.shape_env.var_to_range) if mode.shape_env else {}

    def sizes_fixed() -> dict[Any, Any]:
        """What the compiler has taken for granted of sizes, until now."""
        env = mode.shape_env
        if not env:
            return {}
        found = {k: v for k, v in env.replacements.items() if k not in before}
        # no guard is checked at a call: a size assumed to stay below the example's next multiple of a block would go unnoticed
        return found | {k: env.var_to_range[k] for k, r in ranges.items() if _narrowed(r, env.var_to_range[k])}

    # the operators' fakes give exact sizes and strides (tested), which need no check at every call
    options = {
        "freezing": freezes(flat),
        "triton.cudagraphs": False,  # see backend/cuda_graphs.py
        "size_asserts": part,
        "alignment_asserts": False,
        # On GPUs Inductor tries how to reduce, and whether to pad a product, by the clock: the same model would give other
        # bits when it is loaded, and other ones in each of the processes that hold it together.
        "deterministic": config.deterministic or (_on_gpu(flat) and not _tuned(config)),
    }
    probed()
    with (
        torch.no_grad(),
        config.patch(options),
        cache_of(_kernels(), lambda: not sizes_fixed()),
        tracing(TracingContext(mode)),
        _unlisted_modules(),
        open_sizes(),
    ):
        run: Any = compile_fx(flat, fakes) if guarded else _compiled(compile_fx, flat, fakes)
    _drop_graph(run)
    fixed = sizes_fixed()
    if fixed and not guarded:
        raise StageError(
            f"Inductor fixed sizes that are dynamic ({fixed}): run the graph as it is (backend='eager'; of torch.compile "
            f"options={{'compiler': 'eager'}}), or {fixed_sizes(flat)}"
        )
    return run


def freezes(flat: fx.GraphModule) -> bool:
    """Whether freezing changes a graph: something is computed of constants alone, or a product has a constant operand."""
    const = constants(flat)
    calls = [n for n in flat.graph.nodes if n.op == "call_function"]
    products = [n for n in calls if getattr(n.target, "namespace", "") == "aten" and _PRODUCT.search(str(n.target))]
    return any(n in const for n in calls) or any(a in const for n in products for a in n.all_input_nodes)


@functools.cache
def _kernels() -> str:
    """A digest of what the operators in our graphs are, which Inductor's cache knows by their names alone."""
    digest = hashlib.sha256(VERSION.encode())
    for file in sorted(Path(kernels.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _compiled(compile_fx: Callable[..., Any], flat: fx.GraphModule, fakes: list[Any]) -> Any:
    """The graph through Inductor. Dynamo, which has ways of its own to begin again, is not around.

    Raises:
        StageError: where Inductor fails; what lacks memory is raised as it is.
    """
    try:
        return compile_fx(flat, fakes)
    except (torch.OutOfMemoryError, MemoryError, OSError, SQCompileError):
        raise
    except Exception as e:
        raise StageError(
            f"Inductor cannot compile the graph ({type(e).__name__}: {first_line(e)}): run it as it is (backend='eager'; of "
            "torch.compile options={'compiler': 'eager'})"
        ) from e


def _on_gpu(flat: fx.GraphModule) -> bool:
    """Whether a graph computes on GPUs."""
    return any(isinstance(v := n.meta.get("val"), Tensor) and v.is_cuda for n in flat.graph.nodes)


def _tuned(config: Any) -> bool:
    """Whether the user has asked for what is fastest by the clock."""
    return any(getattr(config, name, False) for name in _TUNING)


@contextlib.contextmanager
def _unlisted_modules() -> Iterator[None]:
    """Has the modules that Inductor makes meanwhile live as long as the code that is taken from them.

    Freezing makes a module's globals of the constants, and Inductor lists all modules for ever: so would weights be kept.
    """
    from sqcompile.pytorch.inductor import PyCodeCache

    before = {id(m) for m in PyCodeCache.modules}
    yield
    new = [
        m for m in PyCodeCache.modules if id(m) not in before and any(isinstance(v, Tensor) for v in vars(m).values())
    ]
    for m in new:
        PyCodeCache.modules[:] = [other for other in PyCodeCache.modules if other is not m]
        if sys.modules.get(m.__name__) is m:
            del sys.modules[m.__name__]


def _drop_graph(run: Callable[..., Any]) -> None:
    """Frees the graph that was compiled, and its packed weights: AOTAutograd keeps its methods with the code it makes."""
    for name, v in list(vars(run).items()):
        if name in ("zero_grad", "named_parameters", "named_buffers"):
            delattr(run, name)
        elif isinstance(v, types.FunctionType):  # one that is wrapped
            _drop_graph(v)


def _narrowed(before: Any, after: Any) -> bool:
    """Whether a size's range became smaller, other than by indices being of 32 bits."""
    return bool(after.lower > before.lower or after.upper < min(before.upper, 2**31 - 1))


def compile_regions(flat: fx.GraphModule, guarded: bool = False) -> Callable[..., Any]:
    """The graph with its repeated blocks through Inductor, one code for all blocks of a kind, and what is around them.

    Args and errors: as `inductor`.
    """
    blocks = find_repeats(flat)
    return _compile_parts(flat, blocks, {}, guarded) if blocks else with_layout(inductor(flat, guarded), flat)


def compile_without_constants(
    flat: fx.GraphModule, code: dict[str, Callable[..., Any]], guarded: bool
) -> Callable[..., Any]:
    """The graph through Inductor with its tensors as inputs; ``code`` keeps what equal graphs of other weights can use.

    Args and errors: as `inductor`.
    """
    return _compile_parts(flat, [], code, guarded)


def _compile_parts(
    flat: fx.GraphModule, blocks: list[list[fx.Node]], code: dict[str, Callable[..., Any]], guarded: bool
) -> Callable[..., Any]:
    outer, regions = cut(flat, blocks)
    for name, region in each([*regions.items()], "inductor"):
        run = None if region.key is None else code.get(region.key)
        if run is None:
            run = _compile_part(region, code, guarded)
        else:
            log.debug("%s runs the code of an equal part", name)
        setattr(outer, name, Part(region, run))
    return outer


def _compile_part(region: Region, code: dict[str, Callable[..., Any]], guarded: bool) -> Callable[..., Any]:
    """A part's code, put into ``code`` where others may use it."""
    if region.key is None:
        return with_layout(inductor(region.gm, guarded, part=True), region.gm)
    try:
        run = with_layout(inductor(region.gm, part=True), region.gm)
    except StageError:
        if not guarded:
            raise
        # sizes were fixed, and Dynamo looks at those of this part's inputs alone: no other part may use the code
        return with_layout(inductor(region.gm, guarded=True, part=True), region.gm)
    code[region.key] = run
    return run


def with_layout(run: Callable[..., Any], flat: fx.GraphModule) -> Callable[..., Any]:
    """Gives outputs the layout they have in eager mode where that is contiguous.

    Inductor returns the keys of a first call as they lie, not as the concatenation with an empty cache that they are; the
    second call, which gets them, would be compiled for that layout, and again for the third.
    """
    outputs = [value(n) if isinstance(n, fx.Node) else n for n in next(iter(reversed(flat.graph.nodes))).args[0]]
    dense = [i for i, v in enumerate(outputs) if isinstance(v, Tensor) and v.dim() > 1 and v.is_contiguous()]
    return changed(run, dense, lambda y: y.contiguous())
