"""sqcompile: SmoothQuant W8A8 as a graph-rewriting compiler for PyTorch models.

compiled = sqcompile.compile(model, calib_loader)
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from sqcompile.api import calibrate, compile
from sqcompile.checkpoints.act_scales import read_act_scales, write_act_scales
from sqcompile.checkpoints.export import Exported
from sqcompile.checkpoints.open_checkpoint import open_checkpoint
from sqcompile.compiled.compare import Comparison
from sqcompile.compiled.emit import CompiledModel
from sqcompile.compiled.report import Report
from sqcompile.errors import (
    ArtifactError,
    CalibrationError,
    CaptureError,
    DrawError,
    EvaluationError,
    FormatError,
    GenerationError,
    IndexRangeError,
    InternalError,
    NothingToQuantizeError,
    PlanError,
    RecipeError,
    ReportError,
    SQCompileError,
    StageError,
    WeightError,
)
from sqcompile.evaluation import Evaluation, LayerError, evaluate
from sqcompile.generation import free_generation, generate
from sqcompile.large import quantize_checkpoint
from sqcompile.loading import load
from sqcompile.plan.entries import AttentionPlan, LayerPlan
from sqcompile.plan.plan import Plan
from sqcompile.plan.recipe import PRESETS, Recipe
from sqcompile.process.memory import memory_limit
from sqcompile.process.progress import Progress
from sqcompile.programs.export import export
from sqcompile.reference_scales import get_act_scales, get_linear_absmax, get_static_decoder_layer_scales
from sqcompile.refresh import refresh
from sqcompile.results import compare, plan_of, report_of
from sqcompile.version import VERSION

if TYPE_CHECKING:
    from sqcompile import debug

__version__ = VERSION

logging.getLogger("sqcompile").addHandler(logging.NullHandler())  # a program that wants the log says where it goes

__all__ = [
    "PRESETS",
    "ArtifactError",
    "AttentionPlan",
    "CalibrationError",
    "CaptureError",
    "Comparison",
    "CompiledModel",
    "DrawError",
    "Evaluation",
    "EvaluationError",
    "Exported",
    "FormatError",
    "GenerationError",
    "IndexRangeError",
    "InternalError",
    "LayerError",
    "LayerPlan",
    "NothingToQuantizeError",
    "Plan",
    "PlanError",
    "Progress",
    "Recipe",
    "RecipeError",
    "Report",
    "ReportError",
    "SQCompileError",
    "StageError",
    "WeightError",
    "calibrate",
    "compare",
    "compile",
    "debug",
    "evaluate",
    "export",
    "free_generation",
    "generate",
    "get_act_scales",
    "get_linear_absmax",
    "get_static_decoder_layer_scales",
    "load",
    "memory_limit",
    "open_checkpoint",
    "plan_of",
    "quantize_checkpoint",
    "read_act_scales",
    "refresh",
    "report_of",
    "write_act_scales",
]


def __getattr__(name: str) -> Any:
    """`debug`, which few programs need, is imported when it is first asked for."""
    if name == "debug":
        import importlib

        return importlib.import_module("sqcompile.debug")
    raise AttributeError(f"module 'sqcompile' has no attribute {name!r}")
