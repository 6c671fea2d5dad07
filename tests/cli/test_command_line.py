"""The commands: what a user gets from a directory of each kind, and what of arguments and files that are wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from cli_cases import (
    FAST,
    TEXTS,
    classifier,
    embedder,
    jsonl,
    llama,
    pictures,
    process,
    quantized,
    recordings,
    run,
    speech,
    translator,
    vision,
)

import sqcompile
from sqcompile import Recipe
from sqcompile.checkpoints.float_model import Checkpoint
from sqcompile.cli.app import app
from sqcompile.errors import ArtifactError
from sqcompile.lm import load_tokenizer
from sqcompile.plan.recipe import resolve_recipe


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(tmp_path_factory.mktemp("made"))


def test_the_quantized_model_is_what_python_makes(made: Path):
    """The same plan from the same windows, and the same logits."""
    model = Checkpoint.open(str(made / "float")).load()
    found = sqcompile.load(made / "out", backend="eager")
    ids = torch.stack(
        [torch.tensor(w["input_ids"]) for w in [{"input_ids": _windows(load_tokenizer(), 64)[i]} for i in range(8)]]
    )
    want = sqcompile.compile(model, plan=found.plan, backend="eager", progress=False)
    with torch.no_grad():
        assert torch.equal(found(input_ids=ids).logits, want(input_ids=ids).logits)
    recipe = dataclasses.replace(resolve_recipe("default"), alpha=0.5, rotate="none")
    assert found.plan.recipe == recipe
    again = sqcompile.calibrate(
        model, [{"input_ids": torch.tensor(_windows(load_tokenizer(), 64))}], recipe=recipe, progress=False
    )
    assert [l.name for l in again.layers if l.quantized] == [l.name for l in found.plan.layers if l.quantized]
    assert all(torch.equal(s, again.scales[n]) for n, s in found.plan.scales.items())
    assert (made / "out" / "tokenizer.json").exists()  # generate and eval need it


def _windows(tokenizer, length):
    stream = [
        t for text in TEXTS for t in (*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
    ]
    own = length - 1
    return [[tokenizer.bos_token_id, *stream[i * own : (i + 1) * own]] for i in range(len(stream) // own)]


def test_report_serve_show_and_bench(made: Path, monkeypatch):
    text = run("report", made / "out")
    assert "14 of 15 linears in INT8" in text.output and "lm_head.weight" in text.output
    monkeypatch.setattr("sqcompile.page.html._bundle", lambda module: "")  # which takes seconds to be put together
    measured = run("eval", made / "out", "--text", made / "texts.jsonl", "--samples", 2, "--json", "-q")
    (made / "eval.json").write_text(measured.stdout)
    written = run("report", made / "out", "-o", made / "page.html", "--evaluation", made / "eval.json")
    assert written.exit_code == 0, written.output
    page = (made / "page.html").read_text()
    assert "14 of 15" in page and "<h1>out</h1>" in page and "<li>lm_head: " in page and "Perplexity, measured" in page
    sqcompile.load(made / "out", backend="eager").plan.save(made / "plan.safetensors")  # a plan alone
    assert run("report", made / "plan.safetensors").output == text.output
    assert run("report", made / "plan.safetensors", "-o", made / "plan.html").exit_code == 0
    assert (
        "14 of 15" in (made / "plan.html").read_text()
        and "<h1>LlamaForCausalLM</h1>" in (made / "plan.html").read_text()
    )
    assert "is not a sqcompile plan" in run("report", made / "eval.json").output
    for wrong in (["--evaluation", made / "eval.json"], ["-o", made / "x.html", "--evaluation", made / "texts.jsonl"]):
        assert run("report", made / "out", *wrong).exit_code == 2
    refused = run("serve", made / "out")
    assert refused.exit_code == 2 and "--format compressed-tensors" in refused.output
    shown = run("show", made / "out", "--stage", "quantized")
    assert shown.exit_code == 0 and "sqcompile.dequantize" in shown.output
    assert "up_proj -> down_proj" in run("show", made / "float").output
    assert "is a float model: quantize it first" in run("bench", made / "float").output


@pytest.mark.parametrize("format", ["compressed-tensors", "smoothed"])
def test_formats(made: Path, format: str):
    out = made / f"as-{format}"
    plan = made / "out" / "plan.safetensors"
    found = run("quantize", made / "float", "--plan", plan, "--format", format, "-o", out, "-q")
    assert found.exit_code == 0, found.output
    if format == "compressed-tensors":
        said = run("serve", out, "--port", 8123)
        assert f"vllm serve {out} --served-model-name as-compressed-tensors --port 8123" in said.stdout.replace(
            "\n", ""
        )
        assert run("eval", out, "--text", made / "texts.jsonl", "--samples", 2, "-q").exit_code == 0
    else:
        x = torch.arange(3, 40)[None]
        with torch.no_grad():
            a, b = (Checkpoint.open(str(p)).load()(input_ids=x).logits for p in (made / "float", out))
        assert float((a - b).norm() / a.norm()) < 1e-5


@pytest.mark.parametrize(
    ("make", "data"),
    [(classifier, jsonl), (embedder, jsonl), (vision, pictures), (speech, recordings), (translator, jsonl)],
)
def test_other_tasks(tmp_path: Path, make, data):
    """The batches are those of the model's own tokenizer or processor; INT8 is close to float on them."""
    model, given = make(tmp_path / "float"), data(tmp_path / "data.jsonl" if data is jsonl else tmp_path / "data")
    found = run("quantize", model, "--calib", given, "--samples", 8, "--seq-len", 24, "-o", tmp_path / "out", *FAST)
    assert found.exit_code == 0, found.output
    said = run(
        "eval", tmp_path / "out", "--data", given, "--samples", 6, "--seq-len", 24, "--against", model, "--json", "-q"
    )
    assert said.exit_code == 0, said.output
    numbers = json.loads(said.stdout)
    assert (numbers["kl"] is not None and numbers["kl"] < 1e-3) or numbers["cosine"] > 0.999


