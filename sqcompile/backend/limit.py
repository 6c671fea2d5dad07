"""limit: Dynamo compiles a function ``recompile_limit`` times, 8 by default, and then runs it as it is: in float.

Only what a function needs should count: not what threads compiled for the same call while one waited for the other, nor
what other models of the same class, with plans of their own, have for it. Dynamo counts an entry of its cache for a call
if that has the same objects where the entry has guards on objects; what must not count gets one that no call has.
"""

from __future__ import annotations

import warnings
from typing import Any

from sqcompile.pytorch.dynamo import cache_entries, config, frame_being_compiled


class _Nothing:
    """What no call has."""


_nothing = _Nothing()


def respect_limit() -> None:
    """While Dynamo compiles: has entries that fit the call at hand not count, and says when it is the last that may be made."""
    tx = frame_being_compiled()
    left = config.recompile_limit - 1
    for entry in cache_entries(tx.f_code):
        guards: Any = entry.guard_manager
        if _fits(guards, tx.f_locals):
            guards.id_matched_objs = {"": lambda: _nothing}
        left -= "" not in getattr(guards, "id_matched_objs", {})
    if left == 0:
        warnings.warn(
            f"this is the last of the {config.recompile_limit} times that Dynamo compiles a function "
            "(torch._dynamo.config.recompile_limit): calls that fit none of them will run in FLOAT. TORCH_LOGS=recompiles "
            "says why it compiles again. Layers compiled one by one do where they use a KV cache: compile the whole model, "
            "with regional=True",
            stacklevel=2,
        )


def _fits(guards: Any, variables: dict[str, Any]) -> bool:
    try:
        return bool(guards.check(variables))
    except Exception:  # guards on what this call does not have
        return False
