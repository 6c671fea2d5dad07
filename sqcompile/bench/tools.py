"""W8A8 of sqcompile beside torchao's and llm-compressor's: the same models, calibration text and held-out text.

`make compare` installs both, in an environment of their own. Of what is not installed there are no rows. Everything runs
on the CPU in float32, each tool by its own integer or simulated kernels; ``sqcompile.evaluate`` measures all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sqcompile
from sqcompile.bench.other_tools import BATCH, Recipe, llm_compressor_recipes, torchao_recipes, words
from sqcompile.bench.timing import machine, versions
from sqcompile.lm import calibration_texts, evaluation_texts, load_lm, token_windows
from sqcompile.lm.load import DATA

LENGTH = 256  # tokens of a held-out window
PACKAGES = ("torchao", "llmcompressor", "compressed-tensors", "transformers")


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of one tool on one model.

    Attributes:
        folder: of the model, see `load_lm`.
        tool: a name of `recipes`.
        found: None where the tool refused the model.
        remark: its words then, or what else there is to say.
        quantized: linears whose activations are rounded, of how many.
        seconds: calibration and quantization.
    """

    folder: Path
    tool: str
    found: sqcompile.Evaluation | None
    remark: str = ""
    quantized: tuple[int, int] = (0, 0)
    seconds: float = 0.0


class Remembered(nn.Module):
    """A float model that computes the logits of each batch once, float32 [batch, tokens, vocabulary] in memory.

    2.4 GB for all held-out windows, which saves running it again for every tool.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.kept = dict[bytes, Tensor]()

    def forward(self, input_ids: Tensor) -> Tensor:
        key = input_ids.numpy().tobytes()
        if key not in self.kept:
            self.kept[key] = self.model(input_ids=input_ids, use_cache=False).logits
        return self.kept[key]


def own_recipes() -> dict[str, Recipe]:
    """sqcompile's rows."""

    def compiled(recipe: sqcompile.Recipe) -> Recipe:
        def quantize(model: nn.Module, windows: Tensor) -> tuple[nn.Module, str]:
            return sqcompile.compile(model, windows.split(BATCH), recipe=recipe, backend="eager", progress=False), ""

        return quantize

    default = sqcompile.PRESETS["default"]
    return {
        "sqcompile, W8A8 per token": compiled(sqcompile.Recipe(smooth=False)),
        "sqcompile, SmoothQuant .5": compiled(sqcompile.Recipe()),
        "sqcompile, default with every linear in INT8": compiled(dataclasses.replace(default, float_work=0.0)),
        "sqcompile, default": compiled(default),
        "sqcompile, SmoothQuant .8, static per tensor": compiled(
            sqcompile.Recipe(activation="per_tensor_static", alpha=0.8)
        ),
    }


@functools.cache
def recipes() -> dict[str, Recipe]:
    """Every tool that is installed, by the name of its row."""
    found = own_recipes()
    for others in (torchao_recipes, llm_compressor_recipes):
        try:
            found |= others()
        except ModuleNotFoundError as e:
            print(f"without {others.__name__}: {e}")
    return found


def compare(folder: Path, tools: Sequence[str], calibration: int, windows: int | None) -> list[Result]:
    """Runs tools on one model, and prints each result when it is there.

    Args:
        folder: of the model.
        tools: names of `recipes`.
        calibration: windows of 512 tokens to calibrate on.
        windows: held-out windows of 256 tokens, taken evenly over all; None for all.
    """
    model, tokenizer = load_lm(folder=folder)
    calibrated_on = token_windows(calibration_texts(), tokenizer, 512, calibration)
    evaluated_on = token_windows(evaluation_texts(), tokenizer, LENGTH, windows)
    reference, results = Remembered(model), list[Result]()
    for tool in tools:
        result = run(folder, tool, reference, calibrated_on, evaluated_on)
        print(f"{name(folder)}, {tool}: {cell(result)}", flush=True)
        results.append(result)
    return results


