"""structures: what a model takes and returns, tuples, dicts and classes, as JSON and back.

    CausalLMOutputWithPast(logits=...)
->
    {"class": "transformers.modeling_outputs.CausalLMOutputWithPast", "parts": [null], "names": ["logits"]}

No class of the model's own source is imported. Of transformers, whose classes are known by name, results keep theirs; what
else has names becomes `Outputs`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import importlib
import keyword
from collections import OrderedDict, namedtuple
from typing import Any

from sqcompile.capture.containers import register_kv_cache_pytree
from sqcompile.errors import ArtifactError
from sqcompile.files.regular import said
from sqcompile.pytorch.core import hollow, leaf_spec, namedtuple_of, parts_of, pytree, spec_of

_PLAIN: dict[str, type] = {"tuple": tuple, "list": list, "dict": dict, "OrderedDict": OrderedDict}
_MOST_NESTING = 16


class Outputs(OrderedDict[str, Any]):
    """What a loaded model returns in place of a class that is not known here: values by name, which are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the model returns {', '.join(self)}, and no {name!r}") from None


pytree.register_pytree_node(
    Outputs,
    lambda x: (list(x.values()), list(x)),
    lambda values, names: Outputs(zip(names, values, strict=True)),
    serialized_type_name="sqcompile.Outputs",
)


def to_json(spec: Any) -> Any:
    """A structure as JSON; null is a leaf.

    Raises:
        ArtifactError: for one with a class that could not be made again.
    """
    if spec.is_leaf():
        return None
    parts = [to_json(p) for p in parts_of(spec)]
    for name, kind in _PLAIN.items():
        if spec.type is kind:
            return {name: parts} if spec.context is None else {name: parts, "keys": _keys(spec.context)}
    if spec.type is namedtuple:
        return {"namedtuple": parts, "name": spec.context.__name__, "fields": list(spec.context._fields)}
    name = f"{spec.type.__module__}.{spec.type.__qualname__}"
    names, layout = spec.context, None
    if isinstance(names, list) and len(names) == 2 and all(isinstance(n, list) for n in names):
        names, layout = names  # of a dataclass, and then those that are None; of a cache, and its layers' windows
        layout = None if dataclasses.is_dataclass(spec.type) else layout
    if not _are_names(names, len(parts)) or not (layout is None or _is_layout(layout)):
        raise ArtifactError(
            f"the model takes or returns a {name}, which cannot be saved: tensors, tuples, lists, dicts and outputs of "
            "transformers can"
        )
    return {"class": name, "parts": parts, "names": names} | ({} if layout is None else {"layout": layout})


def _keys(keys: Any) -> Any:
    if any(not isinstance(k, (str, int)) for k in keys):
        raise ArtifactError(f"the model takes or returns a dict with the key {next(iter(keys))!r}: use strings")
    return list(keys)


def _are_names(names: Any, count: int) -> bool:
    return isinstance(names, list) and len(names) == count == len({*names}) and all(isinstance(n, str) for n in names)


def from_json(found: Any, depth: int = 0) -> Any:
    """The structure (a pytree's TreeSpec) that JSON is.

    Raises:
        ArtifactError: for JSON that `to_json` does not make.
    """
    if found is None:
        return leaf_spec()
    kind = next(iter(found), "") if isinstance(found, dict) and depth < _MOST_NESTING else ""
    inner = found["parts" if kind == "class" else kind] if kind else None
    if not isinstance(inner, list):
        raise ArtifactError(f"it has {str(found)[:100]!r} where a structure of arguments should be")
    parts = [from_json(p, depth + 1) for p in inner]
    if kind in ("tuple", "list") and len(found) == 1:
        return spec_of(_PLAIN[kind], None, parts)
    keys = found.get("keys")
    if kind in ("dict", "OrderedDict") and _are_keys(keys, len(parts)):
        return spec_of(_PLAIN[kind], keys, parts)
    fields = found.get("fields")
    if (
        kind == "namedtuple"
        and _are_names(fields, len(parts))
        and all(map(_is_identifier, [*fields, found.get("name")]))
    ):
        return spec_of(namedtuple_of(), collections.namedtuple(found["name"], fields), parts)
    names = found.get("names")
    if kind == "class" and _are_names(names, len(parts)) and isinstance(found["class"], str):
        known, layout = _of_transformers(found["class"]), found.get("layout")
        if layout is None or known is None:
            return spec_of(known or Outputs, names, parts)
        if _is_layout(layout):
            return _buildable(spec_of(known, [names, layout], parts))
    raise ArtifactError(f"it has {str(found)[:100]!r} where a structure of arguments should be")


def _are_keys(keys: Any, count: int) -> bool:
    return isinstance(keys, list) and all(type(k) in (str, int) for k in keys) and len({*keys}) == len(keys) == count


def _is_layout(found: Any) -> bool:
    return isinstance(found, list) and all(n is None or type(n) is int for n in found)


def _buildable(spec: Any) -> Any:
    """The structure, if its class takes what it is said to hold.

    Raises:
        ArtifactError: else.
    """
    try:
        hollow(spec)
    except Exception as e:
        raise ArtifactError(
            f"the {spec.type.__name__} that the model returns cannot be made by this version of transformers ({said(e)}): "
            "install the one that it was saved with"
        ) from e
    return spec


def _is_identifier(name: Any) -> bool:
    return isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name) and not name.startswith("_")


def _of_transformers(name: str) -> type | None:
    """A class of transformers whose instances PyTorch takes apart, if it is there."""
    module, _, kind = name.rpartition(".")
    parts = module.split(".")
    if parts[0] != "transformers" or not all(map(str.isidentifier, parts)) or not kind.isidentifier():
        return None
    if len(parts) > 2 and parts[1] != "models":
        return None
    with contextlib.suppress(Exception):  # it may not be installed, or not have the class any more
        found = getattr(importlib.import_module(module), kind)
        register_kv_cache_pytree()
        if isinstance(found, type) and found in pytree.SUPPORTED_NODES:
            return found
    return None
