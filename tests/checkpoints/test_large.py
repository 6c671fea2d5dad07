"""Runs that are cut off and go on: the same bytes, nothing done twice, and other arguments refused."""

from __future__ import annotations

import errno
import filecmp
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from checkpoint_cases import equal
from families import build, token_ids

import sqcompile
from sqcompile import large
from sqcompile.artifact import tensors as artifact
from sqcompile.capture.inputs import as_call
from sqcompile.capture.trace import trace
from sqcompile.errors import ArtifactError, CalibrationError, RecipeError
from sqcompile.passes.attention.chains import find_attentions
from sqcompile.statistics import file, observe
from sqcompile.statistics.observe import calibrate

RECIPE = sqcompile.Recipe(0.5)


SEEN: list[sqcompile.Progress] = []  # what was told of the run that is not cut off


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama") / "model"
    build("llama")[0].save_pretrained(path)
    return path


def batches(seeds=(1, 2)):
    return [{"input_ids": token_ids(seed=seed)} for seed in seeds]


def quantized(checkpoint, target, **changes):
    given = {"recipe": RECIPE, "progress": False, **changes}
    return sqcompile.quantize_checkpoint(checkpoint, given.pop("data", batches()), target, **given)


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory):
    """What a run gives that is not cut off."""
    target = tmp_path_factory.mktemp("whole") / "out"
    quantized(checkpoint, target, progress=SEEN.append)
    return target


def same(a, b):
    names = sorted(os.listdir(a))
    return names == sorted(os.listdir(b)) and filecmp.cmpfiles(a, b, names, shallow=False) == (names, [], [])


class Cut(BaseException):
    """What no code expects."""


def cut(*args, **kwargs):
    raise Cut


def test_it_is_what_the_three_steps_give_and_nothing_else_is_left(checkpoint, whole, tmp_path):
    model = sqcompile.open_checkpoint(checkpoint)
    plan = sqcompile.calibrate(model, batches(), recipe=RECIPE, progress=False)
    sqcompile.export(model, plan, "sqcompile", tmp_path / "out")
    assert same(whole, tmp_path / "out")
    assert os.listdir(whole.parent) == ["out"]
    stages = dict.fromkeys(p.stage.partition(":")[0] for p in SEEN)
    assert [*stages] == ["open", "trace", "calibrate", "match", "plan", "write"]
    assert any(p.stage == "write: tensors" and p.done == p.total and p.remaining == 0.0 for p in SEEN)


