"""observer: runs a traced graph, and keeps statistics of what its linears and attentions read, in memory of O(channels)."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.errors import CalibrationError, first_line
from sqcompile.passes.attention.chains import Attention
from sqcompile.passes.attention.heads import brought
from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.explain import operation, source
from sqcompile.passes.ir.graph import Linear, aten, find_linears, nodes_by_name, value
from sqcompile.passes.ir.halves import in_analyses
from sqcompile.passes.ir.operators import MEETINGS
from sqcompile.passes.ir.pieces import Stepped
from sqcompile.process.interrupts import checkpoint
from sqcompile.pytorch.core import pytree
from sqcompile.statistics.input_stats import InputStats, seed_of
from sqcompile.statistics.padding import Padding
from sqcompile.statistics.sample import Sample, is_random


def _key(l: Linear) -> tuple[str, str | None]:
    """What statistics belong to: an input, and how its rows are dealt out to experts."""
    return l.x, l.offsets


class Observer(Stepped):
    """Runs a traced graph and keeps statistics of its linears' inputs, and of its attentions'.

    Threads may run it at the same time: each call is run by a copy, which has its values, and adds to the one set of
    statistics.
    """

    def __init__(self, gm: fx.GraphModule, attentions: Sequence[Attention] = (), number: int = 0) -> None:
        """``number``: of the graph, among those whose statistics are merged."""
        super().__init__(gm)
        self.gm, self.parallel = gm, about(gm).parallel
        self.extra_traceback = False  # errors name the operation and the user's line themselves
        self.linears = find_linears(gm)
        self.reads = {_key(l): l for l in reversed(self.linears)}  # the first reader names the tensor in messages
        self.readers = {l.node: l for l in self.reads.values()}
        self.routed = {l.x: l.offsets for l in self.linears if l.offsets}
        self.stats: dict[tuple[str, str | None], InputStats] = {}
        self.attentions, nodes = attentions, nodes_by_name(gm)
        self.operands: dict[str, dict[str, tuple[str, Attention]]] = {}  # operands by the node that is observed
        for a in attentions:
            if a.refused is None:
                for what, name in a.operands.items():
                    self.operands.setdefault(brought(nodes[name]).name, {})[name] = what, a
        self.heads: dict[str, InputStats] = {}
        self.sample, self.samples, self.batches = Sample(), not is_random(gm), 0
        self.number, self.begun = number, 0  # batches that have begun
        self.index, self.counts = 0, True  # of a copy: its batch, and whether that enters the statistics
        self.outputs = pytree.tree_leaves(next(iter(gm.graph.find_nodes(op="output"))).args)
        self.lock = threading.Lock()
        self.over = threading.Event()  # statistics stay what they are from now on
        self.routed_masks: dict[str | None, Tensor] = {}
        self.padding = Padding(gm, self._asked(nodes))

    def _asked(self, nodes: dict[str, fx.Node]) -> dict[str, int]:
        """The nodes whose rows are tokens or padding, and the dim of their channels."""
        asked = {l.x: -1 for l in self.linears if not l.offsets}
        asked |= {str(nodes[x].args[0]): -1 for x in self.routed if nodes[x].args}  # what experts' rows are picked from
        asked |= {n.name: -1 for n in self.outputs if isinstance(n, fx.Node)}
        for name, found in self.operands.items():
            for what, a in found.values():
                asked[name] = -2 if what == "keys" and a.transposed else -1
        return asked

    def found(self) -> dict[str, InputStats]:
        """Statistics by linear name."""
        return {l.name: self.stats[_key(l)] for l in self.linears if _key(l) in self.stats}

    def batch(self, leaves: Sequence[Any], index: int | None = None, counts: bool = True) -> Any:
        """Runs one batch.

        Args:
            leaves: an argument for each placeholder; attention masks among them say which tokens are real.
            index: of the batch, no other one's; None for the number of those that have begun before.
            counts: whether it enters the statistics; else only the sample.

        Returns:
            What the graph returns.

        Raises:
            CalibrationError: if the model refuses the batch, or an activation is not finite.
        """
        call = self.begin(leaves, index, counts)
        with call.refusing():
            out = call.run(*leaves, enable_io_processing=False)
        self.end(call, leaves, out)
        return out

    def begin(self, leaves: Sequence[Any], index: int | None = None, counts: bool = True) -> Observer:
        """What runs one batch (see `batch`), and adds to the statistics if it ``counts``."""
        call = copy.copy(self)
        call.counts = counts
        with self.lock:
            call.index = self.begun if index is None else index
            self.begun += 1
        call.padding, call.routed_masks = copy.copy(self.padding), {}
        try:
            call.padding.start(leaves)
        except CalibrationError as e:
            raise CalibrationError(f"calibration batch {call.index}: {e}") from e
        return call

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """Errors of operations are those of a `batch`."""
        try:
            with torch.no_grad():
                yield
        except CalibrationError:
            raise
        except Exception as e:
            what = f"{type(e).__name__}: {first_line(e)}, in {operation(self.at)} at {source(self.at)}"
            raise CalibrationError(f"the model refuses calibration batch {self.index}: {what}") from e

    def end(self, call: Observer, leaves: Sequence[Any], out: Any) -> None:
        """Counts a batch that was run, and keeps it if it is one of the first."""
        with self.lock:
            self.batches += 1
            if not self.over.is_set() and self.samples:
                real = partial(self._real, call.padding)
                self.sample.add(leaves, out, real, call.index, self.parallel.every)

    def _real(self, padding: Padding, i: int, y: Tensor) -> Tensor | None:
        """Which rows of an output are real tokens, bool [R]; None for all."""
        return padding.real(str(self.outputs[i]), y)

    def stop(self) -> None:
        """Has calls that are still running, in other threads, add nothing more."""
        with self.lock:
            self.over.set()

    def run_node(self, n: fx.Node) -> Any:
        checkpoint()
        self.at = n
        if n.target in MEETINGS:
            self.parallel.meet(n.name)
        if n.name in self.routed:
            self._follow_mask(n)
        if n.name in self.readers and self.counts:
            self._read(n, self.readers[n.name])
        out = super().run_node(n)
        for name, (what, a) in self.operands.get(n.name, {}).items() if self.counts else ():
            self._observe_heads(n.name, name, what, a, out)
        return out

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(in_analyses(target), args, kwargs)

    def _observe_heads(self, brought: str, name: str, what: str, a: Attention, x: Tensor) -> None:
        x = x.transpose(-1, -2) if what == "keys" and a.transposed else x
        keep = self.padding.real(brought, x)
        by_head = keep.reshape(x.shape[:-1]) if keep is not None else None
        if x.dim() == 3:
            x = x.unflatten(0, (-1, a.groups))
            by_head = by_head.unflatten(0, (-1, a.groups)) if by_head is not None else None
        rows = x.transpose(1, 2).flatten(2)
        rows = rows.flatten(0, 1) if by_head is None else rows[by_head.any(1)]
        if len(rows):
            experts = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
            with self.lock:
                if not self.over.is_set():
                    stats = self.heads.setdefault(name, InputStats.empty(rows, None))
                    added = stats.update(rows, experts, self._seed(f"{a.name} {what}"), self.index)
                    self._check_finite(added, f"one of the {what} of {a.name} (node {name})")

    def _follow_mask(self, n: fx.Node) -> None:
        """Experts read picked rows: padding is picked with them, and every input with the same offsets is in that order."""
        if n.op != "call_function":
            return
        if n.target == aten.index.Tensor:
            index = n.args[1][0]  # type: ignore[index]
        else:
            index = n.args[2] if n.target == aten.index_select.default and n.args[1] == 0 else None
        source = n.args[0]
        if not isinstance(index, fx.Node) or not isinstance(source, fx.Node) or value(source).dim() != 2:
            return
        keep = self.padding.real(source.name, self.env[source])
        if keep is not None:
            picked = self.env[index]
            self.routed_masks[self.routed[n.name]] = keep.to(picked.device)[picked]

    def _read(self, n: fx.Node, l: Linear) -> None:
        x = self.env[n.args[0]]  # type: ignore[index]
        keep, experts = self._tokens(n, l, x)
        rows = x.reshape(-1, x.shape[-1])
        rows, experts = (rows, experts) if keep is None else (rows[keep], experts[keep])
        if len(rows):
            self._update(l, rows, experts)

    def _tokens(self, n: fx.Node, l: Linear, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """Which rows of a linear's input x [..., K] are real tokens, bool [T], None for all; and their experts, int64 [T].

        Its output has the same rows.
        """
        if not l.offsets:
            count = x[..., 0].numel()
            return self.padding.real(l.x, x), torch.zeros(count, dtype=torch.int64, device=x.device)
        offsets = self.env[n.args[2]].long()  # type: ignore[index]
        row = torch.arange(len(x), device=x.device)
        experts = torch.searchsorted(offsets, row, right=True)
        keep = experts < len(offsets)  # rows past the last offset are no expert's
        if l.offsets in self.routed_masks:
            keep &= self.routed_masks[l.offsets]
        return keep, experts

    def _update(self, l: Linear, rows: Tensor, experts: Tensor) -> None:
        with self.lock:
            if not self.over.is_set():
                stats = self.stats.setdefault(_key(l), InputStats.empty(rows, l.experts))
                added = stats.update(rows, experts, self._seed(l.name), self.index)
                self._check_finite(added, f"the input of {l.name} (node {l.x})")

    def _seed(self, name: str) -> int:
        return seed_of(f"{self.number} {name}")

    def _check_finite(self, finite: bool, what: str) -> None:
        if not finite:
            raise CalibrationError(
                f"{what} is not finite in calibration batch {self.index}: "
                "check the batch and the model's dtype (float16 overflows at 65504; try bfloat16)"
            )
