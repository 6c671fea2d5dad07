"""skeleton: a model of transformers made of its configuration, with real buffers, over memory that nothing has touched."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from sqcompile.checkpoints.read_files import CONFIG
from sqcompile.errors import ArtifactError

_MOST_LAYERS, _MOST_SIZE = 1024, 2**26
_LAYERS = re.compile(r"n_layers?|(num_|n_)?(\w+_)?layers|num_(\w+_)?layers|layers_count|depth")  # how many there are
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def known_config(config: dict[str, Any]) -> tuple[Any, torch.dtype | None]:
    """The configuration that the JSON of a directory is, of transformers' own classes; and the dtype that it names, if any.

    Args:
        config: as it was read; what a configuration may not bring along is taken out of it.

    Raises:
        ArtifactError: if it is of a model that transformers has not, or of absurd sizes.
    """
    try:
        import transformers
    except ImportError as e:
        raise ArtifactError("it is a checkpoint of transformers: pip install 'transformers>=5'") from e
    _check_sizes(config)
    for key in ("auto_map", "name_or_path", "_name_or_path"):
        config.pop(key, None)
    kind = config.pop("model_type", None)
    dtype = config.pop("dtype", None) or config.pop("torch_dtype", None)
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise ArtifactError(f"transformers has no model_type {str(kind)[:50]!r}, and code of a checkpoint is never run")
    if dtype is not None and (not isinstance(dtype, str) or dtype not in DTYPES):
        raise ArtifactError(f"its dtype is {str(dtype)[:50]!r}, and one of {', '.join(DTYPES)} is read")
    return transformers.CONFIG_MAPPING[kind].from_dict(config), DTYPES.get(dtype or "")


def transformers_version() -> str:
    import transformers

    return str(transformers.__version__)


def skeleton(config: Any, make: Any, dtype: torch.dtype) -> Any:
    """The model, in eval mode, its weights tied.

    Args:
        config: of `known_config`.
        make: an AutoModel class, a class of models, or any function of a configuration that gives a model.
        dtype: of its parameters.
    """
    from transformers.initialization import no_init_weights

    config.dtype = dtype
    for name in getattr(config, "sub_configs", None) or ():
        if (part := getattr(config, name, None)) is not None:
            part.dtype = dtype
    with no_init_weights():
        if hasattr(make, "from_config"):
            model = make.from_config(config, dtype=dtype, trust_remote_code=False)
        else:
            model = _made(make, config, dtype)
    model.tie_weights()
    return model.eval()


def _made(make: Callable[[Any], Any], config: Any, dtype: torch.dtype) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return make(config)
    finally:
        torch.set_default_dtype(before)


def _check_sizes(config: dict[str, Any]) -> None:
    """Refuses sizes that would keep the machine busy before they are found not to be those of the files."""
    for key, x in config.items():
        if isinstance(x, dict):
            _check_sizes(x)
        elif type(x) is int and x > (_MOST_LAYERS if _LAYERS.fullmatch(key) else _MOST_SIZE):
            raise ArtifactError(f"its {CONFIG} has {key[:100]}={x}, more than any model has")
