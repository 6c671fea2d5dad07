"""Report: what was done with every linear and every attention, and why."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import fx

from sqcompile.compiled import report_data
from sqcompile.compiled.report_text import counts, text
from sqcompile.kernels.ops import sqcompile_ops
from sqcompile.kernels.speedup import ROWS, against, expected, expected_attention
from sqcompile.kernels.targets import target_of
from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import value
from sqcompile.plan.entries import AttentionPlan, LayerPlan
from sqcompile.plan.names import SiteLabel, site_labels
from sqcompile.plan.plan import Plan
from sqcompile.process.progress import Show
from sqcompile.process.progress import stages as told

if TYPE_CHECKING:
    from sqcompile.compiled.stages import Graphs
    from sqcompile.evaluation import Evaluation


@dataclass(frozen=True)
class Gemm:
    """INT8 GEMMs of one shape; ``str`` of it is one line.

    Attributes:
        count: how many.
        in_features: K.
        out_features: N, of merged linears together.
        gains: expected speed against float by number of rows; empty for a shape no table knows.
        against: the float, "bf16" or "float32".
    """

    count: int
    in_features: int
    out_features: int
    gains: dict[int, float]
    against: str = "bf16"

    def __str__(self) -> str:
        parts = [f"{gain:.2f}x with {rows} row{'s' if rows > 1 else ''}" for rows, gain in self.gains.items()]
        gain = ", ".join(parts) or "not measured"
        return f"{self.count} x {self.in_features} -> {self.out_features}: {gain}"


# By operator, where its arguments have the activations, and the scales of the output channels.
_GEMMS = {
    sqcompile_ops.int8_gemm.default: (0, 3),
    sqcompile_ops.int8_linear_packed.default: (0, 3),
    sqcompile_ops.matmul_u8s8.default: (0, 2),
}


def _gemms(lowered: fx.GraphModule) -> tuple[Gemm, ...]:
    shapes: Counter[tuple[int, int, Any, str]] = Counter()
    for n in lowered.graph.nodes:
        if n.target in _GEMMS:
            q, scales = (value(n.args[i]) for i in _GEMMS[n.target])
            shapes[len(scales), int(q.shape[-1]), scales.device, against(scales.device, value(n).dtype)] += 1
    gemms = []
    for (n, k, device, of), count in shapes.items():
        gains = {rows: expected(device, rows, n, k, of) for rows in ROWS}
        known = {rows: gain for rows, gain in gains.items() if gain}
        gemms.append(Gemm(count, k, n, known, of))
    return tuple(gemms)


@dataclass(frozen=True)
class Int8Attention:
    """INT8 attentions of one kind; ``str`` of it is one line.

    Attributes:
        count: how many.
        products: "qk" or "qk_pv".
        width: channels of a head.
        gains: expected speed against scaled_dot_product_attention in bfloat16 by (batch, queries, keys); empty for a
            width no table knows.
        without_kernel: the type of a device that has no kernel for it, such as "cpu": plain PyTorch runs there.
    """

    count: int
    products: str
    width: int
    gains: dict[tuple[int, int, int], float]
    without_kernel: str | None = None

    def __str__(self) -> str:
        parts = [
            f"{gain:.2f}x with {b} x {queries} queries of {keys} keys"
            for (b, queries, keys), gain in self.gains.items()
        ]
        speed, slow = ", ".join(parts) or "not measured", min(self.gains.values(), default=1) < 1
        if self.without_kernel and not parts:
            speed, slow = f"in plain PyTorch, {self.without_kernel} has no kernel for it", True
        hint = " (slower: Recipe(min_speedup=1.0) leaves it in float)" if slow else ""
        return f"{self.count} x {self.products}, {self.width} channels: {speed}{hint}"


def _attentions(lowered: fx.GraphModule) -> tuple[Int8Attention, ...]:
    nodes = lowered.graph.find_nodes(op="call_function", target=sqcompile_ops.int8_attention.default)
    kinds = Counter(
        ("qk" if n.args[5] is None else "qk_pv", int(value(n.args[0]).shape[-1]), value(n.args[0]).device)
        for n in nodes
    )
    of = target_of(about(lowered).target)
    return tuple(
        Int8Attention(
            count,
            products,
            width,
            expected_attention(device, products, width),
            None if of(device).attention == "triton" else device.type,
        )
        for (products, width, device), count in kinds.items()
    )


@dataclass(frozen=True)
class Report:
    """One entry per linear, in graph order; ``print(report)`` gives a line for each kind of them, then the sites.

    Repeated blocks are one line, with the ranges of their α, rotations ("H 32": in blocks of 32 channels) and SQNR.

    Attributes:
        layers: name, kind, quantized, smoothing, reason, alpha, rotation, sqnr_db (see LayerPlan).
        sites: the smoothed sites as a person would write them; ``key`` is the name in the plan.
        gemms: the INT8 GEMMs by shape.
        attention: one entry per attention, where the recipe quantizes them (see AttentionPlan).
        int8_attention: the INT8 attentions by kind.
        dtype: the number format of quantized linears.
        plan: that it is on.
        stages: graphs of the compiled model, for a drawing; None where there are none.
        weight_bytes: of all tensors of the compiled model; None where there is none.
        seconds: that `compile` took, by stage ("trace", "calibrate", "match", "plan", "fold", "insert_qdq", "lower",
            "emit") and by part of a stage ("plan: choose", "emit: inductor"); empty for a model that was loaded.
    """

    layers: tuple[LayerPlan, ...]
    sites: tuple[SiteLabel, ...]
    gemms: tuple[Gemm, ...] = ()
    attention: tuple[AttentionPlan, ...] = ()
    int8_attention: tuple[Int8Attention, ...] = ()
    dtype: str = "int8"
    plan: Plan | None = field(default=None, repr=False, compare=False)
    stages: Graphs | None = field(default=None, repr=False, compare=False)
    weight_bytes: int | None = field(default=None, repr=False, compare=False)
    seconds: Mapping[str, float] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def of(plan: Plan, lowered: fx.GraphModule | None = None, stages: Graphs | None = None) -> Report:
        """The report on a plan, and on the kernels of a lowered graph; with its stages, the page has a drawing."""
        sites = site_labels(plan.scales, [l.name for l in plan.layers])
        if lowered is None:
            return Report(
                plan.layers, sites, attention=plan.attention, dtype=plan.recipe.dtype, plan=plan, stages=stages
            )
        held = sum(b.numel() * b.element_size() for b in lowered.buffers())
        return Report(
            plan.layers, sites, _gemms(lowered), plan.attention, _attentions(lowered), plan.recipe.dtype, plan, stages, held,
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled and copied: all but the stages, which are this process's."""
        return {**vars(self), "stages": None}

    def to_html(
        self,
        path: str | os.PathLike[str],
        *,
        evaluation: Evaluation | None = None,
        title: str | None = None,
        progress: Show = True,
    ) -> None:
        """Writes the report as a page: one HTML file, which needs no network and no other file.

        It shows what was measured, what stayed in float and why; for each site the largest values of channels, sampled
        tokens, what was tried and the INT8 codes; and a table from which overrides can be copied. A graph is drawn where
        there is the float model that it was compiled from.

        Args:
            path: where to; it ends in .html.
            evaluation: what `evaluate` has measured, for the overview.
            title: of the page; None for the model's class.
            progress: as for `sqcompile.compile`; its stages are "draw", where there is a graph, "plots" and "write".

        Raises:
            ReportError: without the packages of ``pip install 'sqcompile[report]'``; for an evaluation or a title that is
                none; or for a path that cannot be written.
            RecipeError: for a ``progress`` that is none.
        """
        from sqcompile.page import check_path, write_page
        from sqcompile.page.subject import subject_of

        name, names = check_path(path), ("plots", "write")
        with told(names if self.stages is None else ("draw", *names), progress) as enter:
            write_page(name, subject_of(self, evaluation, title, enter), enter)

    def plot(self, site: str | int) -> Any:
        """Plots of one site, as a matplotlib Figure.

        Args:
            site: the name of one of its linears, or a part of it that no other site has; the name of a site; or a number,
                in graph order.

        Raises:
            ReportError: without matplotlib, or for a site that the plan has no evidence of.
        """
        from sqcompile.page.figures import plot
        from sqcompile.page.subject import plan_of

        return plot(plan_of(self), site)

    def __str__(self) -> str:
        return text(self)

    def __repr__(self) -> str:
        return f"Report({counts(self.layers, self.dtype)})"

    def _repr_html_(self) -> str:
        return report_data.shown(self)

    def to_text(self, full: bool = False) -> str:
        """What ``print(report)`` gives; with ``full`` a line for each linear, attention and site."""
        return text(self, full)

    def to_json(self, indent: int | None = None) -> str:
        """The report as JSON, without NaN and infinities: what is not known, or infinite, is null.

        An object of ``format`` (1), ``dtype``, ``summary`` (how many linears there are, and how many of them are quantized,
        folded, multiplied and rotated), ``seconds`` by stage, and lists of objects that have the fields of these classes: ``layers``
        (LayerPlan), ``attention`` (AttentionPlan), ``sites`` (SiteLabel), ``gemms`` (Gemm) and ``int8_attention``
        (Int8Attention). ``gains`` are a list of objects, too: ``rows`` and ``gain`` of a GEMM; ``batch``, ``queries``, ``keys``
        and ``gain`` of an attention.
        """
        return report_data.to_json(self, indent)

    def to_pandas(self) -> Any:
        """A pandas.DataFrame with a row for each linear, in graph order.

        Columns are ``name`` and ``label`` (str), ``kind``, ``runs_in`` and ``smoothing`` (category), ``quantized`` (bool),
        ``alpha``, ``sqnr_db``, ``loss`` and ``input_scale`` (float64, NaN where there is none), ``rotation`` and ``experts``
        (Int64, NA where there is none), ``out_features`` and ``in_features`` (int64) and ``reason`` (str).

        Raises:
            ReportError: if pandas is not installed.
        """
        return report_data.to_pandas(self)