def test_dry_run_writes_nothing(made: Path, tmp_path: Path):
    before = sorted(made.iterdir())
    found = run("quantize", made / "float", "--dry-run", "--calib", made / "texts.jsonl", "--json")
    said = json.loads(found.stdout)
    assert said["linears"] == 15 and said["seconds"] > 0 and said["int8_bytes"] < said["float_bytes"]
    assert any("input_layernorm -> q_proj, k_proj, v_proj" in s for s in said["sites"])
    text = run("quantize", made / "float", "--dry-run")
    assert text.exit_code == 0 and "nothing was written" in text.output and sorted(made.iterdir()) == before


def test_token_ids_and_seeds(made: Path):
    """A .npy file of windows gives what its rows say; a seed takes others of them, and no more than are asked for."""
    ids = np.random.default_rng(0).integers(3, 2048, (40, 32))
    np.save(made / "ids.npy", ids)
    scales = {}
    for seed in (None, 1):
        out = made / f"seed{seed}"
        more = () if seed is None else ("--seed", seed)
        args = (
            "--calib",
            made / "ids.npy",
            "--samples",
            16,
            *more,
            "-o",
            out,
            "--activation",
            "per_tensor_static",
            *FAST,
        )
        assert run("quantize", made / "float", *args).exit_code == 0
        scales[seed] = [l.input_scale for l in sqcompile.Plan.load(out / "plan.safetensors").layers]
    model, recipe = Checkpoint.open(str(made / "float")).load(), Recipe(0.5, "per_tensor_static")
    first = sqcompile.calibrate(model, [torch.from_numpy(ids[:16])], recipe=recipe, progress=False)
    assert scales[None] == [l.input_scale for l in first.layers] != scales[1]


def test_every_field_of_a_recipe_is_an_option(made: Path, tmp_path: Path):
    command = typer.main.get_command(app).commands["quantize"]  # type: ignore[attr-defined]
    names = {p.name for p in command.params} | (
        {"dtype"} if any("--dtype" in p.opts for p in command.params) else set()
    )
    assert {f.name for f in dataclasses.fields(Recipe)} <= names
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({"alpha": [0.3, 0.6], "skip": ["o_proj"], "overrides": {"*.down_proj": {"alpha": 0.8}}}))
    options = ("--recipe", file, "--weight", "per_tensor", "--min-speedup", 0, "--spikes", "static", "--no-lm-head")
    args = ("--calib", made / "texts.jsonl", "--samples", 4, "-o", tmp_path / "out", "-q")
    found = run("quantize", made / "float", *options, *args)
    assert found.exit_code == 0, found.output
    want = Recipe(
        (0.3, 0.6), weight="per_tensor", skip=("o_proj",), overrides={"*.down_proj": {"alpha": 0.8}}, spikes="static"
    )
    assert sqcompile.Plan.load(tmp_path / "out" / "plan.safetensors").recipe == want


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("FLOAT", "-o", "OUT"), "no calibration data: pass --calib"),
        (("FLOAT", "--calib", "TEXTS"), "no --out"),
        (("nowhere", "--calib", "TEXTS", "-o", "OUT"), "nowhere is no directory"),
        (("FLOAT", "--calib", "nowhere.txt", "-o", "OUT"), "there is no nowhere.txt"),
        (("FLOAT", "--calib", "TEXTS", "-o", "FLOAT"), "is read, and would be replaced"),
        (("FLOAT", "--calib", "TEXTS", "-o", "OUT", "--skip", "down_porj"), "names no linear of this model"),
        (("FLOAT", "--calib", "TEXTS", "-o", "OUT", "--format", "gguf"), "--format gguf: choose one of sqcompile,"),
        (("FLOAT", "--calib", "TEXTS", "-o", "OUT", "--recipe", "O9"), "unknown recipe 'O9'"),
        (("FLOAT", "--calib", "TEXTS", "-o", "OUT", "--alpha", "1.5"), "lies in [0, 1]"),
        (("FLOAT", "--calib", "TEXTS", "-o", "OUT", "--alpha", "x"), "--alpha x: 'auto'"),
        (("FLOAT", "--calib", "TEXTS", "-o", "OUT", "--rotate", "24"), "rotate=24: 'auto'"),
        (("FLOAT", "--calib", "TEXTS", "-o", "OUT", "--overrides", "{"), "--overrides is no JSON object"),
        (("FLOAT", "--calib", "TEXTS", "-o", "OUT", "--seq-len", "65"), "--seq-len 65: the model takes 64 tokens at most"),
        (("FLOAT", "--calib", "TEXTS", "--plan", "PLAN", "-o", "OUT"), "--plan says what is done"),
        (("FLOAT", "--plan", "TEXTS", "-o", "OUT"), "texts.jsonl"),
        (("INT8", "--calib", "TEXTS", "-o", "OUT"), "has no config.json"),
        (("FLOAT", "--calib", "FLOAT", "-o", "OUT"), "is none that can be read"),
        (("FLOAT", "--calib", "PICTURES", "-o", "OUT"), "is images, and LlamaForCausalLM reads text"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_sentence_and_exit_code_2(made: Path, tmp_path: Path, arguments, says: str):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"")
    known = {
        "FLOAT": made / "float", "OUT": tmp_path / "out", "TEXTS": made / "texts.jsonl", "PICTURES": tmp_path / "pictures",
        "PLAN": made / "out" / "plan.safetensors", "INT8": made / "out",
    }  # fmt: skip
    found = run("quantize", *(known.get(a, a) for a in arguments), "-q")
    assert found.exit_code == 2 and says in found.output
    assert found.output.startswith("error: ") and found.output.count("\n") == 1
    assert not (tmp_path / "out").exists() and len([*tmp_path.iterdir()]) == 1
    as_json = run("quantize", *(known.get(a, a) for a in arguments), "-q", "--json")
    assert says in json.loads(as_json.stdout)["message"]


