"""vLLM serves what export writes: the shipped language model, its INT8 kernel, our tokens. `make serve-test`."""

from __future__ import annotations

import contextlib
import copy
import json
import socket
import statistics
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from serving_cases import KERNEL, PYTHON, RECIPES, environment, needs_vllm, run_engine

import sqcompile
from sqcompile.checkpoints.export import export
from sqcompile.lm.corpus import calibration_texts, evaluation_texts
from sqcompile.lm.load import load_lm

pytestmark = needs_vllm
PROMPTS, PROMPT, TOKENS = 8, 64, 24
ROUNDING = 1e-6  # of float32 arithmetic in another order: it moves values over the edges of INT8 steps


def _blocks(texts: list[str], tokenizer: Any, count: int, length: int) -> list[list[int]]:
    """``count`` blocks of token ids, spread over the texts."""
    ids = [i for text in texts for i in tokenizer(text)["input_ids"]]
    step = len(ids) // count
    return [ids[i * step : i * step + length] for i in range(count)]


@pytest.fixture(scope="module")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An exported directory, and prompts with the tokens and their log probabilities that our quantized stage gives."""
    folder = tmp_path_factory.mktemp("serve")
    model, tokenizer = load_lm()
    tokenizer.save_pretrained(folder / "source")
    batches = torch.tensor(_blocks(calibration_texts(), tokenizer, 32, 256)).split(8)
    plan = sqcompile.calibrate(
        model, [{"input_ids": b} for b in batches], recipe=RECIPES[request.param], progress=False
    )
    done = export(model, plan, "compressed-tensors", folder / "net", source=folder / "source")
    net = sqcompile.compile(model, plan=done.plan, backend="eager", progress=False)
    ids = torch.tensor(_blocks(evaluation_texts(), tokenizer, PROMPTS, PROMPT))
    logprobs = []
    with torch.no_grad():
        for _ in range(TOKENS):
            best = torch.log_softmax(net(input_ids=ids).logits[:, -1], -1).max(-1)
            ids = torch.cat([ids, best.indices[:, None]], 1)
            logprobs.append(best.values)
    shaken = copy.deepcopy(model)
    with torch.no_grad():
        table = shaken.get_input_embeddings().weight
        table.mul_(1 + ROUNDING * torch.randn(table.shape, generator=torch.Generator().manual_seed(0)))
        other = sqcompile.compile(shaken, plan=done.plan, backend="eager", progress=False)
        y = torch.log_softmax(other(input_ids=ids).logits[:, PROMPT - 1 : -1], -1)
    moved = (y.gather(-1, ids[:, PROMPT:, None])[..., 0] - torch.stack(logprobs, 1)).abs()
    half = sqcompile.compile(copy.deepcopy(model).bfloat16(), plan=done.plan, backend="eager", progress=False)
    with torch.no_grad():
        y = torch.log_softmax(half(input_ids=ids).logits[:, PROMPT - 1 : -1].float(), -1)
    rounded = (y.gather(-1, ids[:, PROMPT:, None])[..., 0] - torch.stack(logprobs, 1)).abs()
    ours = {
        "moved": float((moved > 0.05).float().mean()),
        "bfloat16": float(rounded.mean()),
        "prompts": ids[:, :PROMPT].tolist(),
        "tokens": ids[:, PROMPT:].tolist(),
        "logprobs": torch.stack(logprobs, 1).tolist(),
    }
    return folder / "net", ours


def _agree(name: str, ours: dict[str, Any], tokens: list[list[int]], logprobs: list[list[float]]) -> None:
    """The same tokens and probabilities, but for what roundings do.

    An activation that a rounding moves into the next INT8 step moves the logits by far more than the rounding was. So at
    most twice as many tokens (or 5 %) may be 0.05 apart as are between our own model and the same with roundings in its
    embedding, which are those of one place of many.
    """
    whole = same = count = 0
    apart = []
    for x, y, ps, qs in zip(ours["tokens"], tokens, ours["logprobs"], logprobs, strict=True):
        whole += sum(a == b for a, b in zip(x, y, strict=True))
        for a, b, p, q in zip(x, y, ps, qs, strict=True):
            count += 1
            if a != b:
                break  # what comes next continues other texts
            same += 1
            apart.append(abs(p - q))
    far = sum(d > 0.05 for d in apart) / len(apart)
    print(f"{name}: {whole / (PROMPTS * TOKENS):.1%} of the tokens equal, {same / count:.1%} after equal texts; log "
          f"probabilities apart: median {statistics.median(apart):.5f}, at most {max(apart):.3f}, {far:.1%} more than 0.05 "
          f"({ours['moved']:.1%} by roundings)")  # fmt: skip
    assert same / count >= 0.95
    assert statistics.median(apart) <= 1e-3 and far <= max(2 * ours["moved"], 0.05)


@pytest.mark.parametrize("served", ["per token"], indirect=True)
def test_the_engine_gives_our_tokens(served, tmp_path):
    directory, ours = served
    found = run_engine(directory, ours["prompts"], ours["tokens"], tmp_path)
    ranks = [rank for row in found["forced"] for _, rank in row]
    assert sum(r == 1 for r in ranks) / len(ranks) >= 0.98  # whatever came before
    _agree("LLM", ours, found["tokens"], [[p for p, _ in row] for row in found["forced"]])


@pytest.mark.parametrize("served", ["per token"], indirect=True)
def test_the_engine_runs_in_bfloat16(served, tmp_path):
    """What `vllm serve` takes by itself; with AMX its kernel is another one."""
    directory, ours = served
    found = run_engine(directory, ours["prompts"], ours["tokens"], tmp_path, "bfloat16")
    apart = (torch.tensor([[p for p, _ in row] for row in found["forced"]]) - torch.tensor(ours["logprobs"])).abs()
    ranks = torch.tensor([[rank for _, rank in row] for row in found["forced"]])
    print(f"bfloat16: log probabilities {apart.mean():.4f} apart, {ours['bfloat16']:.4f} by our own roundings to bfloat16; "
          f"{(ranks == 1).float().mean():.1%} of the tokens are the best ones")  # fmt: skip
    assert apart.mean() <= 1.5 * ours["bfloat16"] and (ranks == 1).float().mean() >= 0.95


@pytest.mark.parametrize("served", ["static"], indirect=True)
def test_the_server_gives_our_tokens(served, tmp_path):
    directory, ours = served
    with _server(directory, tmp_path) as url:
        tokens, logprobs = [], []
        for prompt in ours["prompts"]:
            answer = _post(
                f"{url}/v1/completions",
                {
                    "model": "net", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "logprobs": 1,
                    "ignore_eos": True, "return_tokens_as_token_ids": True,
                },
            )["choices"][0]["logprobs"]  # fmt: skip
            tokens.append([int(t.removeprefix("token_id:")) for t in answer["tokens"]])
            logprobs.append(answer["token_logprobs"])
        text = _post(f"{url}/v1/completions", {"model": "net", "prompt": "import os\n", "max_tokens": 4})
    assert text["usage"]["completion_tokens"] == 4 and text["choices"][0]["text"]
    _agree("server", ours, tokens, logprobs)


@contextlib.contextmanager
def _server(directory: Path, folder: Path) -> Iterator[str]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        str(PYTHON), str(Path(__file__).parent / "plain_vllm.py"), "serve", str(directory), "--served-model-name", "net", "--host", "127.0.0.1", "--port", str(port),
        "--enforce-eager", "--dtype", "float32", "--max-model-len", "256",
    ]  # fmt: skip
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment(), cwd=folder, stdout=out, stderr=out)
    try:
        end = time.monotonic() + 240
        while not _healthy(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
        assert KERNEL in log.read_text()
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def _post(url: str, what: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(what).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)
