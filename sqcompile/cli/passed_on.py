"""passed_on: the commands whose arguments something else reads, which has options of its own."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sqcompile.cli import options as o

PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def bench(
    context: typer.Context,
    what: Annotated[str, typer.Argument(metavar="DIR", help="a quantized model, or the name of a benchmark")] = "",
) -> None:
    """Time a quantized model, or run a benchmark: cpu, cpu-peers, gpu, attention, generate, large, launch, speedup,
    tools.

    **Examples**

    `sqcompile bench out --against models/llama`

    `sqcompile bench cpu`
    """
    from sqcompile.bench.__main__ import BENCHMARKS, main

    if what in BENCHMARKS:
        main([what, *context.args])
        return
    _timed(["--help"] if what in ("", "-h", "--help") else [what, *context.args], standalone_mode=False)


_bench = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)


@_bench.command(name="bench")
def _time(
    folder: o.Folder,
    against: o.Against = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="to measure each shape for")] = 3.0,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Time a quantized model on this machine, beside torch.compile of the float model if there is one.

    The name of a benchmark in the place of DIR runs that: cpu, cpu-peers, gpu, attention, generate, large, launch,
    speedup, tools.

    **Examples**

    `sqcompile bench out --against models/llama`

    `sqcompile bench cpu`
    """
    from sqcompile.cli.terminal import command

    with command(json, quiet) as terminal:
        from sqcompile.cli.speed import bench

        bench(folder, against, seconds, terminal)


def _timed(argv: list[str], **more: Any) -> None:
    _bench(argv, prog_name="sqcompile bench", **more)


def show(context: typer.Context) -> None:
    """Print and draw where smoothing can go in a model, or the graphs of a quantized one.

    **Examples**

    `sqcompile show models/llama --draw graph.html`

    `sqcompile show out --stage quantized`
    """
    from sqcompile.cli.terminal import command

    with command():
        from sqcompile.show.__main__ import run

        run(context.args)


def tune(context: typer.Context) -> None:
    """Measure tile sizes of the GEMM kernels on this GPU."""
    from sqcompile.cli.terminal import CommandError, command

    with command():
        import torch

        if not torch.cuda.is_available() and not {"-h", "--help"}.intersection(context.args):
            raise CommandError("there is no GPU here, whose kernels tune measures: call it on a machine with one")
        from sqcompile.kernels.triton.gemm.tune import main

        main(context.args)


def demo(context: typer.Context) -> None:
    """Calibrate and evaluate the shipped language model on this machine."""
    from sqcompile.demo import main

    main(context.args)