def test_checkpoints_that_are_refused(tmp_path: Path):
    llama(tmp_path / "m")
    written = json.loads((tmp_path / "m" / "config.json").read_text())
    os.rename(tmp_path / "m" / "model.safetensors", tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match=r"\.bin files, which are pickles .*save_pretrained\(new\)"):
        Checkpoint.open(str(tmp_path / "m"))
    os.rename(tmp_path / "m" / "pytorch_model.bin", tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "config.json").write_text(json.dumps({**written, "architectures": ["EvilForCausalLM"]}))
    with pytest.raises(ArtifactError, match=r"names the class 'EvilForCausalLM', which transformers .* does not have"):
        Checkpoint.open(str(tmp_path / "m"))
    (tmp_path / "m" / "config.json").write_text(json.dumps({**written, "num_hidden_layers": 3}))
    with pytest.raises(ArtifactError, match=r"there is no tensor .model\.layers\.2\."):
        Checkpoint.open(str(tmp_path / "m")).load()
    (tmp_path / "m" / "config.json").write_text(json.dumps({**written, "quantization_config": {}}))
    with pytest.raises(ArtifactError, match="is quantized already"):
        Checkpoint.open(str(tmp_path / "m"))
    embedder(tmp_path / "e")
    (tmp_path / "e" / "modules.json").write_text(json.dumps([{"path": "../m", "type": "x.Transformer"}]))
    with pytest.raises(ArtifactError, match=r"leads out of it, to '\.\./m'"):
        Checkpoint.open(str(tmp_path / "e"))


def test_calibration_takes_512_rows_or_as_many_batches_as_are_asked_for():
    model, seen = torch.nn.Sequential(torch.nn.Linear(8, 8)).eval(), []

    def loader():
        for i in range(1000):
            seen.append(i)
            yield torch.randn(4, 8)

    sqcompile.calibrate(model, loader(), progress=False)
    assert len(seen) == 128
    seen.clear()
    sqcompile.calibrate(model, loader(), progress=False, max_batches=5)
    assert len(seen) == 5
    with pytest.raises(sqcompile.CalibrationError, match="max_batches=0: a number of batches, at least 1"):
        sqcompile.calibrate(model, loader(), progress=False, max_batches=0)


def test_a_user_starts_it(made: Path):
    """In a process of its own: nothing but the result on stdout, no warnings of other packages on stderr."""
    started = process("quantize", "float", "--calib", "texts.jsonl", "-o", "fresh", "--alpha", "0.5", cwd=made)
    out, err = started.communicate(timeout=300)
    assert started.returncode == 0, err
    assert out.splitlines()[0].startswith(f"{made}/fresh: sqcompile, 14 of 15 linears in INT8")
    assert err.splitlines() == [
        "loading float (LlamaForCausalLM)",
        "calibrating on 39 rows of texts.jsonl",
    ]
    usage = process("quantize", cwd=made)
    assert usage.wait(timeout=100) == 2 and "Missing argument" in usage.communicate()[1]


@pytest.mark.usefixtures("own_ctrl_c")
def test_ctrl_c_leaves_nothing_behind(made: Path, tmp_path: Path):
    args = ("--calib", made / "texts.jsonl", "-o", tmp_path / "out", "--batch-size", 1)
    started = process("quantize", made / "float", *args, cwd=tmp_path)
    assert started.stderr is not None
    for line in started.stderr:
        if line.startswith("calibrating"):
            break
    time.sleep(1.0)
    started.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, err = started.communicate(timeout=60)
    assert started.returncode == 130 and time.monotonic() - start < 20
    said = err.splitlines()[-1]
    assert re.fullmatch(r"interrupted: (nothing was written|the same command goes on with what .*/out\.work has)", said)
    assert "Traceback" not in err and {p.name for p in tmp_path.iterdir()} <= {"out.work"}
    again = process("quantize", made / "float", *args, "-q", cwd=tmp_path)
    assert again.wait(timeout=300) == 0 and [p.name for p in tmp_path.iterdir()] == ["out"]
