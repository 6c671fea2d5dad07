"""evaluate: what a compiled model has lost beside the float model, on the user's data, each number with its error.

print(sqcompile.evaluate(compiled, text, against=model, tokenizer=tokenizer))
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from sqcompile.capture.inputs import Call, Reader
from sqcompile.compiled.emit import CompiledModel
from sqcompile.errors import CalibrationError, EvaluationError, StageError
from sqcompile.evaluation.compared import KINDS, Signs, Tokens
from sqcompile.evaluation.data import LENGTH, batches
from sqcompile.evaluation.layers import layer_errors
from sqcompile.evaluation.measure import MODELS, Measure
from sqcompile.evaluation.result import Evaluation, LayerError
from sqcompile.evaluation.runs import Run, evaluating, forward_of, original
from sqcompile.evaluation.scores import mean_and_error
from sqcompile.evaluation.streamed import Streamed
from sqcompile.process.interrupts import deferred, each_at_once
from sqcompile.process.progress import Show, part, stages
from sqcompile.results import calibrates_itself, is_quantized

__all__ = ["Evaluation", "LayerError", "evaluate"]

_CALLS = 8  # that are kept to compare layers by


def evaluate(
    model: nn.Module | str | os.PathLike[str],
    data: Any,
    *,
    against: nn.Module | Evaluation | str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    length: int | None = None,
    limit: int | None = None,
    batch_size: int = 4,
    compare: str = "auto",
    layers: bool = True,
    progress: Show = True,
) -> Evaluation:
    """Measures a model on data, and what it has lost beside its float model.

    What is measured follows from what the model gives for the first batch:

    - next_token: logits [batch, tokens, vocabulary] for token ids [batch, tokens] (or for labels of that size). Of models
      of this kind alone perplexity can be told without a float model. A plain tensor counts as logits if its last dim is
      the configuration's vocabulary or, without a configuration, larger than every token id.
    - tokens: other logits [batch, tokens, classes], as transformers' MaskedLMOutput and TokenClassifierOutput have them:
      KL divergence and top-1 agreement of each token's own distribution.
    - classes: logits or a plain tensor [batch, classes]: the same of each row. One of the token ids' sizes is none.
    - outputs: anything else: relative error and cosine of all tensors in floating point.

    Logits are what the output has under this name. Padding never counts: what ``attention_mask`` (of a decoder's tokens
    ``decoder_attention_mask``) has as 0, what stands right after it, and what ``labels`` have as -100. Padding of which
    neither has the length of the outputs is refused. Labels are those of transformers, not shifted. Neither model is changed; both are run in eval mode.

    Args:
        model: what `sqcompile.compile` gave, what ``torch.compile(model, backend="smoothquant")`` gave, or any module; or the
            path of a directory with a model, INT8 or float, which need not fit in memory (`memory_limit`): all batches run
            through one part of it after the other, so that each weight is read once.
        data: text, a str or a list of them; token ids, int64 [windows, length] or a list of rows; or a loader or list of
            batches, each a tensor, a tuple of arguments or a dict of keyword arguments, as for calibration. Batches are
            moved to the model's device.
        against: the float model, not compiled to INT8 in place, or the path of its directory; or an `Evaluation` of it on the same data, which saves running it again and gives the
            paired increase of perplexity, and nothing else.
        tokenizer: of text. Windows are cut as by `sqcompile.lm.token_windows`.
        length: tokens in a window of text; 512, or as many as the model's configuration allows, if None.
        limit: at most this many windows: of text and token ids taken evenly over all of it, of a loader the first ones,
            up to the end of a batch.
        batch_size: windows of text or of token ids in a call.
        compare: "auto", or which of the four kinds above it is.
        layers: whether to measure the SQNR of each quantized linear's output, on up to 1024 rows of the first batches. It
            takes ``against`` and a model that `sqcompile.compile` made, whose stages are rebuilt for it.
        progress: as for `sqcompile.compile`: True, False, or a function that is told.

    Returns:
        An Evaluation; ``print`` it for a table.

    Raises:
        EvaluationError: for data or models that cannot be evaluated; the message names what to do.
        SQCompileError: what a compiled model itself raises.
        torch.OutOfMemoryError: of a device.
        KeyboardInterrupt: for Ctrl-C, when the call at hand is done; a second one is raised at once.
    """
    model = Streamed(model) if isinstance(model, (str, os.PathLike)) else model
    against = Streamed(against) if isinstance(against, (str, os.PathLike)) else against
    beside = against if isinstance(against, nn.Module) else None
    _check(model, against, compare)
    reader = _reader(model if beside is None else beside)
    found, total = batches(
        data, reader, tokenizer, _length(model, beside) if length is None else length, limit, batch_size
    )
    runs = [Run(m, what) for m, what in zip((model, beside), MODELS, strict=True) if m is not None]
    measure = Measure(compare, Signs.of(reader.forward))
    kept = list[Call]()
    if _calibrates(model):
        raise EvaluationError(f"{_CALIBRATES}: {_CALIBRATE}")
    left_out = _without_layers(model, beside) if layers else "layers=False"
    names = ("evaluate", "layers") if left_out is None else ("evaluate",)
    with deferred(), torch.no_grad(), evaluating([r.model for r in runs]), stages(names, progress) as enter:
        enter("evaluate")
        with part(total=total) as done:
            # each run takes the calls as it needs them: one after the other, or all of them first
            ahead = limit if any(isinstance(run.model, Streamed) for run in runs) else None
            calls, *each = itertools.tee(_calls(found, reader, ahead), 1 + len(runs))
            every = [
                run.outputs((call, 0 if tokens.ids is None else tokens.ids.numel()) for call, tokens in own)
                for run, own in zip(runs, each, strict=True)
            ]
            for i, (call, tokens) in enumerate(calls):
                outs = [next(outputs) for outputs in every]
                if i == 0 and _calibrates(model):
                    raise EvaluationError(f"{_CALIBRATES}, of which it has seen a batch: {_RESET}{_CALIBRATE}")
                measure.add(outs, tokens, i)
                del outs  # logits of the next batch would lie beside them
                if len(kept) < _CALLS:
                    kept.append(call)
                done()
                if limit is not None and measure.windows >= limit:
                    break  # before the loader makes another one
        result = _result(measure, runs, against)
        if left_out is None:
            enter("layers")
            return _with_layers(result, model, runs[0], kept)
    return dataclasses.replace(result, without_layers=left_out)


def _calls(found: Iterable[Any], reader: Reader, limit: int | None) -> Iterator[tuple[Call, Tokens]]:
    """The calls that batches stand for. With a limit, up to the end of the one that has its last window."""
    windows = 0
    for i, batch in enumerate(each_at_once(found)):
        if isinstance(batch, (str, bytes)):
            raise EvaluationError("data gives text: pass a list of it, list(data), and the model's tokenizer")
        call = reader.call(batch, i)
        tokens = Tokens.of(batch, call, reader.rows)
        yield call, tokens
        windows += 1 if tokens.ids is None or not tokens.ids.dim() else len(tokens.ids)
        if limit is not None and windows >= limit:
            return


_CALIBRATES = "the model still calibrates itself, and would do so on the evaluation data"
_RESET = "torch.compiler.reset() has it forget that. Then "
_CALIBRATE = "call it on calibration data first, more often than its calibration_steps, or compile it with options={'plan': plan}"


def _calibrates(model: nn.Module) -> bool:
    """Whether a model, or a part of it that was compiled alone, has no plan yet; unknown before its first call."""
    return calibrates_itself(model) or any(calibrates_itself(m) for m in original(model).modules())


def _check(model: Any, against: Any, compare: str) -> None:
    """Refuses what is none of the arguments."""
    if not isinstance(model, nn.Module):
        raise EvaluationError(f"the model is a {type(model).__name__}: pass an nn.Module, or the path of a directory")
    if not isinstance(against, (nn.Module, Evaluation, type(None))):
        raise EvaluationError(f"against is a {type(against).__name__}: pass the float model, or an Evaluation of it")
    if isinstance(against, nn.Module) and (
        is_quantized(against) or (isinstance(against, Streamed) and against.plan is not None)
    ):
        raise EvaluationError("against is quantized itself, or a layer of it is: load the float model once more")
    if compare not in ("auto", *KINDS):
        raise EvaluationError(f"compare={compare!r}: choose one of auto, {', '.join(KINDS)}")


def _reader(model: nn.Module) -> Reader:
    return Reader(original(model), forward=forward_of(model), what="batch", error=EvaluationError)


def _length(model: nn.Module, beside: nn.Module | None) -> int:
    config = forward_of(model if beside is None else beside).config
    most = getattr(config, "max_position_embeddings", None)
    return min(LENGTH, most) if isinstance(most, int) and most >= 2 else LENGTH


def _result(measure: Measure, runs: Sequence[Run], against: Any) -> Evaluation:
    if not measure.windows:
        raise EvaluationError("there is no data: pass at least one batch")
    counts = measure.sums("count")
    if not len(counts):
        raise EvaluationError(
            "nothing in the data counts: a window needs two tokens that are real (attention_mask 1) and not labelled -100"
        )
    speeds = [run.speed() for run in runs]
    values: dict[str, Any] = {"tokens_per_second": speeds[0]}
    if len(runs) == 2:
        values["float_tokens_per_second"] = speeds[1]
    if measure.has("loss"):
        values |= _perplexities(measure, counts, against)
    if measure.has("kl"):
        values["kl"], values["kl_error"] = mean_and_error(measure.sums("kl"), counts)
        share, error = mean_and_error(measure.sums("same"), counts)
        values |= {"top1": 100 * share, "top1_error": 100 * error}
    if measure.has("cosine"):
        values["cosine"], values["cosine_error"] = mean_and_error(measure.sums("cosine"), counts)
        values["relative_error"], values["relative_error_error"] = _relative(measure)
    return Evaluation(measure.words, len(counts), int(counts.sum()), counts=counts, **values)


def _perplexities(measure: Measure, counts: torch.Tensor, against: Any) -> dict[str, Any]:
    mine = measure.sums("loss")
    values: dict[str, Any] = {"checksum": measure.checksum(), "losses": mine / counts}
    values["perplexity"], values["perplexity_error"] = _exp(*mean_and_error(mine, counts))
    if isinstance(against, Evaluation):
        if against.losses is None or against.checksum != values["checksum"] or not torch.equal(against.counts, counts):
            raise EvaluationError("against is an Evaluation of other data: evaluate the float model on this data")
        other = against.losses * against.counts
    elif measure.has("other_loss"):
        other = measure.sums("other_loss")
    else:
        return values
    values["float_losses"] = other / counts
    values["float_perplexity"], values["float_perplexity_error"] = _exp(*mean_and_error(other, counts))
    ratio, error = _exp(*mean_and_error(mine - other, counts))
    return values | {"increase": 100 * (ratio - 1), "increase_error": 100 * error}


def _exp(mean: float, error: float) -> tuple[float, float]:
    """exp of a mean, and its standard error."""
    value = math.inf if mean >= 700 else math.exp(mean)  # NaN of NaN: of two infinite losses there is no difference
    return value, value * error


def _relative(measure: Measure) -> tuple[float, float]:
    """√(Σ noise / Σ signal), and its standard error."""
    noise, signal = measure.sums("noise"), measure.sums("signal")
    if float(signal.sum()) == 0:
        return (0.0 if float(noise.sum()) == 0 else math.inf), math.nan
    square, error = mean_and_error(noise, signal)
    return math.sqrt(square), error / (2 * math.sqrt(square)) if square else 0.0


def _without_layers(model: nn.Module, beside: nn.Module | None) -> str | None:
    """Why layers cannot be compared, or None."""
    if not isinstance(model, CompiledModel):
        return "only what sqcompile.compile gave has stages to compare"
    if beside is None:
        return "it takes the float model, against="
    return None


def _with_layers(result: Evaluation, model: nn.Module, run: Run, calls: Sequence[Call]) -> Evaluation:
    assert isinstance(model, CompiledModel)
    moved = [c.to(run.device) for c in calls]
    try:
        return dataclasses.replace(result, layers=layer_errors(model, moved))
    except (StageError, CalibrationError) as e:  # the float model is gone or changed; padding that cannot be told
        return dataclasses.replace(result, without_layers=str(e))
