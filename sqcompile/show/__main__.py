"""``sqcompile show MODEL``: where smoothing can go in a model and where not, as text and as a drawing.

MODEL is the directory of a transformers model, ``lm`` (the shipped language model), a transformers model type such as
``llama`` (tiny, random weights), or ``module:callable``, which returns a model or (model, example call). No calibration data
is needed: a later stage is made from the example call, so that its structure is what data would give and its numbers are
not. Of a directory with a quantized model, the report is printed, and its stages.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings

from torch import nn

import sqcompile
from sqcompile.capture.inputs import as_call
from sqcompile.capture.trace import trace
from sqcompile.compiled.report import Report
from sqcompile.draw import check_path, draw
from sqcompile.errors import DrawError, SQCompileError
from sqcompile.loading import is_saved, opened
from sqcompile.passes.ir.text import show
from sqcompile.passes.ir.verify import STAGES
from sqcompile.pipeline import rewrite
from sqcompile.plan.plan import Plan
from sqcompile.show.load import load
from sqcompile.show.summary import Summary


def main(argv: list[str] | None = None) -> None:
    """``python -m sqcompile.show``.

    Raises:
        SystemExit: with the message of what went wrong.
    """
    try:
        run(argv)
    except SQCompileError as e:
        sys.exit(f"{type(e).__name__}: {e}")


def run(argv: list[str] | None = None) -> None:
    """The command line.

    Raises:
        SQCompileError: for what went wrong.
    """
    parser = argparse.ArgumentParser(
        prog="sqcompile show", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="a directory, lm, a transformers model type, or module:callable")
    parser.add_argument(
        "--stage",
        choices=STAGES,
        help="print this stage, too; also the stage that is drawn, or that a page begins with",
    )
    parser.add_argument("--draw", metavar="FILE", help="draw to an .svg file, or all stages to an .html file")
    parser.add_argument("--full", action="store_true", help="draw every block, even where many are equal")
    parser.add_argument("--colour", choices=("role", "sqnr"), default="role", help="what the drawing is coloured by")
    parser.add_argument("--plan", metavar="FILE", help="a plan from Plan.save, for later stages and for the drawing")
    parser.add_argument("--input", metavar="[NAME=]DTYPE[SHAPE]", action="append", default=[], help="i64[2, 16]")
    parser.add_argument("--layers", type=int, default=2, help="layers of a transformers model (default 2)")
    args = parser.parse_args(argv)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # of torch about itself
        _show(args)


def _show(args: argparse.Namespace) -> None:
    if "" not in sys.path:
        sys.path.insert(0, "")  # module:callable from the folder one stands in, also through the `sqcompile` command
    if os.path.isdir(args.model) and is_saved(args.model):
        return _show_saved(args)
    model, example = load(args.model, args.input, args.layers)
    traced = trace(model, as_call(model, example))
    print(Summary.of(traced))
    plan = _plan(args, model, example)
    stage, stages = args.stage or "traced", {"traced": traced}
    drawn = args.draw is not None and check_path(args.draw) == ".html"
    if plan is not None:
        wanted = STAGES if drawn else [stage]
        stages |= {
            name: rewrite(traced, plan, until=name, lazy=drawn and name == "quantized")
            for name in wanted
            if name != "traced"
        }
    if args.stage:
        print(f"\n{show(stages[stage])}")
    if args.draw:
        draw(args.draw, stages, plan, stage, args.full, args.colour)
        print(f"\ndrawn to {args.draw}")


def _show_saved(args: argparse.Namespace) -> None:
    plan, stages = opened(args.model)
    if args.draw:
        raise DrawError(
            f"{args.model} has no float graph to draw: draw the float model with --plan of its plan.safetensors"
        )
    print(Report.of(plan))
    if args.stage:
        print(f"\n{show(stages[args.stage])}")


def _plan(args: argparse.Namespace, model: nn.Module, example: object) -> Plan | None:
    if args.plan:
        return Plan.load(args.plan)
    if args.stage in (None, "traced"):
        return None
    return sqcompile.calibrate(model, [example], progress=False)


if __name__ == "__main__":
    main()
