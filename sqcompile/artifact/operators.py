"""operators: what a saved graph may call. Pure functions of tensors by name; nothing that writes, reads files or runs code."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from typing import Any

import torch

from sqcompile.errors import ArtifactError
from sqcompile.pytorch.core import OpOverload, schema, writes_to_arguments

# arithmetic of sizes
_OF_SIZES: dict[str, Callable[..., Any]] = {
    f"operator.{f.__name__}": f
    for f in (
        operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod, operator.neg,
        operator.getitem, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.and_,
        operator.or_,
    )
} | {f"math.{f.__name__}": f for f in (math.ceil, math.floor, math.trunc)} | {
    f"torch.{f.__name__}": f
    for f in (torch.sym_int, torch.sym_float, torch.sym_max, torch.sym_min, torch.sym_not, torch.sym_ite, torch.sym_sum)
}  # fmt: skip
_NAMES = {f: name for name, f in _OF_SIZES.items()}

# of sqcompile, those of the stages up to "quantized": kernels of the stage after it trust sizes that lowering has checked
_OURS = {
    "attend", "attention_weights", "dequantize", "dequantize_tokens", "finite_heads", "finite_rows", "grouped_dequantize",
    "grouped_linear", "int8_attend", "int8_scores", "mask_scores", "quantize", "rotate", "scale_over", "tensor_scale",
    "token_scale",
}  # fmt: skip

# ATen's functions without a tensor among their arguments; of all others, those with one. So `from_file` is none.
_FACTORIES = {
    "arange", "bartlett_window", "blackman_window", "empty", "empty_permuted", "empty_strided", "eye", "full", "hamming_window",
    "hann_window", "kaiser_window", "linspace", "logspace", "ones", "rand", "randint", "randn", "randperm", "scalar_tensor",
    "tril_indices", "triu_indices", "zeros",
}  # fmt: skip
# ATen's internal functions take much for granted that their callers have checked. These check it themselves.
_INTERNAL = {
    "_adaptive_avg_pool2d", "_log_softmax", "_native_batch_norm_legit_no_training", "_scaled_dot_product_flash_attention_for_cpu",
    "_softmax", "_to_copy", "_unsafe_view", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "_fft_c2c", "_fft_c2r",
    "_fft_r2c", "_weight_norm",
}  # fmt: skip

# what the processes that hold a model together ask of each other, in the one group that a saved graph is loaded for
_COLLECTIVES = {"all_gather_into_tensor", "all_reduce", "reduce_scatter_tensor", "wait_tensor"}

_NAME = re.compile(r"(aten|sqcompile|_c10d_functional)\.([A-Za-z_][A-Za-z0-9_]*)\.([A-Za-z_][A-Za-z0-9_]*)")


def name_of(target: Any) -> str:
    """The name that `operator_of` knows a function by.

    Raises:
        ArtifactError: for one that a saved graph may not call.
    """
    name = str(target) if isinstance(target, OpOverload) else _NAMES.get(target, "")
    if not name:
        raise ArtifactError(f"the model calls {target}, which cannot be saved: sqcompile saves PyTorch's own operators")
    operator_of(name)
    return name


def operator_of(name: Any) -> Callable[..., Any]:
    """The function of a name such as "aten.linear.default" or "operator.mul".

    Raises:
        ArtifactError: for a name that no saved graph may call, or that this version of PyTorch does not have.
    """
    if isinstance(name, str) and name in _OF_SIZES:
        return _OF_SIZES[name]
    parts = _NAME.fullmatch(name) if isinstance(name, str) and len(name) < 200 else None
    if parts is None:
        raise ArtifactError(f"{str(name)[:100]!r} is no operator that a saved graph may call")
    namespace, packet, overload = parts.groups()
    ours = namespace == "sqcompile"
    if namespace == "aten":
        listed = not packet.startswith("_") or packet.startswith("__") or packet in _INTERNAL
    else:
        listed = packet in (_OURS if ours else _COLLECTIVES)
    try:
        found = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    except AttributeError as e:
        raise ArtifactError(
            f"{name} is no operator of PyTorch {torch.__version__}: save the model again with it"
        ) from e
    if (
        not listed
        or not isinstance(found, OpOverload)
        or writes_to_arguments(found)
        or not (ours or _is_pure(found, packet))
    ):
        raise ArtifactError(f"{name} is no operator that a saved graph may call")
    return found


def _is_pure(target: OpOverload, packet: str) -> bool:
    """Whether it makes its result from tensors that it is given, or is a factory."""
    if packet in _FACTORIES:
        return True
    types = [str(a.type) for a in schema(target).arguments]
    return any("Tensor" in kind for kind in types) and "Storage" not in types and "Stream" not in types
