"""floats: counts the calls that run in float while a model calibrates itself, and says where that does not end."""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Hashable

PATIENCE = 4  # times as many calls as were asked for are waited for


class Floats:
    """Counts calls in float, whatever their graphs and weights, and says once that there are far more than asked for."""

    def __init__(self, steps: int) -> None:
        self.steps, self.runs, self.said = steps, Counter[Hashable](), False
        self.lock = threading.Lock()

    def add(self, names: set[Hashable]) -> None:
        """After a graph has run linears of these names, each of which a call of the model runs once at most."""
        with self.lock:
            self.runs.update(names)

    def check(self, names: set[Hashable]) -> None:
        """Before a graph runs in float."""
        with self.lock:
            calls = max(self.runs[name] for name in names)
            if calls < PATIENCE * self.steps or self.said:
                return
            self.said = True
        warnings.warn(
            f"{calls} calls ran in FLOAT, and calibration_steps={self.steps} of them are not over: the model's weights are "
            "other tensors at each call, as with offloading (accelerate's cpu_offload, device_map) and "
            "torch.func.functional_call, and INT8 weights are made once for weights that stay. Load the model onto one "
            "device and call it with its own weights, or leave the backend out",
            stacklevel=2,
        )
