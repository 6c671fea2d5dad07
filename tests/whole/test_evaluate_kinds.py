"""`sqcompile.evaluate`: what is taken for logits, and for padding."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from evaluate_cases import Bigrams, Plain, evaluate, rows, tables
from torch import Tensor, nn

import sqcompile
from sqcompile import EvaluationError

IDS = torch.stack(rows(11, [8] * 4, 0))
MASK = (torch.arange(8) < torch.tensor([[8], [6], [8], [3]])).long()


class Strided(nn.Module):
    """Logits [B, T / 2, 12] of T numbers, as a model of audio has them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 12, generator=torch.Generator().manual_seed(seed)))

    def forward(self, input_values: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": input_values.unflatten(1, (-1, 2)) @ self.weight}


def test_padding_of_another_length_than_the_logits_is_refused() -> None:
    x, mask = torch.randn(2, 40), torch.ones(2, 40, dtype=torch.int64)
    models = Strided(0), Strided(1)
    assert evaluate(models[0], [{"input_values": x, "attention_mask": mask}], against=models[1]).tokens == 40
    mask[1, 20:] = 0
    batch = {"input_values": x, "attention_mask": mask}
    with pytest.raises(
        EvaluationError, match=r"padding by attention_mask \[2, 40\].*\[2, 20\].*without padding, or of one"
    ):
        evaluate(models[0], [batch], against=models[1])
    labels = mask[:, ::2].clone()
    labels[mask[:, ::2] == 0] = -100
    assert evaluate(models[0], [batch | {"labels": labels}], against=models[1], compare="tokens").tokens == 30
    with pytest.raises(EvaluationError, match=r"padding by labels \[2, 19\]"):
        evaluate(models[0], [{"input_values": x, "labels": labels[:, 1:]}], against=models[1])
    with pytest.raises(EvaluationError, match=r"padding by attention_mask \[2, 40\]"):
        evaluate(models[0], [batch], against=models[1], compare="outputs")


def test_labels_of_classes_leave_rows_out() -> None:
    class Classifier(Bigrams):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            return SimpleNamespace(logits=self.table[input_ids[:, 0]])

    reference, table = tables(11, 0.3, 0)
    kept = torch.tensor([True, True, False, True])
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": torch.tensor([0, 1, -100, 2])}
    found = evaluate(Classifier(table), [batch], against=Classifier(reference))
    r, p = (t.double().log_softmax(-1)[IDS[kept, 0]] for t in (reference, table))
    assert found.tokens == 3
    assert found.kl == pytest.approx(float((r.exp() * (r - p)).sum(-1).mean()), rel=1e-4)
    with pytest.raises(EvaluationError, match=r"padding by labels \[3\]"):
        evaluate(Classifier(table), [batch | {"labels": torch.tensor([0, -100, 2])}], against=Classifier(reference))


def test_a_number_for_each_token_is_no_class() -> None:
    class Detector(Bigrams):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            return {"logits": self.table[input_ids].sum(-1)}

    reference, table = tables(11, 0.3, 0)
    found = evaluate(Detector(table), [{"input_ids": IDS, "attention_mask": MASK}], against=Detector(reference))
    real = MASK.bool()
    want, got = (t.sum(-1)[IDS][real].double() for t in (reference, table))
    assert found.kl is None and found.compared.startswith("outputs")
    assert found.relative_error == pytest.approx(float((got - want).norm() / want.norm()), rel=1e-5)
    assert evaluate(Detector(table), [IDS], against=Detector(reference), compare="classes").kl is not None


def test_what_may_be_a_vector_or_numbers_of_tokens_has_no_padding() -> None:
    class Pooled(Bigrams):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            return self.table[input_ids[:, 0], :8]

    reference, table = tables(11, 0.3, 0)
    found = evaluate(Pooled(table), [IDS], against=Pooled(reference))
    want, got = (t[IDS[:, 0], :8].double() for t in (reference, table))
    assert found.relative_error == pytest.approx(float((got - want).norm() / want.norm()), rel=1e-5)
    with pytest.raises(EvaluationError, match=r"the output \[4, 8\] has the sizes of the token ids"):
        evaluate(Pooled(table), [{"input_ids": IDS, "attention_mask": MASK}], against=Pooled(reference))


@pytest.mark.parametrize(
    ("config", "is_language_model"),
    [
        (None, True),
        ({"vocab_size": 11, "hidden_size": 4}, True),
        ({"vocab_size": 9, "hidden_size": 4}, True),  # a head that is padded
        ({"vocab_size": 12, "hidden_size": 11}, False),
        ({"vocab_size": 9, "hidden_size": 11}, False),
        ({"vocab_size": 11, "hidden_size": 11}, True),
        ({"hidden_size": 11}, False),
    ],
)
def test_outputs_without_names_are_logits_by_the_configuration(config: Any, is_language_model: bool) -> None:
    reference, table = tables(11, 0.3, 0)
    models = Plain(table), Plain(reference)
    for model in models:
        model.config = config and SimpleNamespace(**config)
    ids = IDS % 9
    found = evaluate(models[0], [(ids,)], against=models[1])
    assert (found.perplexity is not None, found.relative_error is None) == (is_language_model,) * 2
    if not is_language_model:
        with pytest.raises(EvaluationError, match="perplexity is all there is"):
            evaluate(models[0], [(ids,)])


def test_a_compiled_encoder_that_outlives_its_float_model_has_no_perplexity() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix = nn.Embedding(12, 16), nn.Linear(16, 16)
            self.config = SimpleNamespace(vocab_size=12, hidden_size=16)

        def forward(self, input_ids: Tensor) -> Tensor:
            out: Tensor = self.mix(self.embed(input_ids))
            return out

    compiled = sqcompile.compile(Hidden().eval(), [IDS, IDS[:2]], backend="eager", progress=False)
    with pytest.raises(EvaluationError, match=r"this one gives outputs: output \[4, 8, 16\]"):
        evaluate(compiled, IDS)


def test_a_masked_language_model_has_no_perplexity_by_its_class() -> None:
    class TinyForMaskedLM(Bigrams):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            return (self.table[input_ids],)

    reference, table = tables(11, 0.3, 0)
    found = evaluate(TinyForMaskedLM(table), IDS, against=TinyForMaskedLM(reference))
    r, p = (t.double().log_softmax(-1)[IDS] for t in (reference, table))
    assert found.perplexity is None and found.tokens == 32
    assert found.kl == pytest.approx(float((r.exp() * (r - p)).sum(-1).mean()), rel=1e-4)


def test_tokens_that_are_no_classes_lead_to_compare() -> None:
    reference, table = tables(11, 0.3, 0)
    models = Bigrams(table[:, :3]), Bigrams(reference[:, :3])
    with pytest.raises(EvaluationError, match="predict none, compare='tokens'"):
        evaluate(models[0], IDS, against=models[1])
    found = evaluate(models[0], IDS, against=models[1], compare="tokens")
    assert found.tokens == 32 and found.perplexity is None and not math.isnan(found.kl or math.nan)