STEPS = {
    "before the plan": ("sqcompile.analysis.choose", ["calibrate"]),
    "before the weights": ("sqcompile.artifact.tensors.write_weights", ["calibrate", "analyse"]),
    "as the manifest is written": ("sqcompile.artifact.directory.write_manifest", ["calibrate", "analyse", "weights"]),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_run_goes_on_where_it_was_cut_off(step, checkpoint, whole, tmp_path, monkeypatch):
    where, done = STEPS[step]
    with monkeypatch.context() as m:
        m.setattr(where, cut)
        with pytest.raises(Cut):
            quantized(checkpoint, tmp_path / "out")
    assert os.listdir(tmp_path) == ["out.work"]
    functions = {"calibrate": (observe.Observer, "batch"), "analyse": (large, "analyse"), "weights": (artifact, "write_weights")}  # fmt: skip
    for name in done:
        monkeypatch.setattr(*functions[name], cut)
    done = quantized(checkpoint, tmp_path / "out")
    assert same(whole, tmp_path / "out") and os.listdir(tmp_path) == ["out"]
    assert done.format == "sqcompile" and done.plan.layers


@pytest.mark.slow
def test_what_was_damaged_meanwhile_is_made_anew(checkpoint, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr("sqcompile.artifact.directory.write_manifest", cut)
        with pytest.raises(Cut):
            quantized(checkpoint, tmp_path / "out")
    work = tmp_path / "out.work"
    names = ["lock", "model-00001-of-00001.safetensors", "plan.safetensors", "state.json", "statistics.safetensors"]
    assert sorted(os.listdir(work)) == names
    for name in names:
        if name.endswith(".safetensors"):
            data = bytearray((work / name).read_bytes())
            data[-3] ^= 1
            (work / name).write_bytes(data)
    (work / ".out-0123456789abcdef.tmp").mkdir()
    quantized(checkpoint, tmp_path / "out")
    assert same(whole, tmp_path / "out") and os.listdir(tmp_path) == ["out"]


def test_a_full_disk_is_one_sentence_and_nothing_is_lost(checkpoint, whole, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "out"
    with monkeypatch.context() as m:
        m.setattr(large, "write_statistics", full)
        with pytest.raises(
            ArtifactError, match=r"out cannot be written \(OSError: .*No space left on device\): mend that"
        ):
            quantized(checkpoint, out)
    assert not out.exists()
    quantized(checkpoint, out)
    assert same(out, whole) and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_other_arguments_are_refused_in_words(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("sqcompile.analysis.choose", cut)
    with pytest.raises(Cut):
        quantized(checkpoint, tmp_path / "out")
    for what, changes in {
        "other batches: pass what it was begun with": {"data": batches((1, 3))},
        "other recipe": {"recipe": "default"},
        "other format": {"format": "smoothed"},
        "other model": {"dtype": torch.bfloat16},
    }.items():
        with pytest.raises(ArtifactError, match=f"out.work was begun with {what}"):
            quantized(checkpoint, tmp_path / "out", **changes)
    os.utime(checkpoint / "model.safetensors", ns=(1, 1))
    with pytest.raises(ArtifactError, match="with other files of the checkpoint and other recipe: "):
        quantized(checkpoint, tmp_path / "out", recipe="default")
    state = tmp_path / "out.work" / "state.json"
    state.write_text(state.read_text()[:-5])
    with pytest.raises(ArtifactError, match=re.escape(f"{state} cannot be read: remove {state.parent}")):
        quantized(checkpoint, tmp_path / "out")


def test_what_is_read_is_not_replaced(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "out" / "float")
    (tmp_path / "out" / "sqcompile.json").write_text("{}")  # of an earlier output, which may be replaced
    before = sorted(p.name for p in (tmp_path / "out").rglob("*"))
    for out in (tmp_path / "out", tmp_path / "out" / "float"):
        with pytest.raises(ArtifactError, match=r"float is read, and would be replaced with .*: write to another path"):
            quantized(tmp_path / "out" / "float", out)
    assert sorted(p.name for p in (tmp_path / "out").rglob("*")) == before


def test_a_name_that_no_linear_has_is_said_before_it_calibrates(checkpoint, whole, tmp_path):
    """So that the run with the right name is a new one."""
    with pytest.raises(RecipeError, match="names no linear"):
        quantized(checkpoint, tmp_path / "out", recipe=sqcompile.Recipe(0.5, skip=("down_porj",)))
    assert not [*tmp_path.iterdir()]
    quantized(checkpoint, tmp_path / "out")
    assert same(whole, tmp_path / "out")


def test_a_directory_of_others_or_in_use_is_refused(checkpoint, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("Dear")
    with pytest.raises(ArtifactError, match="no other run has begun it"):
        quantized(checkpoint, tmp_path / "out", work=tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["letter"]

    def data():
        with pytest.raises(ArtifactError, match="another run works in"), large.Work(str(tmp_path / "w"), {}).held():
            pass
        yield from batches()

    with large.Work(str(tmp_path / "w"), {}).held():
        assert len([*data()]) == 2
    with pytest.raises(ArtifactError, match="is not quantized to 'onnx': choose one of sqcompile"):
        quantized(checkpoint, tmp_path / "out", format="onnx")
    with pytest.raises(CalibrationError, match="takes batches, which another run can see again"):
        quantized(checkpoint, tmp_path / "out", data=lambda model: None)
    with pytest.raises(RecipeError, match="pass a number of bytes"):
        quantized(checkpoint, tmp_path / "out", memory=-1)


_RUN = """
import os, signal, sys, torch, sqcompile
from sqcompile.artifact import tensors
write = tensors.write_weights
def killed(path, *args, **kwargs):
    if "00002-of" in path:
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, *args, **kwargs)
tensors.write_weights, tensors.write_tensors.__defaults__ = killed, (60_000, None)
sys.path.insert(0, "tests")
from families import token_ids
save = sqcompile.large.export_artifact
import functools, sqcompile.programs.export as e
e.save = functools.partial(e.save, most=60_000)
batches = [{"input_ids": token_ids(seed=seed)} for seed in (1, 2)]
sqcompile.quantize_checkpoint(sys.argv[1], batches, sys.argv[2], recipe=sqcompile.Recipe(0.5), progress=False)
"""


@pytest.mark.slow
def test_files_that_were_finished_before_a_kill_are_kept(checkpoint, whole, tmp_path, monkeypatch):
    killed = subprocess.run([sys.executable, "-c", _RUN, str(checkpoint), str(tmp_path / "out")], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    work = tmp_path / "out.work"
    first = next(f for f in os.listdir(work) if f.startswith("model-00001-of-"))
    assert [f for f in os.listdir(work) if f.startswith("model-")] == [
        first
    ] and first != "model-00001-of-00001.safetensors"
    written, write = [], artifact.write_weights

    def watched(path, *args, **kwargs):
        written.append(os.path.basename(path))
        write(path, *args, **kwargs)

    monkeypatch.setattr(artifact, "write_weights", watched)
    monkeypatch.setattr(large, "analyse", cut)
    import functools

    import sqcompile.programs.export as programs

    monkeypatch.setattr(programs, "save", functools.partial(programs.save, most=60_000))
    quantized(checkpoint, tmp_path / "out")
    assert first not in written and "model-00002-of-" + first[-17:] in written
    assert os.listdir(tmp_path) == ["out"]
    logits = sqcompile.load(tmp_path / "out", backend="eager")(**batches()[0]).logits
    assert torch.equal(logits, sqcompile.load(whole, backend="eager")(**batches()[0]).logits)


# A process that has imported everything forks: its children begin at once, and are killed at moments of a run.
_TEN = """
import os, random, signal, sys, time, warnings
import torch
import test_large as cases
torch.set_num_threads(1)  # a forked process has no threads of its parent
warnings.simplefilter("ignore")
checkpoint, folder, kills = sys.argv[1], sys.argv[2], int(sys.argv[3])

def run(target):
    child = os.fork()
    if not child:
        try:
            cases.quantized(checkpoint, target)
            os._exit(0)
        finally:
            os._exit(1)
    return child

begin = time.monotonic()
_, status = os.waitpid(run(f"{folder}/first"), 0)
assert status == 0, status
whole, moments = time.monotonic() - begin, random.Random(7)
for i in range(kills):
    child = run(f"{folder}/{i}")
    time.sleep(moments.uniform(0, whole))
    os.kill(child, signal.SIGKILL)  # a zombie, if it has ended
    print("killed" if os.waitpid(child, 0)[1] == signal.SIGKILL else "ended", *sorted(os.listdir(folder)), flush=True)
    _, status = os.waitpid(run(f"{folder}/{i}"), 0)
    assert status == 0, status
"""


@pytest.mark.slow
def test_killed_at_ten_moments_it_writes_the_same_bytes(checkpoint, tmp_path):
    paths = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    ran = subprocess.run(
        [sys.executable, "-c", _TEN, str(checkpoint), str(tmp_path), "10"],
        env={**os.environ, "PYTHONPATH": paths, "SQCOMPILE_VERIFY": "0"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.count("killed") >= 8  # the others' moment came after their end
    assert sorted(os.listdir(tmp_path)) == sorted(["first", *map(str, range(10))])
    assert [name for name in os.listdir(tmp_path) if not same(tmp_path / "first", tmp_path / name)] == []


def test_statistics_come_back_from_a_file_as_they_were(tmp_path):
    model, call = build("qwen2_moe")
    gm = trace(model, as_call(model, call))
    want = calibrate(gm, model, batches(), find_attentions(gm))
    file.write_statistics(str(tmp_path / "x.safetensors"), want)
    found = file.read_statistics(str(tmp_path), "x.safetensors")
    assert found.batches == want.batches and want.heads
    for name in ("inputs", "heads", "sample"):
        assert equal(getattr(found, name), getattr(want, name)), name
    shared = {frozenset(n for n, s in c.inputs.items() if s is x) for c in (found,) for x in c.inputs.values()}
    assert shared == {frozenset(n for n, s in want.inputs.items() if s is x) for x in want.inputs.values()}
    data = (tmp_path / "x.safetensors").read_bytes()
    for old, new in ((b"counts", b"counte"), (b'"0 rows"', b'"0 rowt"'), (b'\\"batches\\"', b'\\"batchez\\"')):
        assert old in data
        (tmp_path / "y.safetensors").write_bytes(data.replace(old, new))
        with pytest.raises(ArtifactError, match="has no statistics of a calibration: delete it"):
            file.read_statistics(str(tmp_path), "y.safetensors")
