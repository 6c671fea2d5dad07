"""When a compiled graph is replayed as a CUDA graph, and what its results are; recorded on the CPU as a function."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch

from sqcompile.backend.cuda_graphs import NotRecorded, Recorder


class Tape:
    """Records on the CPU: a replay runs the function on the tensors it was recorded with, and gives into its results."""

    device = torch.device("cpu")

    def __init__(self, recording=False):
        self.recorded = self.replayed = 0
        self.recording = lambda: recording
        self.lock = threading.Lock()

    def follow(self):
        """There are no streams."""

    def record(self, run):
        results = run()
        self.recorded += 1

        def replay():
            self.replayed += 1
            for old, new in zip(results, run(), strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)

        return results, replay


def step(x, cache, position):
    """A sum, the cache as it is now, half of it, and a number."""
    cache[position] += x.sum()
    return [x.sum() + cache.sum(), cache, cache[1:], 7]


def calls(recorder, cache, n, shape=(3,), start=0.0):
    return [recorder(torch.full(shape, start + i), cache, 2) for i in range(n)]


def test_the_third_call_of_equal_sizes_in_a_row_is_recorded():
    tape = Tape()
    recorder = Recorder(step, [1], tape)
    cache, want = torch.zeros(4), torch.zeros(4)
    for i, got in enumerate(calls(recorder, cache, 6)):
        expected = step(torch.full((3,), float(i)), want, 2)
        assert torch.equal(got[0], expected[0]) and got[3] == 7
    assert torch.equal(cache, want)
    assert (tape.recorded, tape.replayed) == (1, 3)


def test_nothing_is_recorded_while_somebody_else_records():
    tape = Tape(recording=True)
    recorder, cache = Recorder(step, [1], tape), torch.zeros(4)
    calls(recorder, cache, 6)
    assert tape.recorded == 0 and float(cache[2]) == 3 * 15


def test_growing_and_changing_sizes_are_not_recorded():
    tape = Tape()
    recorder = Recorder(step, [1], tape)
    cache = torch.zeros(4)
    for n in (1, 2, 3, 2, 3, 2):
        recorder(torch.ones(n), cache, 2)
    assert tape.recorded == 0 and not recorder.recordings


def test_results_are_the_callers_own_and_views_stay_views():
    recorder = Recorder(step, [1], Tape())
    cache = torch.zeros(4)
    results = calls(recorder, cache, 5)
    sums, total = [], 0.0
    for i in range(5):
        total += 3 * i
        sums.append(3 * i + total)
    assert [float(r[0]) for r in results] == sums
    for r in results:
        assert r[1].data_ptr() == cache.data_ptr() and torch.equal(r[1], cache)
        assert r[2].data_ptr() == cache[1:].data_ptr() and torch.equal(r[2], cache[1:])


def test_another_cache_is_another_recording():
    tape = Tape()
    recorder = Recorder(step, [1], tape)
    a, b = torch.zeros(4), torch.zeros(4)
    calls(recorder, a, 3)
    calls(recorder, b, 3)
    assert tape.recorded == 2 and float(a[2]) == float(b[2]) == 9.0
    calls(recorder, a, 1, start=5.0)
    assert tape.recorded == 2 and float(a[2]) == 24.0


def test_replays_count_as_writes_and_marked_inputs_are_not_copied():
    tape = Tape()
    recorder = Recorder(lambda x, cache: step(x, cache, 2), [1], tape)
    cache, read = torch.zeros(4), torch.ones(3)
    torch._dynamo.mark_static_address(read)
    for _ in range(4):
        recorder(read, cache)
    [recording] = recorder.recordings.values()
    assert recording.buffers == [None, None] and tape.replayed == 1
    version = cache._version
    recorder(read, cache)
    assert cache._version > version + 1  # the tape's own write, and the one that is counted for a CUDA graph
    recorder(torch.ones(3), cache)
    assert tape.recorded == 1 and len(recorder.recordings) == 1  # another address


def test_a_recording_keeps_no_cache_alive():
    class Forgets(Tape):  # as a CUDA graph, which knows addresses only
        def record(self, run):
            return run(), lambda: None

    recorder = Recorder(step, [1], Forgets())
    cache = torch.zeros(4)
    alive = weakref.ref(cache.untyped_storage())
    calls(recorder, cache, 4)
    assert len(recorder.recordings) == 1
    del cache
    gc.collect()
    assert alive() is None


def test_few_recordings_are_kept():
    tape = Tape()
    recorder = Recorder(step, [1], tape)
    cache = torch.zeros(4)
    for n in range(1, 21):
        calls(recorder, cache, 3, shape=(n,))
    assert tape.recorded == 20 and len(recorder.recordings) == 16


@pytest.mark.parametrize("what", ["elsewhere", "a view of the cache", "expanded"])
def test_calls_that_cannot_be_recorded(what):
    tape = Tape()
    if what == "elsewhere":
        tape.device = torch.device("cuda", 0)
    recorder = Recorder(step, [1], tape)
    cache, want = torch.zeros(4), torch.zeros(4)
    for _ in range(5):
        x, y = (c[:1] if what == "a view of the cache" else torch.ones(1).expand(3) for c in (cache, want))
        assert torch.equal(recorder(x, cache, 2)[0], step(y, want, 2)[0])
    assert tape.recorded == 0


def test_what_a_graph_cannot_hold_runs_and_warns_once(recwarn):
    class Refuses(Tape):
        def record(self, run):
            raise NotRecorded from RuntimeError("operation not permitted when stream is capturing\nmore")

    recorder = Recorder(step, [1], Refuses())
    cache = torch.zeros(4)
    results = calls(recorder, cache, 8)
    assert float(cache[2]) == 3 * 28 and float(results[-1][0]) == 3 * 28 + 21
    [warning] = [w for w in recwarn if "CUDA graph" in str(w.message)]
    assert str(warning.message).endswith(
        "kernel by kernel (operation not permitted when stream is capturing): "
        "leave out mode='reduce-overhead', or mend what cannot be recorded"
    )
