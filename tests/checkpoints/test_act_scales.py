"""Files of activation scales: read from anywhere, so each thing in them is looked at."""

from __future__ import annotations

import io
import os
import pickle
import zipfile

import pytest
import torch
from checkpoint_cases import planned
from conftest import sites_of

from sqcompile import ArtifactError
from sqcompile.checkpoints import act_scales
from sqcompile.checkpoints.act_scales import act_scales_of, read_act_scales, write_act_scales
from sqcompile.statistics.observe import calibrate


def test_scales_are_written_as_the_authors_write_them(tmp_path):
    model, call, _ = planned("opt")
    gm = sites_of(model, **call)[0]
    scales = act_scales_of(calibrate(gm, model, [call]))
    seen = {}

    def hook(module, args, name):
        seen[name] = args[0].abs().flatten(0, -2).amax(0)

    handles = [
        m.register_forward_pre_hook(lambda m, args, n=n: hook(m, args, n))
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear)
    ]
    with torch.no_grad():
        model(**call, use_cache=False)
    for h in handles:
        h.remove()
    write_act_scales(tmp_path / "scales.pt", scales)
    found = torch.load(tmp_path / "scales.pt", weights_only=True)
    assert found.keys() == seen.keys() and "lm_head" in found
    for name, t in found.items():
        assert t.dtype == torch.float32 and t.device.type == "cpu"
        torch.testing.assert_close(t, seen[name], rtol=1e-5, atol=1e-6)
    again = read_act_scales(tmp_path / "scales.pt")
    assert all(torch.equal(again[name], t) for name, t in found.items())


def test_other_dtypes_and_views_are_read(tmp_path):
    torch.save({"a": torch.arange(6).half()[::2], "b": torch.ones(1, dtype=torch.bfloat16)}, tmp_path / "f")
    found = read_act_scales(tmp_path / "f")
    assert found["a"].tolist() == [0.0, 2.0, 4.0] and found["a"].is_contiguous() and found["b"].dtype == torch.float32


GOOD = torch.ones(3)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([GOOD], "it is a list and no dict of linears"),
        ({}, "it is a dict and no dict of linears"),
        ({3: GOOD}, "3 is no name of a module"),
        ({"": GOOD}, "'' is no name of a module"),
        ({"a\n": GOOD}, r"'a\\n' is no name of a module"),
        ({"a" * 1001: GOOD}, "is no name of a module"),
        ({"a": [1.0]}, "a is a list, and no float tensor"),
        ({"a": torch.ones(3, dtype=torch.int64)}, "a is a Tensor, and no float tensor"),
        ({"a": GOOD.to_sparse()}, "a is a Tensor, and no float tensor"),
        ({"a": GOOD[None]}, r"a has the shape \(1, 3\), and not one number for each channel"),
        ({"a": GOOD[:0]}, r"a has the shape \(0,\)"),
        ({"a": torch.ones(1).expand(2**25)}, r"a has the shape \(33554432,\)"),
        ({"a": torch.tensor([1.0, float("nan")])}, "a has nan, which is no largest absolute value"),
        ({"a": torch.tensor([1.0, float("inf")])}, "a has inf"),
        ({"a": torch.tensor([1.0, -2.0])}, "a has -2.0"),
    ],
)
def test_what_is_wrong_in_a_file_is_said(content, reason, tmp_path):
    torch.save(content, tmp_path / "f")
    with pytest.raises(ArtifactError, match=reason):
        read_act_scales(tmp_path / "f")
    with pytest.raises(ArtifactError, match=f"these are no activation scales .*{reason}"):
        write_act_scales(tmp_path / "g", content)
    assert os.listdir(tmp_path) == ["f"]


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_files_of_another_kind_are_refused_and_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def refused(path):
        with pytest.raises(ArtifactError, match="has no activation scales"):
            read_act_scales(path)

    torch.save({"a": Harmful()}, "code")
    refused("code")
    (tmp_path / "pickle").write_bytes(pickle.dumps({"a": GOOD}))
    refused("pickle")
    torch.save({"a": GOOD}, "legacy", _use_new_zipfile_serialization=False)
    refused("legacy")
    data = io.BytesIO()
    torch.save({"a": GOOD}, data)
    (tmp_path / "cut").write_bytes(data.getvalue()[:-40])
    refused("cut")
    os.mkfifo("pipe")
    refused("pipe")
    refused("none")
    refused(tmp_path)
    with pytest.raises(ArtifactError, match="the path is 3"):
        read_act_scales(3)
    assert not (tmp_path / "harm").exists()


def test_large_files_are_refused_packed_ones_too(tmp_path, monkeypatch):
    monkeypatch.setattr(act_scales, "_MOST_BYTES", 2**16)
    with zipfile.ZipFile(tmp_path / "packed", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("archive/data.pkl", bytes(2**17))
    with pytest.raises(ArtifactError, match="unpacked, it is too large"):
        read_act_scales(tmp_path / "packed")
    (tmp_path / "large").write_bytes(bytes(2**17))
    with pytest.raises(ArtifactError, match="more than a file of activation scales takes"):
        read_act_scales(tmp_path / "large")


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    write_act_scales(tmp_path / "f", {"a": GOOD})
    before = (tmp_path / "f").read_bytes()
    with pytest.raises(ArtifactError, match=r"a has -1\.0"):
        write_act_scales(tmp_path / "f", {"a": -GOOD})
    with pytest.raises(ArtifactError, match=r"cannot be written to .*on a disk with room"):
        write_act_scales(tmp_path / "none" / "f", {"a": GOOD})
    with pytest.raises(ArtifactError, match="not a regular file"):
        write_act_scales(tmp_path, {"a": GOOD})
    assert (tmp_path / "f").read_bytes() == before and os.listdir(tmp_path) == ["f"]
