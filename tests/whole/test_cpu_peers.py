"""The comparison with other tools on CPUs: its rows with made-up contenders, and each contender that is installed."""

from __future__ import annotations

import multiprocessing
import os
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from sqcompile.bench import cpu_peers, peers
from sqcompile.bench.timing import sqnr_db


class Plain(nn.Module):
    """Token ids as hidden states of one channel."""

    def forward(self, input_ids):
        return SimpleNamespace(last_hidden_state=(input_ids + 1).float().unsqueeze(-1))


def exact(make, calibration):
    return lambda shape: lambda ids: make(torch.float32)(ids).last_hidden_state


def off_by_a_tenth(make, calibration):
    return lambda shape: lambda ids: 1.1 * make(torch.float32)(ids).last_hidden_state


def absent(make, calibration):
    raise ModuleNotFoundError("No module named 'absent'\nand more")


def prefill_alone(make, calibration):
    def for_shape(shape):
        if shape[1] == 1:
            raise ValueError("one token is too few")
        return exact(make, calibration)(shape)

    return for_shape


def dying(make, calibration):
    os._exit(1)


@pytest.fixture
def made_up(monkeypatch):
    contenders = {
        peers.BASE: exact,
        "tenth": off_by_a_tenth,
        "absent": absent,
        "prefill": prefill_alone,
        "dying": dying,
    }
    monkeypatch.setattr(cpu_peers, "CONTENDERS", contenders)
    monkeypatch.setattr(
        cpu_peers, "CASES", {"plain": cpu_peers.Case("plain", lambda dtype: Plain(), ((2, 3), (1, 1)), (1, 4))}
    )
    fork = multiprocessing.get_context("fork")  # the others' processes would not know of what is made up
    monkeypatch.setattr(cpu_peers.multiprocessing, "get_context", lambda _: fork)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(cpu_peers, "machine", lambda: "this processor")  # it builds kernels


@pytest.mark.usefixtures("made_up")
def test_rows_of_all_that_run_and_words_of_those_that_do_not(capsys):
    cpu_peers.main(["--rounds", "3", "--threads", "1", "--cases", "plain"])
    out = capsys.readouterr().out
    assert "\nthis processor, " in out
    rows = {
        line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in out.splitlines() if line.startswith("| ")
    }
    assert rows["plain"] == ["2 x 3", "1 x 1 |"]
    assert all(", 1.00x (inf dB)" in cell for cell in rows["torch bf16"])
    assert all("x (20.0 dB)" in cell for cell in rows["tenth"])
    assert rows["absent"] == rows["dying"] == ["", " |"]
    assert "(inf dB)" in rows["prefill"][0] and rows["prefill"][1] == " |"
    assert "plain, absent: ModuleNotFoundError: No module named 'absent'\n" in out
    assert "plain, dying: its process died\n" in out
    assert "plain, prefill: ValueError: one token is too few\n" in out


@pytest.mark.usefixtures("made_up")
def test_only_the_rows_that_are_asked_for(capsys):
    cpu_peers.main(["--rounds", "1", "--threads", "1", "--cases", "plain", "--only", "tenth", "--beside", "1"])
    out = capsys.readouterr().out
    assert "| tenth | " in out and "torch bf16 |" not in out


def small(dtype):
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128, vocab_size=100
    )
    return BertModel(config, add_pooling_layer=False).to(dtype).eval()


def small_llama(dtype):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128, vocab_size=100
    )  # fmt: skip
    return LlamaModel(config).to(dtype).eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in peers.CONTENDERS if "torch" not in name and "static" not in name])
def test_a_contender_computes_the_model(name):
    packages = {"Open": ("openvino", "nncf"), "ONNX": ("onnxruntime", "onnxscript"), "llam": ("llama_cpp", "gguf")}
    for package in packages.get(name[:4], ()):
        pytest.importorskip(package)
    ids, make = torch.randint(0, 100, (2, 16)), small_llama if name.startswith("llama") else small
    with torch.no_grad():
        for_shape = peers.CONTENDERS[name](make, [ids, ids.flip(0)])
        for shape in ((2, 16), (1, 5)):
            x = ids[: shape[0], : shape[1]]
            y, want = for_shape(shape)(x), make(torch.float32)(input_ids=x).last_hidden_state
            assert y.shape == want.shape and sqnr_db(want, y.float()) > 15
