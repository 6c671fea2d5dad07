"""How steps are replayed, on a CPU: a pool that runs what it is told to record, and counts."""

from __future__ import annotations

import contextlib
import functools
import types
import warnings

import pytest
import torch
from conftest import tiny_lm

import sqcompile
from sqcompile.backend import smoothquant
from sqcompile.backend.cuda_graphs import NotRecorded, Recorder, not_recorded
from sqcompile.generation import replay, run

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
generate = functools.partial(sqcompile.generate, record=True)
PLAIN = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


class Pretended(replay.Replays):
    """Replays on a CPU: a recording runs the step itself, as a replay does."""

    def __init__(self, device):
        super().__init__(device)
        self.records = self.replayed = 0
        self.fails = False

    @contextlib.contextmanager
    def stream(self):
        yield

    def record(self, step, generators):
        if self.fails:
            raise NotRecorded from RuntimeError("it waits")
        self.records += 1
        step()

        def again():
            self.replayed += 1
            step()

        return None, again


@pytest.fixture
def made(monkeypatch):
    """The replays that calls have made."""
    monkeypatch.setattr(replay, "Pool", lambda device: types.SimpleNamespace())
    found = []

    def pretended(device):
        found.append(Pretended(device))
        found[-1].pool.record = found[-1].record
        return found[-1]

    monkeypatch.setattr(run, "Replays", pretended)
    monkeypatch.setattr(run, "check_record", lambda record, device: None)
    return found


def prompts(*shape, seed=5):
    return torch.randint(3, 96, shape, generator=torch.Generator().manual_seed(seed))


def test_the_fourth_step_is_recorded_and_later_ones_are_replayed(made):
    model, x = tiny_lm("llama"), prompts(2, 7)
    want = model.generate(x, max_new_tokens=30, **PLAIN)
    assert torch.equal(generate(model, x, max_new_tokens=30, **PLAIN), want)
    [replays] = made
    assert (replays.records, replays.replayed) == (1, 29 - 4)
    assert torch.equal(generate(model, x[:, :5], max_new_tokens=9, **PLAIN)[:, :5], x[:, :5])
    assert (replays.records, replays.replayed) == (1, 25 + 7)  # the first is the model's own call
    generate(model, x, max_new_tokens=9, **{**PLAIN, "eos_token_id": [95]})
    assert (replays.records, len(made)) == (2, 1)  # a step that looks for an end is another one


def test_what_is_beyond_the_end_is_cut_off(made):
    model, x = tiny_lm("llama"), prompts(2, 7)
    free = model.generate(x, max_new_tokens=60, **PLAIN)
    for at in (0, 1, 6, 7, 8, 9, 20, 40):
        ends = sorted({int(row[7 + at]) for row in free})
        told = []
        settings = {**PLAIN, "eos_token_id": ends, "max_new_tokens": 60}
        got = generate(model, x, callback=told.append, **settings)
        assert torch.equal(got, model.generate(x, **settings))
        assert torch.equal(torch.stack(told, 1), got[:, 7:])
        assert torch.equal(generate(model, x, **settings), got)


def test_the_host_is_at_most_sixteen_tokens_behind(made):
    model, x, steps, behind = tiny_lm("llama"), prompts(1, 7), [0], []

    def count(*_):
        steps[0] += 1

    model.register_forward_hook(count)
    told = iter(range(1, 99))
    generate(model, x, max_new_tokens=50, callback=lambda t: behind.append(steps[0] - next(told)), **PLAIN)
    assert len(behind) == 50 and 8 <= max(behind) <= 16


def test_samples_are_the_same_for_equal_seeds(made):
    model, x = tiny_lm("llama"), prompts(2, 7)

    def drawn(seed, **settings):
        torch.manual_seed(seed)
        return generate(model, x, max_new_tokens=30, **{**PLAIN, "do_sample": True, **settings})

    torch.manual_seed(3)
    want = model.generate(x, max_new_tokens=30, **{**PLAIN, "do_sample": True})
    assert torch.equal(drawn(3), want) and torch.equal(drawn(3), want)
    assert made[0].records == 1
    own = torch.Generator().manual_seed(3)
    assert torch.equal(drawn(4, generator=own), want)
    assert torch.equal(drawn(3, temperature=0.5), drawn(3, temperature=0.5))
    before = made[0].records
    assert not torch.equal(drawn(3, temperature=0.9), drawn(3, temperature=0.5)) and made[0].records == before


def test_other_weights_are_recorded_again(made):
    model, x = tiny_lm("llama"), prompts(2, 7)
    settings = {"max_new_tokens": 12, **PLAIN}
    generate(model, x, **settings)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.roll(1, 0))
    assert torch.equal(generate(model, x, **settings), model.generate(x, **settings))
    assert made[0].records == 2
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().roll(1, 0))
    assert torch.equal(generate(model, x, **settings), model.generate(x, **settings))
    assert made[0].records == 3
    generate(model, x, **settings)
    assert made[0].records == 3


@pytest.mark.slow
def test_a_compiled_model_is_recorded_once_it_has_a_plan(made):
    model, x = tiny_lm("llama"), prompts(2, 7)
    net = torch.compile(model, backend=smoothquant, options={"compiler": "eager", "calibration_steps": 8})
    settings = {"max_new_tokens": 7, **PLAIN}
    generate(net, x, **settings)
    assert made[0].records == 0, "it calibrates itself"
    settings["max_new_tokens"] = 12
    first = generate(net, x, **settings)
    assert made[0].records == 1
    assert torch.equal(generate(net, x, **settings), first) and made[0].records == 1
    model.model.layers[0].mlp.down_proj.weight.data.mul_(0.3)
    sqcompile.refresh(model)
    changed = generate(net, x, **settings)
    assert made[0].records == 2 and not torch.equal(changed, first)
    assert torch.equal(net.generate(x, **settings), changed)


def test_a_step_that_cannot_be_recorded_runs(made):
    model, x = tiny_lm("llama"), prompts(1, 7)
    settings = {"max_new_tokens": 12, **PLAIN, "do_sample": True}
    torch.manual_seed(0)
    want = model.generate(x, **settings)
    generate(model, x, **{**settings, "max_new_tokens": 2})
    made[0].fails = True
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"cannot be recorded as a CUDA graph \(it waits\)"):
        assert torch.equal(generate(model, x, **settings), want)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert torch.equal(generate(model, x, **settings), want)
    assert made[0].records == 0


def test_another_step_goes_on_after_one_that_cannot_be_recorded(made):
    """Its recording drew from a generator that is given up."""
    model, x = tiny_lm("llama"), prompts(1, 7)
    settings = {"max_new_tokens": 12, **PLAIN, "do_sample": True}

    def drawn(**more):
        torch.manual_seed(0)
        return generate(model, x, **settings, **more)

    want = drawn()
    assert made[0].records == 1
    made[0].fails = True
    with pytest.warns(UserWarning, match="cannot be recorded"):
        drawn(top_p=0.9)
    made[0].fails = False
    assert torch.equal(drawn(), want) and made[0].records == 2


def test_compiled_graphs_record_nothing_of_their_own_meanwhile():
    calls = []
    pool = types.SimpleNamespace(recording=lambda: calls.append("asked") or True)
    recorder = Recorder(lambda x: [x + 1], [], pool)
    with not_recorded():
        assert recorder(torch.ones(1))[0].item() == 2 and calls == []
    assert recorder(torch.ones(1))[0].item() == 2 and calls == ["asked"]
