"""`sqcompile.evaluate`: known answers, errors of paired differences, padding, kinds of data and of outputs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_lm
from evaluate_cases import (
    Bigrams,
    Characters,
    Decoder,
    Encoder,
    Plain,
    agree,
    evaluate,
    expected,
    padded,
    rows,
    tables,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sqcompile import Evaluation, EvaluationError
from sqcompile.statistics.divergence import divergence
from sqcompile.windows import token_windows

NAMES = [f.name for f in dataclasses.fields(Evaluation) if f.type == "float | None" and "second" not in f.name]


def test_of_a_uniform_model_and_a_perfect_one() -> None:
    ids = torch.arange(9).repeat(5, 1) % 7
    uniform = evaluate(Bigrams(torch.zeros(7, 7, dtype=torch.float16)), ids, batch_size=2)
    assert uniform.perplexity == pytest.approx(7, rel=1e-6) and uniform.perplexity_error == pytest.approx(0, abs=1e-6)
    assert (uniform.windows, uniform.tokens) == (5, 40) and uniform.kl is None and uniform.increase is None
    perfect = Bigrams(100 * torch.eye(7).roll(1, 1))
    found = evaluate(perfect, ids, against=Bigrams(torch.zeros(7, 7)))
    assert found.perplexity == pytest.approx(1) and found.float_perplexity == pytest.approx(7)
    # to a model that is sure of one of seven tokens, a uniform one diverges by the mean of six logits of -100
    assert found.kl == pytest.approx(100 * 6 / 7 - math.log(7), rel=1e-6)
    same = evaluate(perfect, ids, against=perfect)
    assert (same.increase, same.increase_error, same.kl, same.top1) == (0, 0, 0, 100)


@settings(max_examples=25, deadline=None)
@given(
    scale=st.sampled_from([0.01, 0.3, 3.0]),
    lengths=st.lists(st.integers(2, 9), min_size=2, max_size=7),
    size=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_every_number_is_what_it_is_by_definition(scale: float, lengths: list[int], size: int, seed: int) -> None:
    reference, table = tables(11, scale, seed)
    windows = rows(11, lengths, seed)
    found = evaluate(Bigrams(table), windows, against=Bigrams(reference), batch_size=size)
    assert (found.windows, found.tokens) == (len(lengths), sum(lengths) - len(lengths))
    agree(found, expected(table, reference, windows), 1e-3)


def test_the_error_is_that_of_the_mean_of_paired_differences() -> None:
    reference, table = tables(11, 0.2, 0)
    windows = torch.stack(rows(11, [40] * 12, 1))
    found = evaluate(Bigrams(table), windows, against=Bigrams(reference))
    assert found.losses is not None and found.float_losses is not None
    difference = found.losses - found.float_losses
    want = 100 * math.exp(float(difference.mean())) * float(difference.std()) / 12**0.5
    assert found.increase_error == pytest.approx(want, rel=1e-9)
    # pairing is what makes it small: the errors of both perplexities tell nothing of so small a difference
    assert found.perplexity_error is not None and found.perplexity is not None
    assert want < 100 * found.perplexity_error / found.perplexity / 2
    one = evaluate(Bigrams(table), windows[:1], against=Bigrams(reference))
    assert math.isnan(one.increase_error or 0.0) and "± ?" in str(one)


@pytest.mark.parametrize("scale", [1e-4, 1e-3, 1e-1, 10.0])
def test_divergence_keeps_its_digits_however_small(scale: float) -> None:
    reference, table = tables(1000, scale, 0)
    log_r, log_p = reference.log_softmax(-1), table.log_softmax(-1)
    r, p = reference.double().log_softmax(-1), table.double().log_softmax(-1)
    want = (r.exp() * (r - p)).sum(-1)
    found = divergence(log_r, log_p).double()
    assert float((found - want).norm() / want.norm()) < 1e-3
    assert float(found.min()) >= 0


def test_tokens_that_cannot_be_have_no_divergence() -> None:
    reference, table = tables(6, 0.5, 0)
    reference[:, 4:] = table[:, 4:] = -math.inf
    table[:, 4] = -20.0
    found = evaluate(Bigrams(table), [[0, 1, 2, 3]] * 2, against=Bigrams(reference))
    r, p = reference[:3, :4].double().log_softmax(-1), table[:3].double().log_softmax(-1)[:, :4]
    assert found.kl == pytest.approx(float((r.exp() * (r - p)).sum(-1).mean()), rel=1e-4)


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 7), min_size=2, max_size=6),
    how=st.sampled_from(["right", "left", "labels", "untaken mask"]),
    value=st.integers(0, 10),
    seed=st.integers(0, 99),
)
def test_padding_never_counts(lengths: list[int], how: str, value: int, seed: int) -> None:
    reference, table = tables(11, 0.3, seed)
    windows = rows(11, lengths, seed)
    batches: list[Any] = []
    for part in (windows[:1], windows[1:]):
        ids, mask = padded(part, how == "left", value)
        kind = Plain if how == "untaken mask" else Bigrams
        named = {"ids" if kind is Plain else "input_ids": ids}
        labels = {"labels": ids.masked_fill(mask == 0, -100)} if how == "labels" else {"attention_mask": mask}
        batches.append(named | labels)
    if kind is Plain:
        with pytest.warns(UserWarning, match="attention_mask"):
            found = evaluate(kind(table), batches, against=kind(reference))
    else:
        found = evaluate(kind(table), batches, against=kind(reference))
    bare = evaluate(Bigrams(table), windows, against=Bigrams(reference))
    assert (found.windows, found.tokens) == (bare.windows, bare.tokens)
    agree(found, {n: getattr(bare, n) for n in NAMES if getattr(bare, n) is not None}, 1e-6)
    if lengths == sorted(lengths):  # rows of one length are put together, so that others may come in another order
        assert found.checksum == bare.checksum


def test_padding_of_a_real_model_changes_nothing_but_rounding() -> None:
    model, windows = tiny_lm("llama"), rows(90, [12, 17, 9], 0)
    ids, mask = padded(windows)
    a = evaluate(model, [{"input_ids": ids, "attention_mask": mask}])
    b = evaluate(model, windows)
    assert a.tokens == b.tokens and a.perplexity == pytest.approx(b.perplexity, rel=1e-5)


def test_data_is_text_or_ids_or_a_loader() -> None:
    reference, table = tables(30, 0.3, 0)
    text = "thequickbrownfoxjumpsoverthelazydog" * 2
    windows = token_windows([text], Characters(), 8)
    assert windows.shape == (10, 8) and set(windows[:, 0].tolist()) == {1}
    want = evaluate(Bigrams(table), windows, against=Bigrams(reference))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(windows), batch_size=3)
    ones = torch.ones_like(windows)

    def generator() -> Iterator[Any]:
        yield {"input_ids": windows[:5], "labels": windows[:5]}
        yield windows[5:], ones[5:]

    for data, options in (
        (text, {"tokenizer": Characters(), "length": 8}),
        ([text[:40], text[40:]], {"tokenizer": _without_ends(), "length": 7}),
        (windows.int(), {}),
        (list(windows), {}),
        (windows.tolist(), {"batch_size": 3}),
        (list(windows.split(4)), {}),
        (loader, {}),
        (generator(), {}),
    ):
        found = evaluate(Bigrams(table), data, against=Bigrams(reference), **options)
        if not isinstance(options.get("tokenizer"), Characters) or options["length"] == 8:
            assert found.checksum == want.checksum
            agree(found, {n: getattr(want, n) for n in NAMES if getattr(want, n) is not None}, 1e-6)
        else:  # as many tokens of text, and no BOS
            assert (found.windows, found.tokens) == (10, 60)
    for data in (windows, list(windows), [windows[i : i + 1] for i in range(10)]):
        assert evaluate(Bigrams(table), data, limit=4).windows == 4


def _without_ends() -> Characters:
    tokenizer = Characters()
    tokenizer.bos_token_id = tokenizer.eos_token_id = None
    return tokenizer


def test_of_an_encoder_decoder_labels_are_the_next_tokens() -> None:
    reference, table = tables(11, 0.3, 0)
    ids = torch.stack(rows(11, [8] * 3, 0))
    want = expected(table, reference, list(ids))
    given_labels = {"input_ids": ids[:, :5], "decoder_input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    for batch in (given_labels, {"input_ids": ids[:, :5], "decoder_input_ids": ids}):
        agree(evaluate(Decoder(table), [batch], against=Decoder(reference)), want, 1e-3)


def test_an_evaluation_stands_for_the_float_model() -> None:
    reference, table = tables(11, 0.3, 0)
    windows = rows(11, [8, 8, 5, 3], 0)
    float_alone = evaluate(Bigrams(reference), windows)
    found = evaluate(Bigrams(table), windows, against=float_alone, batch_size=1)
    want = evaluate(Bigrams(table), windows, against=Bigrams(reference))
    for name in ("increase", "increase_error", "float_perplexity", "float_perplexity_error"):
        assert getattr(found, name) == pytest.approx(getattr(want, name), rel=1e-6)
    assert found.kl is None and float_alone.increase is None
    for data in (windows[:3], rows(11, [8, 8, 5, 3], 1)):
        with pytest.raises(EvaluationError, match="of other data"):
            evaluate(Bigrams(table), data, against=float_alone)


def test_outputs_that_are_no_logits_have_an_error_and_a_cosine() -> None:
    windows = rows(20, [4, 6, 3], 0)
    ids, mask = padded(windows, value=7)
    batches = [{"input_ids": ids[i : i + 2], "attention_mask": mask[i : i + 2]} for i in (0, 2)]
    found = evaluate(Encoder(1.1), batches, against=Encoder())
    outs = ([m(w[None]) for w in windows] for m in (Encoder().double(), Encoder(1.1).double()))
    flat = [torch.cat([o[k].detach().reshape(-1, 6) for o in out for k in o]) for out in outs]
    assert found.relative_error == pytest.approx(float((flat[1] - flat[0]).norm() / flat[0].norm()), rel=1e-5)
    assert found.cosine == pytest.approx(float(nn.functional.cosine_similarity(*flat).mean()), rel=1e-6)
    assert found.tokens == 13 + 3 and found.windows == 3 and found.perplexity is None and found.kl is None
    assert found.relative_error_error is not None and found.relative_error_error > 0
    assert "last_hidden_state" in found.compared and "pooled" in found.compared
    same = evaluate(Encoder(), batches, against=Encoder())
    assert (same.relative_error, same.cosine) == (0.0, 1.0)


def test_a_classifier_has_a_divergence_over_its_classes() -> None:
    torch.manual_seed(0)
    model, other, x = nn.Linear(6, 5), nn.Linear(6, 5), torch.randn(9, 6)
    with pytest.warns(UserWarning, match="element 1 of each batch is left out"):
        found = evaluate(other, [(x[:4], torch.zeros(4)), x[4:]], against=model)
    with torch.no_grad():
        r, p = (m.double()(x.double()).log_softmax(-1) for m in (model, other))
    assert found.kl == pytest.approx(float((r.exp() * (r - p)).sum(-1).mean()), rel=1e-5)
    assert found.top1 == pytest.approx(100 * float((r.argmax(-1) == p.argmax(-1)).double().mean()))
    assert found.tokens == 9 and found.perplexity is None and found.compared.startswith("classes")
    model, other = model.float(), other.float()
    plain = evaluate(other, [x], against=model, compare="outputs")
    with torch.no_grad():
        assert plain.relative_error == pytest.approx(float((other(x) - model(x)).norm() / model(x).norm()), rel=1e-5)


class MaskedLMOutput(SimpleNamespace):
    pass


def test_a_masked_language_model_predicts_the_tokens_that_are_labelled() -> None:
    class Masked(Bigrams):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            return MaskedLMOutput(logits=self.table[input_ids])

    reference, table = tables(11, 0.3, 0)
    ids = torch.stack(rows(11, [8] * 3, 0))
    labels = ids.masked_fill(torch.arange(8) % 3 != 0, -100)
    found = evaluate(Masked(table), [{"input_ids": ids, "labels": labels}], against=Masked(reference))
    r, p = (t.double().log_softmax(-1)[ids[:, ::3]] for t in (reference, table))
    assert found.tokens == 9 and found.perplexity is None
    assert found.kl == pytest.approx(float((r.exp() * (r - p)).sum(-1).mean()), rel=1e-4)
