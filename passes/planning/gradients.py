"""gradients: how a traced graph's outputs depend on what its linears read and give. Nothing is recorded of the weights.

    %h = linear(%x, %w)              %x' = view_as(%x, %x)      # all linears of a group read it, and nothing else does
    %y = add(%h, %x)          ->     %h = linear(%x', %w)
                                     %y = add(%h, %x)

The gradient of %x' is that of an error which the linears alone see. The graph is run forwards once up to its last cut,
and what lives at the few cuts is kept. Then one piece after the other, from the end, is run again and backwards: memory
holds the operations of one piece, and what lives at the cuts, as with activation checkpointing (arXiv 1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import Linear, aten, constants, evaluate, first_leaf, is_mutable, nodes_by_name
from sqcompile.passes.ir.halves import in_analyses
from sqcompile.passes.ir.pieces import PIECE
from sqcompile.passes.planning.between import REDUCED, Copied
from sqcompile.process.interrupts import checkpoint

Group = tuple[Linear, ...]
Seed = Callable[[Tensor], Tensor]
See = Callable[[Group, Tensor, Tensor, Sequence[Tensor]], None]


def gradients(
    gm: fx.GraphModule, arguments: Sequence[Any], seeds: dict[str, Seed], groups: list[Group], see: See
) -> None:
    """Runs a graph forwards and backwards.

    Args:
        gm: a traced graph; it is not changed.
        arguments: one for each placeholder.
        seeds: by output node, what gives the gradient of its value, from the value.
        groups: linears that read one node each; a linear is in one group at most.
        see: is given a group, its input [..., K] and the gradient of that, and the gradients of the linears' outputs
            [..., N]; zeros where the outputs do not depend on them. Called once for each group.

    Raises:
        NotImplementedError: for a graph that writes to its arguments.
        RuntimeError: whatever PyTorch raises for operators without a derivative, or without memory.
    """
    if any(n.op == "call_function" and is_mutable(n.target) for n in gm.graph.nodes):
        raise NotImplementedError("the graph writes to its tensors")
    with torch.inference_mode(False):
        _Backward(gm, groups, see).run(arguments, seeds)


@dataclass
class _Piece:
    """Operations between two cuts.

    Attributes:
        nodes: in graph order, without constants.
        reads: nodes of earlier pieces that these read.
        values: of those, once they have been computed.
    """

    nodes: list[fx.Node] = field(default_factory=list)
    reads: list[fx.Node] = field(default_factory=list)
    values: dict[fx.Node, Any] = field(default_factory=dict)


class _Backward:
    def __init__(self, gm: fx.GraphModule, groups: list[Group], see: See) -> None:
        self.gm, self.see, self.groups = gm, see, groups
        nodes = nodes_by_name(gm)
        self.constants, self.parallel = constants(gm), about(gm).parallel
        self.of = {nodes[l.node]: i for i, group in enumerate(groups) for l in group}  # the group of a linear
        self.inputs = [nodes[group[0].x] for group in groups]
        self.depends: set[fx.Node] = set()  # on a linear of a group
        for n in gm.graph.nodes:
            if n in self.of or any(a in self.depends for a in n.all_input_nodes):
                self.depends.add(n)
        self.pieces = self._cut()

    def _cut(self) -> list[_Piece]:
        pieces, where, linears = [_Piece()], dict[fx.Node, int](), 0
        for n in self.gm.graph.nodes:
            if n in self.constants or n.op in ("get_attr", "output"):
                continue
            if n in self.of:
                linears += 1
                if linears > PIECE:
                    pieces.append(_Piece())
                    linears = 1
            where[n] = len(pieces) - 1
            pieces[-1].nodes.append(n)
            for a in n.all_input_nodes:
                if a in where and where[a] < where[n] and a not in pieces[-1].reads:
                    pieces[-1].reads.append(a)
        return pieces

    def run(self, arguments: Sequence[Any], seeds: dict[str, Seed]) -> None:
        env: dict[fx.Node, Any] = {}
        given = iter(arguments)
        last = {a: i for i, p in enumerate(self.pieces) for a in p.reads}
        with torch.no_grad():
            for i, piece in enumerate(self.pieces):
                piece.values = {a: env[a] for a in piece.reads}
                for n in piece.nodes:
                    if n.op == "placeholder":
                        env[n] = next(given)
                    elif piece is not self.pieces[-1]:  # which no other reads
                        env[n] = self._node(n, env)
                own = {n: env[n] for n in piece.nodes if n.op == "placeholder"}
                piece.values |= own
                env = {n: x for n, x in env.items() if last.get(n, -1) > i}  # only what a later piece reads
        del env
        found: dict[fx.Node, Tensor] = {}
        started: dict[int, list[Tensor]] = {}
        first = {self.of[n]: i for i, p in reversed([*enumerate(self.pieces)]) for n in p.nodes if n in self.of}
        for i in reversed(range(len(self.pieces))):
            self._back(i, seeds, found, started, first)
            self.pieces[i].values = {}

    def _node(self, n: fx.Node, env: dict[fx.Node, Any], read: dict[int, Tensor] | None = None) -> Any:
        checkpoint()

        def value(a: fx.Node) -> Any:
            if a in env:
                return env[a]
            constant: Any = evaluate(self.gm, a)
            return constant.detach() if isinstance(constant, Tensor) else constant

        args: Any
        kwargs: Any
        args, kwargs = fx.node.map_arg((n.args, n.kwargs), value)
        if read is not None and n in self.of:
            args = (read[self.of[n]], *args[1:])
        if self.parallel.count > 1:
            if n.target in REDUCED:
                return REDUCED[n.target](self.parallel, *args)
            if n.target == aten.linear.default and self.parallel.dims.get(first_leaf(n.args[1]) or "") == 0:  # type: ignore[arg-type]
                args = (Copied.apply(args[0], self.parallel), *args[1:])
        return in_analyses(n.target)(*args, **kwargs)  # which has a derivative for experts, too

    def _back(
        self,
        i: int,
        seeds: dict[str, Seed],
        found: dict[fx.Node, Tensor],
        started: dict[int, list[Tensor]],
        first: dict[int, int],
    ) -> None:
        """Runs a piece again and backwards.

        Args:
            i: the piece.
            seeds: as for `gradients`.
            found: the gradients of what the piece gives, which are taken; of what it reads, which are added.
            started: of groups with linears in later pieces: the gradients of their inputs and outputs.
            first: the piece of each group's first linear.
        """
        piece = self.pieces[i]
        env = dict(piece.values)
        leaves = {}
        for a in piece.reads:
            if a in self.depends and isinstance(env[a], Tensor) and env[a].is_floating_point():
                leaves[a] = env[a] = env[a].detach().requires_grad_()
        read: dict[int, Tensor] = {}
        outputs: dict[fx.Node, Tensor] = {}
        with torch.enable_grad():
            for n in piece.nodes:
                if n.op == "placeholder":
                    continue
                if (g := self.of.get(n)) is not None and g not in read:
                    x = env[self.inputs[g]]
                    read[g] = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
                env[n] = self._node(n, env, read)
                if n in self.of:
                    outputs[n] = env[n]
        ends = [(env[n], found.pop(n)) for n in piece.nodes if n in found]
        ends += [(env[n], seeds[n.name](env[n].detach())) for n in piece.nodes if n.name in seeds]
        ends = [(y, g.to(y.dtype)) for y, g in ends if y.requires_grad]
        wanted = [*leaves.values(), *read.values(), *outputs.values()]
        grads: Sequence[Tensor | None] = [None] * len(wanted)
        if ends and wanted:
            checkpoint()  # backwards, all weights of the piece are read without one
            grads = torch.autograd.grad([y for y, _ in ends], wanted, [g for _, g in ends], allow_unused=True)
        every = [torch.zeros_like(x) if g is None else g.detach() for x, g in zip(wanted, grads, strict=True)]
        of_reads = every[len(leaves) : len(leaves) + len(read)]
        of_outputs = dict(zip(outputs, every[len(leaves) + len(read) :], strict=True))
        for a, of_leaf in zip(leaves, every, strict=False):
            found[a] = found[a] + of_leaf if a in found else of_leaf
        for group, of_read in zip(read, of_reads, strict=True):
            mine = [of_outputs[n] for n in outputs if self.of[n] == group]
            later = started.pop(group, None)  # linears of the group that stand in later pieces
            total = [of_read, *mine] if later is None else [of_read + later[0], *mine, *later[1:]]
            if first[group] < i:
                started[group] = total
            else:
                self.see(self.groups[group], read[group].detach(), total[0], total[1:])
