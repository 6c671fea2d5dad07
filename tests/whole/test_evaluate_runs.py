"""`sqcompile.evaluate`: how models are called, what stands for the float model, and what is printed of what is not known."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from evaluate_cases import Bigrams, Characters, Decoder, evaluate, rows, tables
from torch import Tensor, nn

import sqcompile
from sqcompile import EvaluationError
from sqcompile.evaluation.layers import _Outputs
from sqcompile.evaluation.runs import Run

IDS = torch.stack(rows(11, [8] * 6, 0))


class Scaled(Bigrams):
    def forward(self, input_ids: Tensor, use_cache: bool = False, scale: Tensor | None = None) -> Any:
        assert use_cache is False
        return SimpleNamespace(logits=self.table[input_ids] * (1 if scale is None else scale))


def test_arguments_by_position_stay_in_their_places() -> None:
    _, table = tables(11, 0.3, 0)
    found = evaluate(Scaled(table), [(IDS, False, torch.tensor(2.0))])
    assert found.perplexity == pytest.approx(evaluate(Bigrams(2 * table), IDS).perplexity, rel=1e-6)


def _small(compiled: str) -> nn.Module:
    """A model that is quantized in one way or another."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)).eval()
    how: Any = {"backend": "smoothquant", "options": {"compiler": "eager", "calibration_steps": 1}}
    if compiled == "sqcompile.compile":
        return sqcompile.compile(model, [torch.randn(4, 8)] * 2, backend="eager", progress=False)
    if compiled == "torch.compile":
        return torch.compile(model, **how)  # type: ignore[return-value]
    if compiled == "a layer":
        model[1] = torch.compile(model[1], **how)  # type: ignore[assignment]
        return model
    part = {"in place": model, "a layer in place": model[1]}[compiled]
    part.compile(**how)
    return model


@pytest.mark.parametrize("compiled", ["sqcompile.compile", "torch.compile", "a layer", "in place", "a layer in place"])
def test_a_quantized_model_is_no_float_model(compiled: str, fresh_dynamo: None) -> None:
    model = _small(compiled)
    with pytest.raises(EvaluationError, match=r"against is quantized itself.*load the float model once more"):
        evaluate(model, [torch.randn(4, 8)], against=model)


@pytest.mark.parametrize("backend", [None, "eager"])
def test_a_float_model_may_be_compiled(backend: str | None, fresh_dynamo: None) -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)).eval()
    if backend is not None:
        model.compile(backend=backend)
    assert evaluate(model, [torch.randn(4, 8)], against=model).top1 == 100


def test_a_part_that_calibrates_itself_sees_no_evaluation_data(fresh_dynamo: None) -> None:
    class Layer(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    model, x = nn.Sequential(nn.LayerNorm(8), Layer(8, 8)).eval(), torch.randn(4, 8)
    model[1].compile(backend="smoothquant", options={"compiler": "eager", "calibration_steps": 2})
    calls: list[None] = []
    model[0].register_forward_hook(lambda *_: calls.append(None))
    other = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)).eval()
    with pytest.raises(EvaluationError, match=r"has seen a batch: torch.compiler.reset\(\) has it forget"):
        evaluate(model, [x], against=other)
    before = len(calls)
    with pytest.raises(EvaluationError, match="on the evaluation data: call it on calibration data first"):
        evaluate(model, [x], against=other)
    assert len(calls) == before


def test_what_has_no_value_is_not_defined() -> None:
    table = torch.zeros(7, 7)
    table[:, 3] = -math.inf
    found = evaluate(Bigrams(table), [[1, 2, 3, 4]] * 2, against=Bigrams(table))
    assert (
        found.perplexity == math.inf and math.isnan(found.increase or 0.0) and math.isnan(found.increase_error or 0.0)
    )
    line = next(l for l in str(found).splitlines() if "increase" in l)
    assert line.split("%")[1].strip() == "not defined"


def test_speed_leaves_out_the_first_call_of_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {8: iter([100.0, 1.0, 3.0]), 5: iter([100.0, 2.0])}
    clock = [0.0]

    class Timed(Bigrams):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            clock[0] += next(seconds[input_ids.shape[1]])
            return super().forward(input_ids)

    monkeypatch.setattr(Run, "_now", lambda self: clock[0])
    batches = [IDS[:2], IDS[:2, :5], IDS[:2], IDS[:2, :5], IDS[:2]]
    assert evaluate(Timed(torch.zeros(11, 11)), batches).tokens_per_second == pytest.approx(
        16 / 3
    )  # of 16, 5 and 16 / 3
    seconds[8], seconds[5] = iter([1.0]), iter([1.0])
    found = evaluate(Timed(torch.zeros(11, 11)), batches[:2])
    assert found.tokens_per_second is None
    assert next(l for l in str(found).splitlines() if "tokens/s" in l).endswith("not measured")


def test_an_evaluation_is_of_the_same_contexts_and_counts() -> None:
    reference, table = tables(11, 0.3, 0)
    labels = IDS.clone()
    labels[:, :-1] = -100  # the last token of each alone
    float_alone = evaluate(Bigrams(reference), [{"input_ids": IDS, "labels": labels}])
    same = evaluate(
        Bigrams(table), [{"input_ids": i, "labels": l} for i, l in zip(IDS, labels, strict=True)], against=float_alone
    )
    assert same.windows == 6 and same.increase is not None
    other = torch.cat([(IDS[:, :-1] + 1) % 11, IDS[:, -1:]], 1)
    with pytest.raises(EvaluationError, match="of other data"):
        evaluate(Bigrams(table), [{"input_ids": other, "labels": labels}], against=float_alone)
    with pytest.raises(EvaluationError, match="of other data"):
        evaluate(
            Bigrams(table),
            [{"input_ids": IDS, "labels": labels}],
            against=dataclasses.replace(float_alone, counts=float_alone.counts.flip(0) + torch.arange(6)),
        )


def test_an_evaluation_is_of_the_same_source() -> None:
    reference, table = tables(11, 0.3, 0)
    batch = {"input_ids": IDS[:, :5], "decoder_input_ids": IDS}
    float_alone = evaluate(Decoder(reference), [batch])
    assert evaluate(Decoder(table), [batch], against=float_alone).increase is not None
    with pytest.raises(EvaluationError, match="of other data"):
        evaluate(Decoder(table), [batch | {"input_ids": IDS[:, :4]}], against=float_alone)


def test_a_limit_takes_no_more_from_a_loader() -> None:
    made: list[int] = []

    def loader() -> Iterator[Tensor]:
        for i in range(6):
            made.append(i)
            yield IDS[i : i + 1]

    assert evaluate(Bigrams(torch.zeros(11, 11)), loader(), limit=3).windows == 3
    assert made == [0, 1, 2]


def test_memory_that_runs_out_is_no_refusal() -> None:
    class Full(Bigrams):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        evaluate(Full(torch.zeros(11, 11)), IDS)


def test_too_little_text_leads_to_length() -> None:
    with pytest.raises(EvaluationError, match="too few for one window of 512: pass a smaller length="):
        evaluate(Bigrams(torch.zeros(30, 30)), "abc", tokenizer=Characters())


def test_a_linear_that_a_stage_lacks_is_named() -> None:
    gm = torch.fx.symbolic_trace(nn.Identity())
    with pytest.raises(sqcompile.StageError, match=r"the linear up\.weight is not in all stages"):
        _Outputs(gm, [torch.zeros(1)], {}).take("up.weight")
