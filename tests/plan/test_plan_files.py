"""Files of plans: regular ones alone, written whole or not at all, refused where they are damaged."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import os
import random
import stat
import threading
from types import SimpleNamespace

import pytest
import torch
from plan_cases import KEY, dynamic_plan, parts, static_plan, write
from safetensors.torch import save_file

from sqcompile import Plan, PlanError, Recipe
from sqcompile.files import regular
from sqcompile.plan.entries import LayerPlan, Shard
from sqcompile.plan.file import checksum

plan, static = pytest.fixture(dynamic_plan), pytest.fixture(static_plan)


def test_a_saved_plan_is_equal_by_value(plan, static, tmp_path):
    for p in (plan, static):
        p.save(tmp_path / "a")
        one, two = Plan.load(tmp_path / "a"), Plan.load(str(tmp_path / "a"))
        assert p == p and one == two == p and hash(one) == hash(two) == hash(p) and one is not two
        one.save(tmp_path / "b")
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert plan != static and plan != 3
    name, s = next(iter(plan.scales.items()))
    assert plan != dataclasses.replace(plan, scales={**plan.scales, name: s * 2})
    assert plan != dataclasses.replace(plan, scales={**plan.scales, name: s.double()})
    assert plan != dataclasses.replace(plan, columns={})
    assert plan != dataclasses.replace(plan, call={"args": [], "kwargs": {}})


def _inside(x, rng):
    """A random place in nested JSON: its container and key."""
    while True:
        key = rng.choice(list(x) if isinstance(x, dict) else range(len(x)))
        if not isinstance(x[key], (dict, list)) or not x[key] or rng.random() < 0.2:
            return x, key
        x = x[key]


def fuzz(plan, path, rounds, seed):
    """Random damage to JSON, to header and body, and cuts: PlanError, or an equal plan."""
    rng = random.Random(seed)
    meta, tensors = parts(plan, path)
    data = path.read_bytes()
    values = [None, True, 0, -1, 1e38, float("nan"), "x", "", [], {}, [[]], {"a": 1}, 10**18, "\ud800", 0.5]
    equal = 0
    for i in range(rounds):
        if i % 2:
            bad = copy.deepcopy(meta)
            for _ in range(rng.randint(1, 3)):
                where, key = _inside(bad, rng)
                kind = rng.randrange(3)
                if kind == 0:
                    where[key] = copy.deepcopy(rng.choice(values))
                elif kind == 1:
                    del where[key]
                elif isinstance(where, dict):
                    where[rng.choice(["bogus", "shape", "name"])] = copy.deepcopy(where[key])
                if not bad:
                    break
            save_file(tensors, path, {KEY: json.dumps(bad)})
        else:
            bits = bytearray(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)
            for _ in range(rng.randint(1, 4) if bits else 0):
                end = len(bits) if rng.random() < 0.3 else min(len(bits), 4000)
                bits[rng.randrange(end)] ^= 1 << rng.randrange(8)
            path.write_bytes(bytes(bits))
        try:
            assert Plan.load(path) == plan
            equal += 1
        except PlanError as e:
            assert len(str(e)) < 2000
    return equal


def test_damaged_files_are_refused_or_equal(plan, static, tmp_path):
    for i, p in enumerate((plan, static)):
        assert fuzz(p, tmp_path / "p", 150, i) < 60


@pytest.mark.slow
def test_thousands_of_damaged_files(plan, static, tmp_path):
    for i, p in enumerate((plan, static)):
        fuzz(p, tmp_path / "p", 2000, 10 + i)


def old_file(plan, path, skip):
    """The plan as format 2 kept it."""
    meta, tensors = parts(dataclasses.replace(plan, evidence=None), path)
    recipe = {k: v for k, v in meta["recipe"].items() if k != "lm_head"}
    meta = {k: v for k, v in meta.items() if k not in ("sha256", "shard")}
    meta |= {"format": 2, "recipe": {**recipe, "skip": skip}}
    write(path, meta, tensors)


@pytest.mark.parametrize(
    ("old", "skip", "lm_head"),
    [(["lm_head"], (), False), ([], (), True), (["fc"], ("fc",), True), (["fc", "lm_head"], ("fc",), False)],
)
def test_plans_of_format_2_keep_what_their_skip_meant(old, skip, lm_head, plan, tmp_path):
    old_file(plan, tmp_path / "old", old)
    found = Plan.load(tmp_path / "old")
    assert found.recipe == Recipe(attention="qk", skip=skip, lm_head=lm_head)
    assert dataclasses.replace(found, recipe=plan.recipe) == plan


def test_plans_of_format_5_are_of_whole_models(plan, tmp_path):
    meta, tensors = parts(plan, tmp_path / "p")
    old = {k: v for k, v in meta.items() if k not in ("sha256", "shard")} | {"format": 5}
    write(tmp_path / "old", {**old, "sha256": checksum(old, tensors)}, tensors)
    found = Plan.load(tmp_path / "old")
    assert found == plan and found.shard is None
    write(tmp_path / "old", {**old, "shard": None}, tensors)
    with pytest.raises(PlanError, match="its fields are"):
        Plan.load(tmp_path / "old")


def test_whose_shard_it_is_of_is_kept(plan, tmp_path):
    one = dataclasses.replace(plan, shard=Shard(1, 2))
    one.save(tmp_path / "p")
    found = Plan.load(tmp_path / "p")
    assert found == one != plan and found.shard == Shard(1, 2) and Plan.decoded(one.encoded()) == one
    assert "the shard of rank 1 of 2" in repr(one) and one.keep_float("mlp").shard == one.shard


@pytest.mark.parametrize(
    "shard",
    [(2, 2), (-1, 2), (0, 1), (0, 0), (True, 2), (0.0, 2), ("0", 2), (0, None), (0, 2**40)],
)  # fmt: skip
def test_a_shard_that_cannot_be(shard, plan, tmp_path):
    meta, tensors = parts(plan, tmp_path / "p")
    write(tmp_path / "p", {**meta, "shard": dict(zip(("rank", "count"), shard, strict=True))}, tensors)
    with pytest.raises(PlanError, match="its shard is of rank"):
        Plan.load(tmp_path / "p")
    for wrong in (0, [], {"rank": 0}, {"rank": 0, "count": 2, "more": 1}):
        write(tmp_path / "p", {**meta, "shard": wrong}, tensors)
        with pytest.raises(PlanError):
            Plan.load(tmp_path / "p")
    with pytest.raises(PlanError, match="neither a Shard nor None"):
        dataclasses.replace(plan, shard=shard).check()


def test_nothing_but_a_regular_file_is_read_or_replaced(plan, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    os.symlink(pipe, tmp_path / "link")
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    for path in (pipe, tmp_path / "link", tmp_path, tmp_path / "loop"):
        for use in (Plan.load, plan.save):
            with pytest.raises(PlanError):
                use(path)
    assert stat.S_ISFIFO(pipe.stat().st_mode) and sorted(p.name for p in tmp_path.iterdir()) == ["link", "loop", "pipe"]
    for path in (0, None, 3.5):
        with pytest.raises(PlanError, match="pass a string or a"):
            Plan.load(path)


@pytest.mark.parametrize("kind", [stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK, stat.S_IFIFO, stat.S_IFDIR])
def test_devices_are_not_opened(kind, plan, tmp_path, monkeypatch):
    plan.save(tmp_path / "p")
    before, opened = (tmp_path / "p").read_bytes(), []
    monkeypatch.setattr(regular.os, "stat", lambda path: SimpleNamespace(st_mode=kind | 0o666, st_size=0))
    monkeypatch.setattr(regular.os, "open", lambda *args: opened.append(args))
    for use in (Plan.load, plan.save):
        with pytest.raises(PlanError, match="not a regular file"):
            use(tmp_path / "p")
    monkeypatch.undo()
    assert not opened and (tmp_path / "p").read_bytes() == before


def test_saving_keeps_permissions_and_links(plan, tmp_path):
    target, link = tmp_path / "p", tmp_path / "link"
    before = os.umask(0o027)
    try:
        plan.save(target)
    finally:
        os.umask(before)
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    target.chmod(0o604)
    os.symlink(target, link)
    plan.save(link)
    assert link.is_symlink() and stat.S_IMODE(target.stat().st_mode) == 0o604 and Plan.load(target) == plan
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "p"]


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("fsync", OSError(errno.ENOSPC, "No space left on device")),
        ("open", PermissionError(errno.EACCES, "Permission denied")),
        ("replace", OSError(errno.EROFS, "Read-only file system")),
        ("fsync", KeyboardInterrupt()),
    ],
)
def test_a_save_that_fails_leaves_the_old_file(what, error, plan, static, tmp_path, monkeypatch):
    plan.save(tmp_path / "p")

    def fail(*args):
        raise error

    monkeypatch.setattr(regular.os, what, fail)
    with pytest.raises(PlanError if isinstance(error, OSError) else KeyboardInterrupt) as found:
        static.save(tmp_path / "p")
    monkeypatch.undo()
    assert getattr(error, "strerror", "") in str(found.value)
    assert Plan.load(tmp_path / "p") == plan and [p.name for p in tmp_path.iterdir()] == ["p"]


def test_where_no_file_can_be(plan, tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "none" / "p", tmp_path / "file" / "p", "", "a\0b", tmp_path / ("x" * 300)):
        with pytest.raises(PlanError, match=r"cannot be written|not a regular file"):
            plan.save(path)
    with pytest.raises(PlanError):
        Plan.load(tmp_path / "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_plans_saved_at_once_are_whole(plan, static, tmp_path):
    def work(p):
        for _ in range(10):
            p.save(tmp_path / "p")
            assert Plan.load(tmp_path / "p") in (plan, static)

    threads = [threading.Thread(target=work, args=(p,)) for p in (plan, static) * 2]
    failed = []
    threading.excepthook, before = lambda args: failed.append(args.exc_value), threading.excepthook
    try:
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        threading.excepthook = before
    assert not failed and [p.name for p in tmp_path.iterdir()] == ["p"]


def test_tensors_that_share_memory_are_saved(tmp_path):
    layers = tuple(LayerPlan(n, "linear", True, "multiplied", "", shape=(4, 8)) for n in ("a", "b"))
    s = torch.arange(1, 9).float()
    both = Plan(Recipe(), {"args": [], "kwargs": {}}, {"input -> a, b": s}, layers, (), {}, {"a": s, "b": s})
    both.save(tmp_path / "p")
    assert Plan.load(tmp_path / "p") == both