def run(folder: Path, tool: str, reference: nn.Module, calibration: Tensor, evaluation: Tensor) -> Result:
    """Calibrates, quantizes and evaluates; windows are int64 [windows, tokens]."""
    model, _ = load_lm(folder=folder)
    start = time.perf_counter()
    try:
        quantized, remark = recipes()[tool](model, calibration)
        seconds = time.perf_counter() - start
        count = rounding_linears(quantized, calibration[:1, :LENGTH])
        found = sqcompile.evaluate(quantized, evaluation, against=reference, layers=False, progress=False)
    except Exception as e:  # whatever a tool raises, in its own words; the others go on
        return Result(folder, tool, None, words(e))
    return Result(folder, tool, found, remark, count, seconds)


def rounding_linears(model: nn.Module, window: Tensor) -> tuple[int, int]:
    """How many linears round their activations, and how many linears there are, whatever tool has made them.

    f(x + y) - f(x) - f(y) + f(0) is zero for an affine function, and is not for one that rounds what it reads. x and y
    are rows that the linear reads in ``window``, int64 [1, tokens].
    """
    if isinstance(model, sqcompile.CompiledModel):
        return sum(l.quantized for l in model.plan.layers), len(model.plan.layers)
    read = dict[nn.Module, Tensor]()

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        read[module] = args[0].detach().clone()

    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    hooks = [m.register_forward_pre_hook(keep) for m in linears]
    with torch.no_grad():
        model(input_ids=window, use_cache=False)
    for hook in hooks:
        hook.remove()
    return sum(defect(m, x) > 1e-4 for m, x in read.items()), len(linears)


@torch.no_grad()
def defect(linear: nn.Module, rows: Tensor) -> float:
    """How far from affine a linear is on rows float32 [..., tokens, K], relative to its output; some 1e-7 in float32."""
    x, y = rows.chunk(2, dim=-2)
    both = linear(x + y)
    rest = both - linear(x) - linear(y) + linear(torch.zeros_like(x))
    return float(rest.norm() / both.norm())


def cell(result: Result) -> str:
    """Increase of perplexity in percent and KL in 1e-4 nats, each with its error; or that there is none."""
    e = result.found
    if e is None:
        return "refused"
    more = f"{e.increase:+.3f} ± {e.increase_error:.3f}, {1e4 * (e.kl or 0):.2f} ± {1e4 * (e.kl_error or 0):.2f}"
    return f"{more} (by hand)" if result.remark else more


def table(results: Sequence[Result]) -> Iterable[str]:
    """The table, and under it what tools said."""
    folders, tools = dict.fromkeys(r.folder for r in results), dict.fromkeys(r.tool for r in results)
    by = {(r.tool, r.folder): r for r in results}
    yield "| | " + " | ".join(map(name, folders)) + " |"
    yield "|---" * (1 + len(folders)) + "|"
    for tool in tools:
        yield f"| {tool} | " + " | ".join(cell(by[tool, f]) for f in folders) + " |"
    yield ""
    for r in results:
        n, total = r.quantized
        yield f"{name(r.folder)}, {r.tool}: {n} of {total} linears, {r.seconds:.0f} s. {r.remark}"


def name(folder: Path) -> str:
    return "llama" if folder.resolve() == DATA else folder.name


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sqcompile.bench tools", description=__doc__)
    parser.add_argument(
        "--models", type=Path, nargs="+", default=[DATA], help="folders; by default the shipped model's"
    )
    parser.add_argument("--windows", type=int, help=f"held-out windows of {LENGTH} tokens; all of them by default")
    parser.add_argument("--calibration", type=int, default=16, help="calibration windows of 512 tokens")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument("--jobs", type=int, default=1, help="models at the same time, each in a process")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each process")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    tools = [t for t in recipes() if args.only in t]
    job = functools.partial(compare, tools=tools, calibration=args.calibration, windows=args.windows)
    if args.jobs == 1:
        found = [*map(job, args.models)]
    else:
        start: Callable[[int], None] = torch.set_num_threads
        with ProcessPoolExecutor(args.jobs, get_context("spawn"), initializer=start, initargs=(args.threads,)) as pool:
            found = [*pool.map(job, args.models)]
    results = [r for of_model in found for r in of_model]
    windows = {r.found.windows for r in results if r.found}
    print(
        f"\n{machine()}, {versions(PACKAGES)}, {datetime.date.today()}\n\n"
        f"More perplexity than in float, in percent, and KL divergence, in 1e-4 nats; {args.calibration} calibration windows of "
        f"512 tokens, {', '.join(map(str, windows))} held-out windows of {LENGTH}; ± is the (paired) standard error\n"
    )
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
