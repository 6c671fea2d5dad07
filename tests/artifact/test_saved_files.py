"""Damaged and hostile artifacts: one ArtifactError each, in bounded time and memory; nothing runs, nothing else comes out."""

from __future__ import annotations

import copy as copying
import os
import pickle
import random
import time

import artifact_cases as cases
import pytest
import torch
from artifact_cases import batch, compiled, copy, equal, load, manifest, write_manifest
from safetensors.torch import load_file, save_file

import sqcompile
from sqcompile import ArtifactError
from sqcompile.artifact.expressions import checked, evaluated
from sqcompile.artifact.operators import operator_of

WEIGHTS = "model-00001-of-00001.safetensors"
FILES = ("sqcompile.json", "plan.safetensors", WEIGHTS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "net"
    compiled().save(path)
    return path


def refused(path, match=None):
    start = time.process_time()
    with pytest.raises(ArtifactError, match=match) as e:
        load(path)
    assert time.process_time() - start < 20
    assert "\n" not in str(e.value) and len(str(e.value)) < 1000
    return str(e.value)


def damaged(saved, to, seed, truncate):
    """A copy with one file cut off somewhere, or one byte of it changed."""
    r = random.Random(seed)
    path = copy(saved, to) / r.choice(FILES)
    data = bytearray(path.read_bytes())
    at = r.randrange(len(data)) if r.random() < 0.6 else r.randrange(min(len(data), 400))
    if truncate:
        del data[at:]
    else:
        data[at] ^= 1 << r.randrange(8)
    path.write_bytes(data)
    return to


@pytest.mark.parametrize("truncate", [True, False])
def test_a_damaged_file_is_refused(truncate, saved, tmp_path):
    for seed in range(30):
        refused(damaged(saved, tmp_path / "net", seed, truncate))


@pytest.mark.slow
def test_200_truncations_and_500_flipped_bits_are_refused(saved, tmp_path):
    for seed in range(200):
        refused(damaged(saved, tmp_path / "net", 1000 + seed, True))
    for seed in range(500):
        refused(damaged(saved, tmp_path / "net", 2000 + seed, False))


def test_missing_and_other_files(saved, tmp_path):
    for name in FILES:
        path = copy(saved, tmp_path / "net")
        (path / name).unlink()
        refused(path)
        (path / name).mkdir()
        refused(path)
        (path / name).rmdir()
        os.mkfifo(path / name)  # which would be waited for
        refused(path)
        (path / name).unlink()
        os.symlink(saved / name, path / name)
        if name != "plan.safetensors":  # of which the numbers do not come
            refused(path, "link")
    for path in (tmp_path / "none", saved / "sqcompile.json", "", "a\0b", 3.5, None):
        refused(path)


class Runs:
    """Leaves a trace where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", FILES)
def test_pickles_are_not_opened(name, saved, tmp_path):
    path, trace = copy(saved, tmp_path / "net"), tmp_path / "trace"
    for write in (lambda f: pickle.dump(Runs(trace), f), lambda f: torch.save(Runs(trace), f)):
        with open(path / name, "wb") as f:
            write(f)
        refused(path)
        assert not trace.exists()


def node(meta, operator):
    return next(n for n in meta["graph"]["nodes"] if n.get("target") == operator)


def an_input(meta):
    return next(n for n in meta["graph"]["nodes"] if n["op"] == "input")


def first(meta):
    return next(iter(meta["tensors"].values()))


def renamed(meta, name):
    """Renames a tensor, in the list of them and where it is read."""
    old = next(n["target"] for n in meta["graph"]["nodes"] if n["op"] == "tensor" and n["target"] in meta["tensors"])
    meta["tensors"] = {name if n == old else n: found for n, found in meta["tensors"].items()}
    for n in meta["graph"]["nodes"]:
        if n.get("target") == old:
            n["target"] = name


HUGE = 10**18
EDITS = {
    "a future version": lambda m: m.update(format=3),
    "a version of another type": lambda m: m.update(format="1"),
    "no graph": lambda m: m.pop("graph"),
    "no plan": lambda m: m.update(plan=None),
    "an unknown field": lambda m: m.update(more=1),
    "nodes that are no list": lambda m: m["graph"].update(nodes={"a": 1}),
    "a node that is no object": lambda m: m["graph"]["nodes"].__setitem__(3, 7),
    "an unknown kind of node": lambda m: node(m, "aten.relu.default").update(op="call_module"),
    "a node that does not exist": lambda m: node(m, "aten.relu.default").update(args=[{"node": "nothing"}]),
    "a node of a later one": lambda m: node(m, "aten.layer_norm.default").update(args=[{"node": "relu"}, [32]]),
    "a name twice": lambda m: node(m, "aten.relu.default").update(name=m["graph"]["nodes"][0]["name"]),
    "a name that is code": lambda m: node(m, "aten.relu.default").update(name="x = __import__('os')"),
    "a tensor's name that is code": lambda m: renamed(m, 'a"); import os; ("'),
    "a tensor's name that is a keyword": lambda m: renamed(m, "import"),
    "a tensor's name that a module has": lambda m: renamed(m, "forward"),
    "a keyword as a name": lambda m: node(m, "aten.relu.default").update(name="import"),
    "an operator that reads files": lambda m: node(m, "aten.relu.default").update(
        target="aten.from_file.default", args=["/etc/passwd", False, 8]
    ),
    "a function of Python": lambda m: node(m, "aten.relu.default").update(target="os.system", args=["true"]),
    "a builtin": lambda m: node(m, "aten.relu.default").update(target="builtins.exec", args=["pass"]),
    "an operator that writes": lambda m: node(m, "aten.relu.default").update(target="aten.relu_.default"),
    "another namespace": lambda m: node(m, "aten.relu.default").update(target="prims.sin.default"),
    "a kernel that checks nothing": lambda m: node(m, "aten.relu.default").update(target="sqcompile.int8_gemm.default"),
    "too few arguments": lambda m: node(m, "aten.layer_norm.default").update(args=[]),
    "arguments of other types": lambda m: node(m, "aten.layer_norm.default").update(
        args=["a", None, {"dtype": "int8"}]
    ),
    "an unknown dtype": lambda m: node(m, "aten.relu.default").update(kwargs={"dtype": {"dtype": "int3"}}),
    "an integer of 70 bits": lambda m: node(m, "aten.layer_norm.default")["args"].__setitem__(1, [2**70]),
    "sizes that do not fit": lambda m: node(m, "aten.layer_norm.default")["args"].__setitem__(1, [33]),
    "a weight that is another's": lambda m: node(m, "aten.relu.default").update(args=[{"node": "up_weight_int8"}]),
    "another number of results": lambda m: m["graph"]["nodes"][-1].update(args=[[{"node": "relu"}]]),
    "no output": lambda m: m["graph"]["nodes"].pop(),
    "a negative example": lambda m: m["graph"].update(symbols={s: [-1, 0, None] for s in m["graph"]["symbols"]}),
    "an input that fills the memory": lambda m: an_input(m).update(size=[HUGE, HUGE]),
    "an input's size that is code": lambda m: an_input(m).update(size=["__import__('os').getpid()", 4]),
    "a device that is none": lambda m: an_input(m).update(device="nonsense"),
    "the meta device": lambda m: an_input(m).update(device="meta"),
    "a condition that is code": lambda m: m["calls"].update(conditions=["__import__('os').mkdir('x') is None"]),
    "a condition that takes for ever": lambda m: m["calls"].update(conditions=["9 ** (9 ** 9) > 1"]),
    "a condition that its example breaks": lambda m: m["calls"].update(conditions=["1 > 2"]),
    "more inputs than arguments": lambda m: m["calls"]["leaves"].append({"constant": {"value": 1}}),
    "an argument of too many dims": lambda m: m["calls"]["leaves"][0].update(shape=[1] * 1000),
    "a structure without end": lambda m: m.update(returns={"list": [{"list": [{"list": []}] * 100000}]}),
    "a structure that is none": lambda m: m.update(returns={"class": "os.system", "parts": [None]}),
    "a signature that is none": lambda m: m["forward"].update(parameters=[{"name": "1a", "kind": "KEYWORD_ONLY"}]),
    "a way out of the directory": lambda m: first(m).update(file="../net/" + first(m)["file"]),
    "an absolute path": lambda m: first(m).update(file="/etc/passwd"),
    "a file that is not there": lambda m: first(m).update(file="other.safetensors"),
    "a key that is not there": lambda m: first(m).update(key="other"),
    "another dtype": lambda m: first(m).update(dtype="float16"),
    "another shape": lambda m: first(m).update(shape=[7]),
    "a huge shape": lambda m: first(m).update(shape=[HUGE, HUGE]),
    "an order that is none": lambda m: first(m).update(order=[5]),
    "a hash of another tensor": lambda m: first(m).update(sha256="0" * 64),
    "a hash that is none": lambda m: first(m).update(sha256=None),
    "a tensor that nothing reads": lambda m: m["tensors"].update(spare=first(m)),
    "no tensors": lambda m: m.update(tensors={}),
}


@pytest.mark.parametrize("edit", EDITS)
def test_wrong_fields_under_a_right_checksum_are_refused(edit, saved, tmp_path):
    path, meta = copy(saved, tmp_path / "net"), manifest(saved)
    before = copying.deepcopy(meta)
    EDITS[edit](meta)
    assert meta != before
    write_manifest(path, meta)
    refused(path)


def test_the_manifest_is_read_as_it_was_written(saved, tmp_path):
    """The checksum of the edits above is right: without one, the model is the same."""
    path = copy(saved, tmp_path / "net")
    write_manifest(path, manifest(saved))
    assert equal(load(path)(batch()), compiled()(batch()))


@pytest.mark.parametrize(
    "text", ["[" * 10**6, '{"a":' * 10**5, '{"format": ' + "9" * 10**6 + "}", "null", "[]", "{}", ""]
)
def test_json_without_end(text, saved, tmp_path):
    path = copy(saved, tmp_path / "net")
    (path / "sqcompile.json").write_text(text)
    refused(path)


def test_weights_that_were_edited_are_refused(saved, tmp_path):
    path = copy(saved, tmp_path / "net")
    tensors = load_file(path / WEIGHTS)
    tensors["up.weight_int8"] = tensors["up.weight_int8"].flip(0).contiguous()
    save_file(tensors, path / WEIGHTS)
    assert "up.weight_int8" in refused(path, "SHA-256")


def test_another_model_s_plan_is_refused(saved, tmp_path):
    """The graph says what is computed, and the plan what is told of it: both are of one model."""
    path = copy(saved, tmp_path / "net")
    compiled(seed=9).plan.save(path / "plan.safetensors")
    refused(path, "plan.safetensors is another model's: copy the directory again")


def test_a_manifest_of_the_first_format_is_read(saved, tmp_path):
    """It does not say which plan it goes with."""
    path, meta = copy(saved, tmp_path / "net"), manifest(saved)
    del meta["plan"]
    write_manifest(path, {**meta, "format": 1})
    assert equal(load(path)(batch()), compiled()(batch()))
    write_manifest(path, meta)
    refused(path, "damaged or was edited")


def test_a_file_with_a_tensor_more_is_refused(saved, tmp_path):
    path, meta = copy(saved, tmp_path / "net"), manifest(saved)
    tensors = load_file(path / WEIGHTS) | {"more": torch.zeros(3)}
    save_file(tensors, path / WEIGHTS)
    write_manifest(path, meta)
    refused(path, "other tensors")


@pytest.mark.parametrize(
    "name",
    [
        "aten.from_file.default", "aten.relu_.default", "aten.add_.Tensor", "aten.resize_.default", "aten._unsafe_index.Tensor",
        "aten.set_.source_Tensor", "sqcompile.int8_gemm.default", "sqcompile.matmul_u8s8.default", "prims.add.default",
        "aten.add", "aten..", "aten.add.Tensor.x", "aten.__class__.default", "aten.nothing.default", "os.system", "operator.call",
        "operator.attrgetter", "builtins.eval", "", None, 3, ["aten", "add"],
    ],
)  # fmt: skip
def test_what_a_saved_graph_may_not_call(name):
    with pytest.raises(ArtifactError):
        operator_of(name)


@pytest.mark.parametrize(
    "name", ["aten.add.Tensor", "aten.__and__.Tensor", "aten.arange.start", "operator.mul", "math.ceil"]
)
def test_what_a_saved_graph_may_call(name):
    assert callable(operator_of(name))


def test_expressions_are_arithmetic():
    sizes = {"s0": 6, "s1": 4}
    for text, is_ in (
        ("s0 <= 8", True), ("(s0 % 2) == 0 and s1 != 5", True), ("max(s0, s1) // 4", 1), ("math.ceil(s0 / 4)", 2),
        ("-s0 + s1**2", 10), ("not (s0 > s1)", False), ("s0 if s1 > 2 else 1", 6),
    ):  # fmt: skip
        assert evaluated(checked(text, sizes), sizes) == is_
    for text in (
        "s2 > 1", "__import__('os')", "s0.__class__", "math.__loader__", "torch.load('x')", "torch.ops", "().__class__",
        "[x for x in (1,)]", "lambda: 1", "s0 ** s1", "9 ** 99", "s0 << 99", "'a' * 9", "f'{s0}'", "s0 := 3", "max(*s0)",
        "max(key=s0)", "eval('1')", "1" * 3000, "(" * 500 + "1" + ")" * 500, "", None, 7, "s0 <= 10**9999", "1e999 > s0 and x",
    ):  # fmt: skip
        with pytest.raises(ArtifactError):
            checked(text, sizes)


def test_files_may_be_written_over_while_the_model_is_in_use(saved, tmp_path):
    """What is mapped stays the old file's, which another save replaces by name alone."""
    path = copy(saved, tmp_path / "net")
    net = load(path)
    want = net(batch())
    other = sqcompile.compile(
        cases.model(), [batch(9)], recipe=sqcompile.Recipe(alpha=0.9), backend="eager", progress=False
    )
    other.save(path)
    assert equal(net(batch()), want) and equal(load(path)(batch()), other(batch()))
