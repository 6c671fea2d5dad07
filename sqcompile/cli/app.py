"""app: the commands and their options. What a command does is imported when it is called."""

from __future__ import annotations

from typing import Annotated

import typer

from sqcompile.cli import options as o
from sqcompile.cli.passed_on import PASSED_ON, bench, demo, show, tune
from sqcompile.cli.usage import Commands
from sqcompile.version import VERSION

app = typer.Typer(
    name="sqcompile",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="SmoothQuant W8A8: float models of transformers into INT8 ones. `sqcompile COMMAND --help` has examples.",
)


@app.command()
def quantize(
    model: o.ModelDir,
    out: o.Out = None,
    calib: o.Calib = None,
    format: o.Format = "sqcompile",
    samples: o.Samples = 512,
    seq_len: o.SeqLen = None,
    seed: o.Seed = None,
    batch_size: o.BatchSize = None,
    tokenizer: o.TokenizerDir = None,
    plan: o.PlanFile = None,
    recipe: o.RecipeName = "default",
    alpha: o.Alpha = None,
    activation: o.Activation = None,
    weight: o.Weight = None,
    smooth: o.Smooth = None,
    rotate: o.Rotate = None,
    shift: o.Shift = None,
    skip: o.Skip = None,
    lm_head: o.LmHead = None,
    attention: o.Attention = None,
    qk: o.Qk = None,
    spikes: o.Spikes = None,
    min_speedup: o.MinSpeedup = None,
    max_degradation: o.MaxDegradation = None,
    float_work: o.FloatWork = None,
    overrides: o.Overrides = None,
    number_format: o.Dtype = None,
    model_dtype: o.ModelDtype = "auto",
    max_memory: o.MaxMemory = None,
    device: o.ComputesOn = None,
    dry_run: o.DryRun = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Quantize a float model.

    **Examples**

    `sqcompile quantize models/llama --calib texts.jsonl -o out`

    `sqcompile quantize models/llama --calib texts.jsonl --format compressed-tensors -o out`  (for vLLM)

    `sqcompile quantize models/llama-70b --calib texts.jsonl --max-memory 16GiB -o out`

    `sqcompile quantize models/vit --calib pictures/ --recipe O3 --max-degradation 0.5 -o out`

    `sqcompile quantize models/llama --dry-run`
    """
    from sqcompile.cli.terminal import CommandError, command

    with command(json, quiet) as terminal:
        from sqcompile.cli.batches import Asked
        from sqcompile.cli.quantize import Job, quantize
        from sqcompile.cli.recipes import recipe_from
        from sqcompile.process.memory import bytes_of

        fields = {
            "alpha": alpha, "activation": activation, "weight": weight, "smooth": smooth, "rotate": rotate, "shift": shift,
            "skip": tuple(skip) if skip else None, "lm_head": lm_head, "attention": attention, "qk": qk, "spikes": spikes,
            "min_speedup": min_speedup, "max_degradation": max_degradation, "float_work": float_work, "overrides": overrides,
            "dtype": number_format,
        }  # fmt: skip
        if not out and not dry_run:
            raise CommandError("no --out: pass the path of the new directory, or --dry-run")
        if plan is not None and (
            calib is not None or recipe != "default" or any(v is not None for v in fields.values())
        ):
            raise CommandError("--plan says what is done: leave out --calib, --recipe and its fields")
        data = Asked(calib, samples, seq_len, seed, batch_size, tokenizer) if calib else None
        made = recipe_from(recipe, fields)
        memory = None if max_memory is None else bytes_of(max_memory)
        quantize(Job(model, out, format, made, plan, data, model_dtype, memory, device, dry_run), terminal)


@app.command("eval")
def evaluate(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="a quantized or a float model", show_default=False)],
    text: Annotated[str, typer.Option("--text", "--data", metavar="PATH", help="held-out inputs, as for --calib")],
    against: o.Against = None,
    samples: o.Samples = 128,
    seq_len: o.SeqLen = None,
    seed: o.Seed = None,
    batch_size: o.BatchSize = 4,
    tokenizer: o.TokenizerDir = None,
    backend: Annotated[str, typer.Option(help="eager, or inductor, which is faster and compiles first")] = "eager",
    device: o.Device = None,
    max_memory: o.MaxMemory = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Measure a model on held-out data: perplexity, what it lost beside the float model, with standard errors.

    **Examples**

    `sqcompile eval out --text held_out.txt --against models/llama`

    `sqcompile eval out --data pictures/ --against models/vit --json`

    `sqcompile eval out --text held_out.txt --against models/llama-70b --max-memory 16GiB`
    """
    from sqcompile.cli.terminal import command

    with command(json, quiet) as terminal:
        from sqcompile.cli.batches import Asked
        from sqcompile.cli.evaluate import evaluate_directory
        from sqcompile.process.memory import bytes_of

        asked = Asked(text, samples, seq_len, seed, batch_size, tokenizer)
        memory = None if max_memory is None else bytes_of(max_memory)
        evaluate_directory(folder, against, asked, backend, device, memory, terminal)


@app.command()
def generate(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="a quantized or a float model", show_default=False)],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="how the text begins")],
    tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="tokens at most")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="of what is drawn")] = 0,
    tokenizer: o.TokenizerDir = None,
    backend: Annotated[str, typer.Option(help="eager, or inductor, which is faster and compiles first")] = "eager",
    device: o.Device = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Write some text, to look at what a model does. Not for serving: a quantized model has no KV cache here.

    **Example**

    `sqcompile generate out --prompt "def "`
    """
    from sqcompile.cli.terminal import command

    with command(json, quiet) as terminal:
        from sqcompile.cli.generate import Asked, generate

        generate(folder, Asked(prompt, tokens, temperature, seed, tokenizer), backend, device, json, terminal)


@app.command()
def report(
    folder: o.Folder,
    out: Annotated[str | None, typer.Option("--out", "-o", metavar="FILE.html", help="write a page instead")] = None,
    full: Annotated[bool, typer.Option("--full", help="a line for each linear, where layers are alike, too")] = False,
    evaluation: Annotated[
        str | None, typer.Option(metavar="FILE.json", help="what `sqcompile eval --json` has printed, for the page")
    ] = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Say what was done with each linear, and why. DIR may be the file of a plan, too.

    **Examples**

    `sqcompile report out`

    `sqcompile report out -o report.html --evaluation eval.json`
    """
    from sqcompile.cli.terminal import command

    with command(json, quiet) as terminal:
        from sqcompile.cli.report import report

        report(folder, out, full, evaluation, terminal)


@app.command()
def serve(
    folder: o.Folder,
    port: Annotated[int, typer.Option(min=1, max=65535, help="of the server")] = 8000,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Say how a directory is served: the command of vLLM, and a first request.

    **Example**

    `sqcompile serve out`
    """
    from sqcompile.cli.terminal import command

    with command(json, quiet) as terminal:
        from sqcompile.cli.serve import serve

        serve(folder, port, terminal)


for _command in (bench, show, tune, demo):
    app.command(context_settings=PASSED_ON)(_command)


def _version(wanted: bool) -> None:
    if wanted:
        print(VERSION)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass
