"""measure: sums over the batches of what two models gave, window by window."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sqcompile.errors import EvaluationError
from sqcompile.evaluation.compared import Signs, Tokens, in_words, kind_of, logits_of, tensors_of
from sqcompile.evaluation.scores import add_to, parts, vectors
from sqcompile.process.interrupts import checkpoint
from sqcompile.statistics.divergence import divergence

MODELS = ("the model", "the float model")


class Measure:
    """Sums over batches.

    Attributes:
        kind: which of `compared.KINDS` the outputs are; None before the first batch.
        words: the same as a person would say it.
        windows: how many there are, those without anything that counts included.
    """

    def __init__(self, asked: str, signs: Signs) -> None:
        """``asked`` is a kind or "auto"; ``signs`` are those of the float model, or of the one that there is."""
        self.kind: str | None = None
        self.words = ""
        self.windows = 0
        self._asked, self._signs = asked, signs
        self._sums: dict[str, list[Tensor]] = {}
        self._hash = hashlib.sha256()

    def add(self, outs: Sequence[Any], tokens: Tokens, batch: int) -> None:
        """Adds what the models gave for a batch: the model's output, and the float model's, if there is one.

        Raises:
            EvaluationError: for outputs that cannot be compared, or that hold NaN.
        """
        if self.kind is None:
            self.kind = kind_of(outs[-1], tokens, self._asked, self._signs)
            self.words = in_words(self.kind, outs[-1])
            if len(outs) == 1 and self.kind != "next_token":
                raise EvaluationError(
                    f"of a model alone perplexity is all there is to say, and this one gives {self.words}: pass the float "
                    "model to compare it with, against="
                )
        if self.kind == "outputs":
            self._outputs(outs, tokens, batch)
        else:
            self._logits([self._found(out, what) for out, what in zip(outs, MODELS, strict=False)], tokens, batch)

    def sums(self, name: str) -> Tensor:
        """Of every window with something that counts, float64 [W]."""
        found = torch.cat(self._sums[name])
        return found[torch.cat(self._sums["count"]) > 0]

    def has(self, name: str) -> bool:
        return name in self._sums

    def checksum(self) -> str:
        """Of the tokens that are read and predicted: the same for the same data, however it is batched and padded."""
        return self._hash.hexdigest()

    def _found(self, out: Any, what: str) -> Tensor:
        logits, _ = logits_of(out)
        if logits is None:
            raise EvaluationError(f"{what} gives a {type(out).__name__} without logits, and the other has some")
        return logits

    def _start(self, windows: int, device: torch.device, names: Sequence[str]) -> dict[str, Tensor]:
        self.windows += windows
        return {n: torch.zeros(windows, dtype=torch.float64, device=device) for n in names}

    def _finish(self, sums: dict[str, Tensor]) -> None:
        for name, values in sums.items():
            self._sums.setdefault(name, []).append(values.cpu())

    def _logits(self, logits: list[Tensor], tokens: Tokens, batch: int) -> None:
        shape, size, device = logits[0].shape[:-1], logits[0].shape[-1], logits[0].device
        for x in logits[1:]:
            if x.shape[-1] != size:
                raise EvaluationError(
                    f"the model's logits are of {size} {'classes' if self.kind == 'classes' else 'tokens'}, those of the float "
                    f"model of {x.shape[-1]}: pass the float model that the model was made from, against="
                )
            if x.shape[:-1] != shape:
                raise EvaluationError(
                    f"the model's logits are {list(logits[0].shape)}, those of the float model {list(x.shape)}"
                )
        tokens.check_padding([shape])
        target, counted = self._counted(tokens, shape, device)
        where = counted.flatten().nonzero().flatten()
        if target is not None:
            for identity in tokens.identities(target, counted):
                self._hash.update(identity)
            target = target.flatten()[where]
            self._check_ids(target, size, batch)
        names = ["count", *(["loss", "other_loss"][: len(logits)] if target is not None else [])]
        sums = self._start(shape[0], device, names + ["kl", "same"] * (len(logits) - 1))
        flat, each, at = [x.flatten(0, -2) for x in logits], counted.shape[1:].numel(), 0
        for rows in parts(where, size):
            checkpoint()  # within a limit of memory, weights make room for what is computed here
            logs = [x[rows.to(x.device)].to(device, torch.float32).log_softmax(-1) for x in flat]
            self._check_numbers([l[:, 0] for l in logs], rows, each, batch)
            window = rows // each
            add_to(sums["count"], window, torch.ones_like(window))
            if target is not None:
                of = target[at : at + len(rows)].unsqueeze(1)
                for name, log_p in zip(names[1:], logs, strict=True):
                    add_to(sums[name], window, -log_p.gather(1, of).squeeze(1))
            if len(logs) == 2:
                add_to(sums["kl"], window, divergence(logs[1], logs[0]))
                add_to(sums["same"], window, logs[0].argmax(-1) == logs[1].argmax(-1))
            at += len(rows)
        self._finish(sums)

    def _counted(self, tokens: Tokens, shape: torch.Size, device: torch.device) -> tuple[Tensor | None, Tensor]:
        """What is predicted, int64 like ``shape``, if anything is; and where it counts, bool."""
        if self.kind != "next_token":
            return None, tokens.real(shape, device)
        found = tokens.predicted()
        if found is None or found[0].shape != shape:
            have = "none" if found is None else list(found[0].shape)
            raise EvaluationError(f"the logits are of {list(shape)} tokens, and the token ids or labels are {have}")
        return found[0].to(device, torch.int64), found[1].to(device)

    def _check_ids(self, target: Tensor, size: int, batch: int) -> None:
        if len(target) and not 0 <= int(target.min()) <= int(target.max()) < size:
            worst = int(target.max()) if int(target.max()) >= size else int(target.min())
            raise EvaluationError(
                f"batch {batch} has the token {worst}, and the model's logits are of {size}: use the model's own tokenizer, "
                "and labels of -100 for what does not count; where the logits are of each token itself and predict none, "
                "compare='tokens'"
            )

    def _check_numbers(self, firsts: Sequence[Tensor], rows: Tensor, each: int, batch: int) -> None:
        """Rows of logits with NaN or +infinity have log-probabilities that are all NaN."""
        for what, first in zip(MODELS, firsts, strict=False):
            if bool(first.isnan().any()):
                row = int(rows[first.isnan()][0])
                place = f"batch {batch}, window {row // each}" + (f", token {row % each}" if each > 1 else "")
                raise EvaluationError(_nan(what, "logits", place))

    def _outputs(self, outs: Sequence[Any], tokens: Tokens, batch: int) -> None:
        mine, others = ([*tensors_of(out)] for out in outs)
        if [(n, x.shape) for n, x in mine] != [(n, x.shape) for n, x in others] or not mine:
            given = (", ".join(f"{n} {list(x.shape)}" for n, x in found) or "no tensor" for found in (mine, others))
            raise EvaluationError(
                "the model gives {}, and the float model {}: there is nothing to compare".format(*given)
            )
        of_tokens = _of_tokens(outs[0], tokens)
        sizes = [x.shape[:2] for _, x in mine if x.dim() == 3 or x is of_tokens]
        if sizes:
            tokens.check_padding(sizes)
        device, windows = mine[0][1].device, max(len(x) if x.dim() else 1 for _, x in mine)
        sums = self._start(windows, device, ["count", "noise", "signal", "cosine"])
        for (name, x), (_, y) in zip(mine, others, strict=True):
            if x is of_tokens:
                x, y = (z.masked_fill(~tokens.real(z.shape, z.device), 0) for z in (x, y))
            (x, each), (y, _) = vectors(x), vectors(y)
            counted = tokens.real(torch.Size((len(x) // each, each)), x.device)
            for rows in parts(counted.flatten().nonzero().flatten(), x.shape[-1]):
                checkpoint()
                got, want = x[rows].to(device, torch.float32), y[rows.to(y.device)].to(device, torch.float32)
                noise, window = (got - want).square().sum(-1), (rows // each).to(device)
                for what, values in zip(MODELS, (got, want), strict=True):
                    if not bool(values.isfinite().all()):
                        raise EvaluationError(_nan(what, name, f"batch {batch}"))
                add_to(sums["count"], window, torch.ones_like(window))
                add_to(sums["noise"], window, noise)
                add_to(sums["signal"], window, want.square().sum(-1))
                add_to(sums["cosine"], window, torch.where(noise == 0, 1.0, F.cosine_similarity(got, want, dim=-1)))
        self._finish(sums)


def _of_tokens(out: Any, tokens: Tokens) -> Tensor | None:
    """The logits in an output where they are a number for each token, [batch, tokens].

    Raises:
        EvaluationError: if there is padding, and they may as well be a vector for each of the batch.
    """
    x, named = logits_of(out)
    if x is None or tokens.ids is None or x.shape != tokens.ids.shape:
        return None
    if not named and not bool(tokens.real(x.shape, x.device).all()):
        raise EvaluationError(
            f"the output {list(x.shape)} has the sizes of the token ids, and whether it is a number for each token, of which "
            "some are padding, does not show: pass batches without padding, or of another length"
        )
    return x


def _nan(what: str, name: str, place: str) -> str:
    return (
        f"the {name} of {what} are not finite in {place}: check the data and the dtype (float16 overflows at 65504, try "
        "bfloat16)"
        + ("; sqcompile.debug.bisect finds which step makes a compiled model wrong" if what == MODELS[0] else "")
    )
