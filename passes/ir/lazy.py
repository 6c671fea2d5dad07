"""lazy: tensors of a graph, some of which are made when they are asked for (`About.lazy`)."""

from __future__ import annotations

from torch import Tensor, fx

from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import get_tensor


class Weights:
    """A graph's tensors. What is made with a lazy weight, such as its scale, is kept until it is asked for, as is the weight."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm, self.lazy = gm, about(gm).lazy
        self.made_with = {other: name for name, lazy in self.lazy.items() for other in lazy.beside}
        self.made: dict[str, Tensor] = {}
        self._unwanted: set[str] = set()

    def __contains__(self, name: str) -> bool:
        """Whether a tensor is made when it is asked for."""
        return self.made_with.get(name, name) in self.lazy

    def get(self, name: str) -> Tensor:
        """A tensor by its name."""
        if name not in self:
            return get_tensor(self.gm, name)
        if name not in self.made:
            weight = self.made_with.get(name, name)
            lazy = self.lazy[weight]
            made = zip((weight, *lazy.beside), lazy.make(), strict=True)
            self.made |= {n: t for n, t in made if n == name or n not in self._unwanted}
        return self.made.pop(name)

    def unwanted(self, name: str) -> None:
        """Says that a tensor will not be asked for."""
        self._unwanted.add(name)
