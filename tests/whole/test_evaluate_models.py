"""`sqcompile.evaluate` of compiled models: SQNR per layer, the backend, what stays as it was, what is refused and printed."""

from __future__ import annotations

import math
import signal
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_lm
from evaluate_cases import Bigrams, Characters, Encoder, agree, evaluate, expected, rows, tables
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sqcompile
from sqcompile import EvaluationError
from sqcompile.evaluation import scores
from sqcompile.passes.ir.origin import PLANNED


class Block(nn.Module):
    """norm -> up -> relu -> down, and the residual: 1/s folds into the norm and into up."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 16)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
            self.norm.weight[3] = 9.0
            self.up.weight[5] *= 20

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is not None:
            x = x * attention_mask.unsqueeze(-1)
        return self.head(x + self.down(torch.relu(self.up(self.norm(x)))))


def test_sqnr_of_each_layer_is_that_of_its_output_against_hooks() -> None:
    model = Block().eval()
    batches = [torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    compiled = sqcompile.compile(model, batches, backend="eager", progress=False)
    scale = {key.partition(" -> ")[0]: s for key, s in compiled.plan.scales.items()}
    assert float((scale["up.weight"] - 1).abs().max()) > 0.5  # up's output is divided by something
    floats: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, x, y, name=name: floats.setdefault(f"{name}.weight", []).append(y))
    quantized: dict[str, list[Tensor]] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            out = super().run_node(n)
            if PLANNED in n.meta:
                quantized.setdefault(n.meta[PLANNED], []).append(out)
            return out

    with torch.no_grad():
        for x in batches:
            model(x)
            Recorder(compiled.stages["quantized"]).run(x, enable_io_processing=False)
    for module in model.modules():
        module._forward_hooks.clear()
    found = evaluate(compiled, batches, against=model)
    assert found.layers is not None
    assert [l.name for l in found.layers] == [l.name for l in compiled.plan.layers if l.quantized]
    assert len(found.layers) >= 3
    for layer in found.layers:
        want, got = (torch.cat(x[layer.name]).double() for x in (floats, quantized))
        got = got * scale[layer.name] if layer.name in scale else got
        sqnr = 10 * math.log10(float(want.square().sum() / (got - want).square().sum()))
        assert layer.sqnr_db == pytest.approx(sqnr, abs=1e-3) and layer.rows == 30
    lowest = min(found.layers, key=lambda l: l.sqnr_db or 0.0)
    assert f"{lowest.label:4}" in str(found) and f"{lowest.sqnr_db:.1f} dB" in str(found)


def test_layers_leave_padding_out_and_say_when_they_are_not_measured() -> None:
    model = Block().eval()
    x, mask = torch.randn(2, 6, 16), torch.ones(2, 6)
    mask[1, 3:] = 0
    calibration = [{"x": x, "attention_mask": mask}, {"x": x[:, :4], "attention_mask": mask[:, :4]}]
    compiled = sqcompile.compile(model, calibration, backend="eager", progress=False)
    found = evaluate(compiled, calibration, against=model)
    assert found.layers and {l.rows for l in found.layers} == {9 + 7} and found.without_layers == ""
    assert evaluate(compiled, calibration, against=model, layers=False).layers is None
    said = evaluate(model, calibration, against=model)
    assert said.layers is None and "only what sqcompile.compile gave has stages" in str(said)
    with torch.no_grad():
        model.up.weight.mul_(1.0)
    changed = evaluate(compiled, calibration, against=model)
    assert changed.layers is None and "parameters changed" in str(changed) and changed.cosine is not None


def test_a_compiled_model_alone_and_beside_the_float_one() -> None:
    model = tiny_lm("llama", num_hidden_layers=1)
    calibration, windows = (torch.stack(rows(90, [16] * 8, seed)) for seed in (0, 1))
    compiled = sqcompile.compile(model, list(calibration.split(4)), backend="eager", progress=False)
    alone = evaluate(compiled, windows)
    beside = evaluate(compiled, windows, against=model, batch_size=2)
    assert alone.perplexity == pytest.approx(beside.perplexity, rel=1e-5)
    with torch.no_grad():
        r, p = (m(input_ids=windows).logits[:, :-1].double().log_softmax(-1) for m in (model, compiled))
    assert beside.kl == pytest.approx(float((r.exp() * (r - p)).sum(-1).mean()), rel=1e-3)
    assert beside.layers and all(l.rows == 128 and 10 < (l.sqnr_db or 0) < 60 for l in beside.layers)
    assert beside.tokens_per_second and beside.float_tokens_per_second and alone.float_tokens_per_second is None


@pytest.mark.parametrize("in_place", [False, True])
def test_what_the_backend_compiles_must_have_its_plan(in_place: bool, fresh_dynamo: None) -> None:
    model, batches = Block().eval(), [torch.randn(2, 5, 16) for _ in range(4)]
    plan = sqcompile.calibrate(model, batches[:2], progress=False)
    want = evaluate(sqcompile.compile(model, plan=plan, backend="eager", progress=False), batches, against=model)

    def compiled(**options: Any) -> nn.Module:
        how: Any = {"backend": "smoothquant", "options": {"compiler": "eager", **options}}
        if not in_place:
            return torch.compile(model, **how)  # type: ignore[return-value]
        other = Block().eval()
        other.compile(**how)
        return other

    found = evaluate(compiled(plan=plan), batches, against=model)
    assert found.relative_error == pytest.approx(want.relative_error, rel=1e-4) and found.cosine != 1
    assert found.layers is None and "only what sqcompile.compile gave has stages" in str(found)
    torch._dynamo.reset()
    own = compiled(calibration_steps=1)
    with pytest.raises(EvaluationError, match="calibrates itself, and would do so on the evaluation data"):
        evaluate(own, batches, against=model)
    with torch.no_grad():
        own(batches[0])
    assert evaluate(own, batches, against=model).relative_error == pytest.approx(want.relative_error, rel=0.5)


def test_nothing_is_changed_and_training_comes_back() -> None:
    class Noisy(Bigrams):
        def __init__(self, table: Tensor) -> None:
            super().__init__(table)
            self.drop, self.frozen = nn.Dropout(0.5), nn.Dropout(0.5).eval()

        def forward(self, input_ids: Tensor) -> Any:  # type: ignore[override]
            return SimpleNamespace(logits=self.drop(self.table[input_ids]))

    reference, table = tables(11, 0.3, 0)
    model, windows = Noisy(table), rows(11, [8] * 3, 0)
    model.train()
    model.frozen.eval()
    agree(evaluate(model, windows, against=Noisy(reference)), expected(table, reference, windows), 1e-3)
    modes = [m.training for m in model.modules()]
    assert modes == [True, True, False] and torch.equal(model.table, table) and model.table.grad is None
    with pytest.raises(EvaluationError):
        evaluate(model, [[1, 50]])
    assert [m.training for m in model.modules()] == modes and torch.is_grad_enabled()


def test_an_interrupt_leaves_nothing_behind() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    calls = []

    class Interrupted(Bigrams):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            calls.append(self.training)
            signal.raise_signal(signal.SIGINT)
            return super().forward(input_ids)

    model = Interrupted(torch.zeros(5, 5)).train()
    try:
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, torch.zeros(9, 4, dtype=torch.int64), batch_size=1)
        assert calls == [False] and model.training and torch.is_grad_enabled()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_logits_are_never_copied_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "NUMBERS", 4096)
    made: list[tuple[torch.dtype, int]] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **kwargs or {})
            if isinstance(out, Tensor) and not any(
                isinstance(a, Tensor) and a.data_ptr() == out.data_ptr() for a in args
            ):
                made.append((out.dtype, out.numel()))
            return out

    class Half(Bigrams):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            return SimpleNamespace(logits=self.table[input_ids])

    reference, table = tables(256, 0.3, 0)
    models, windows = (Half(table.bfloat16()), Half(reference.bfloat16())), torch.stack(rows(256, [64] * 4, 0))
    with Recorder():
        found = evaluate(models[0], windows, against=models[1])
    assert found.tokens == 4 * 63
    assert max(n for dtype, n in made if dtype == torch.bfloat16) == 4 * 64 * 256  # the models' own
    assert max(n for dtype, n in made if dtype == torch.float32) <= 4096
    assert max(n for dtype, n in made if dtype == torch.float64) <= 256


_IDS = torch.zeros(3, 4, dtype=torch.int64)
_TABLE = torch.zeros(5, 5)
REFUSED: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "no module": (lambda ids: ids, _IDS, {}, "the model is a function: pass an nn.Module"),
    "against": (Bigrams(_TABLE), _IDS, {"against": 3}, "against is a int: pass the float model"),
    "compare": (Bigrams(_TABLE), _IDS, {"compare": "loss"}, "compare='loss': choose one of auto, next_token"),
    "batch size": (Bigrams(_TABLE), _IDS, {"batch_size": 0}, "batch_size must be a whole number, at least 1"),
    "batch size of text": (Bigrams(_TABLE), _IDS, {"batch_size": "3"}, "not '3'"),
    "limit": (Bigrams(_TABLE), _IDS, {"limit": 0}, "limit must be a whole number, at least 1"),
    "limit of a half": (Bigrams(_TABLE), _IDS, {"limit": 2.5}, "limit must be a whole number, at least 1, not 2.5"),
    "no data": (Bigrams(_TABLE), [], {}, "there is no data: pass at least one batch"),
    "no windows": (Bigrams(_TABLE), _IDS[:0], {}, "there is no data"),
    "no rows": (Bigrams(_TABLE), [_IDS[:0]], {}, "there is no data"),
    "no tokenizer": (Bigrams(_TABLE), "abc", {}, "data is text: pass the model's tokenizer, tokenizer="),
    "short text": (Bigrams(_TABLE), "abc", {"tokenizer": Characters()}, "4 tokens, too few for one window of 512"),
    "length": (Bigrams(_TABLE), "abc", {"tokenizer": Characters(), "length": 1}, "length must be at least 2, not 1"),
    "text by and by": (Bigrams(_TABLE), iter(["abc"]), {}, r"pass a list of it, list\(data\)"),
    "one batch": (Bigrams(_TABLE), {"input_ids": _IDS}, {}, r"one batch, a dict: wrap it in a list, data=\[batch\]"),
    "no iterable": (Bigrams(_TABLE), 3, {}, r"data is a int: pass text, token ids \[windows, length\] or a loader"),
    "one row": (Bigrams(_TABLE), _IDS[0], {}, r"token ids \[4\]: pass \[windows, length\], ids.view\(-1, length\)"),
    "one list": (Bigrams(_TABLE), [1, 2, 3], {}, r"one row of token ids: cut it to windows"),
    "one image": (Bigrams(_TABLE), torch.zeros(1, 3, 8, 8), {}, r"one tensor of torch.float32: wrap batches in a list"),
    "one token": (Bigrams(_TABLE), _IDS[:, :1], {}, "nothing in the data counts: a window needs two tokens"),
    "all padding": (
        Bigrams(_TABLE), [{"input_ids": _IDS, "attention_mask": 0 * _IDS}], {}, "nothing in the data counts",
    ),
    "other names": (Bigrams(_TABLE), [{"pixels": _IDS}], {}, r"batch 0 \(dict\) does not fit Bigrams.forward"),
    "no tensor": (Bigrams(_TABLE), [{"input_ids": None}], {}, r"batch 0 \(dict\) holds no tensor"),
    "vocabulary": (
        Bigrams(_TABLE), _IDS, {"against": Bigrams(torch.zeros(6, 6))}, "of 5 tokens, those of the float model of 6",
    ),
    "other tokenizer": (
        Bigrams(torch.zeros(9, 5)), _IDS + 7, {}, "batch 0 has the token 7, and the model's logits are of 5",
    ),
    "refused by the model": (Bigrams(_TABLE), _IDS + 7, {}, "the model refuses batch 0: IndexError"),
    "NaN": (
        Bigrams(_TABLE / 0), _IDS, {"against": Bigrams(_TABLE)}, "the logits of the model are not finite in batch 0, window 0, tok",
    ),
    "NaN in the other": (Bigrams(_TABLE), _IDS, {"against": Bigrams(_TABLE / 0)}, "the logits of the float model are not"),
    "NaN in outputs": (Encoder(math.nan), [_IDS], {"against": Encoder()}, "the last_hidden_state of the model are not"),
    "outputs alone": (Encoder(), [_IDS], {}, r"perplexity is all there is.*pass the float model to compare it with, against="),
    "other outputs": (Bigrams(_TABLE), _IDS, {"against": Encoder()}, "the model gives .*, and the float model last_hidden"),
    "no logits": (Encoder(), _IDS, {"against": Bigrams(_TABLE)}, "the model gives a dict without logits"),
    "not classes": (Bigrams(_TABLE), _IDS, {"compare": "classes"}, r"needs logits \[batch, classes\].*\[3, 4, 5\]"),
    "not tokens": (Encoder(), [_IDS], {"compare": "next_token"}, "needs logits .*, and the model gives a dict"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    model, data, options, message = REFUSED[case]
    with pytest.raises(EvaluationError, match=message):
        evaluate(model, data, **options)


def test_it_prints_an_aligned_table(capsys: pytest.CaptureFixture[str]) -> None:
    reference, table = tables(11, 0.3, 0)
    windows = torch.stack(rows(11, [8] * 6, 0))
    found = sqcompile.evaluate(Bigrams(table), windows, against=Bigrams(reference), batch_size=2)
    shown = capsys.readouterr()
    assert shown.err == shown.out == ""  # stderr is no terminal
    lines = str(found).splitlines()
    assert lines[0] == "next-token predictions: logits [batch, tokens, 11]; 6 windows, 42 predictions"
    names = [
        "",
        "perplexity",
        "tokens/s, wall time",
        "perplexity increase, %",
        "KL divergence, nats",
        "top-1 agreement, %",
    ]
    assert [line[2:26].rstrip() for line in lines[1:7]] == names
    assert f"{found.perplexity:.3f} ± {found.perplexity_error:.3f}" in lines[2]
    assert f"{found.increase:+.3f} ± {found.increase_error:.3f}" in str(found)
    column = lines[2].index(f"{found.perplexity:.3f}")
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in lines[1:7])
    evaluate(Bigrams(table), windows)
    assert capsys.readouterr().err == ""
