"""What a command leaves: outputs of ours are replaced, whatever their format, and a refusal is in nobody's way."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from cli_cases import FAST, llama, quantized, run

import sqcompile
from sqcompile.files.directory import MARK
from sqcompile.files.work import Work


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(tmp_path_factory.mktemp("made"))


def quantize(made: Path, out: Path, *options):
    return run("quantize", made / "float", "--calib", made / "texts.jsonl", "--samples", 8, "-o", out, "-q", *options)


@pytest.mark.slow
def test_what_another_run_wrote_is_replaced_whatever_its_format(made: Path, tmp_path: Path):
    formats = ["sqcompile", "compressed-tensors", "smoothed", "sqcompile", "smoothed"]
    for format in formats:
        done = quantize(made, tmp_path / "out", "--format", format, *FAST[:-1])
        assert done.exit_code == 0 and f": {format}, " in done.output, done.output
        assert (tmp_path / "out" / MARK).exists() == (format != "sqcompile")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "letter.txt").write_text("mine")
    for format in formats[:3]:
        refused = quantize(made, tmp_path / "own", "--format", format, *FAST[:-1])
        assert refused.exit_code == 2 and "has other files in it, which would be removed" in refused.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said", "instead"),
    [
        (["--max-degradation", "1e-6"], "nothing to quantize", ["--alpha", "0.5"]),
        (["--recipe", "O3", "--format", "compressed-tensors"], "for which compressed-tensors has no format", ["--alpha", "0.5"]),
        (["--skip", "nope"], "nope", ["--skip", "*.q_proj"]),
    ],
    ids=str,
)  # fmt: skip
def test_a_refusal_that_would_come_again_leaves_nothing(made: Path, tmp_path: Path, options, said, instead):
    refused = quantize(made, tmp_path / "out", *options)
    assert refused.exit_code == 2 and said in refused.output and not os.listdir(tmp_path), refused.output
    assert quantize(made, tmp_path / "out", *instead).exit_code == 0


@pytest.mark.parametrize("error", [sqcompile.ArtifactError, sqcompile.CalibrationError, OSError, KeyboardInterrupt])
def test_what_may_go_better_later_keeps_what_is_finished(tmp_path: Path, error):
    with pytest.raises(error), Work(str(tmp_path / "work"), {"model": "a"}).held() as kept:
        part = kept.path("part")
        Path(part).write_bytes(b"finished")
        kept.add("part", part)
        raise error("now")
    with Work(str(tmp_path / "work"), {"model": "a"}).held() as kept:
        assert kept.find("part") is not None


@pytest.mark.slow
def test_fp8_is_called_fp8(made: Path, tmp_path: Path):
    done = quantize(made, tmp_path / "out", "--recipe", "fp8", "--json")
    found = json.loads(done.stdout)
    assert found["fp8_linears"] == 14 and "int8_linears" not in found
    assert "14 of 15 linears in FP8" in quantize(made, tmp_path / "out", "--recipe", "fp8").output
    report = run("report", tmp_path / "out")
    assert report.exit_code == 0 and "14 of 15 linears in FP8" in report.output and "INT8" not in report.output


def test_a_wrong_dtype_of_the_model_is_told_at_once(tmp_path: Path):
    folder = llama(tmp_path / "float")
    for options in (["--dry-run"], ["--calib", "no.txt", "-o", tmp_path / "out"]):
        refused = run("quantize", folder, "--model-dtype", "bf16", *options)
        assert refused.exit_code == 2 and "the dtype 'bf16' is none: choose auto" in refused.output
