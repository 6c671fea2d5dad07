"""generate: a quick look at what a model writes.

A float model writes by `sqcompile.generate`. What was captured without a KV cache runs the whole text again for every token.
"""

from __future__ import annotations

import inspect
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import sqcompile
from sqcompile.checkpoints.float_model import Checkpoint
from sqcompile.checkpoints.read_files import read_json
from sqcompile.cli.saved import check_backend, is_int8, load_any, longest_in, plan_in, tokenizer_of
from sqcompile.cli.terminal import CommandError, Terminal
from sqcompile.compiled.emit import CompiledModel
from sqcompile.errors import GenerationError, SQCompileError
from sqcompile.files.regular import said as words
from sqcompile.windows import check_text

GENERATION = "generation_config.json"
LEAST_TEMPERATURE = 1e-4  # logits divided by less are beyond float32


@dataclass(frozen=True)
class Asked:
    """What to write.

    Attributes:
        prompt: text.
        tokens: how many at most.
        temperature: 0 takes the likeliest token.
        seed: of what is drawn.
        tokenizer: the directory that has it; None for the model's.
    """

    prompt: str
    tokens: int
    temperature: float = 0.0
    seed: int = 0
    tokenizer: str | None = None


def generate(folder: str, asked: Asked, backend: str, device: str | None, as_json: bool, terminal: Terminal) -> None:
    """Streams text to stdout, or prints it as JSON when it is there.

    Raises:
        SQCompileError: one sentence.
    """
    if 0 < asked.temperature < LEAST_TEMPERATURE:
        raise CommandError(f"--temperature {asked.temperature:g}: pass 0, or at least {LEAST_TEMPERATURE:g}")
    check_text([asked.prompt])
    check_backend(backend)
    if not is_int8(folder) and not (checkpoint := Checkpoint.open(folder)).causal:
        raise CommandError(f"{checkpoint.architecture.__name__} is no causal language model: generate needs one")
    tokenizer = tokenizer_of(asked.tokenizer, folder)
    model = load_any(folder, backend, device, terminal.progress)
    plan = plan_in(model)
    if plan is not None and "decoder_input_ids" in plan.call["kwargs"]:
        raise CommandError("the model has an encoder and a decoder: generate needs a causal language model")
    ids = tokenizer(asked.prompt, return_tensors="pt")["input_ids"]
    if not ids.numel():
        raise CommandError("the prompt has no tokens: pass some text")
    written, start, first = "", time.perf_counter(), 0.0
    if not as_json:
        _write(asked.prompt)
    new, longest = list[int](), longest_in(folder)

    def tell(token: int) -> None:
        nonlocal first, written
        read = ids.shape[1] + len(new)
        if longest is not None and read > longest:
            raise CommandError(f"the model cannot go on after {longest} tokens: it takes no more")
        first = first or time.perf_counter()
        new.append(token)
        text = tokenizer.decode(new, skip_special_tokens=True)
        if not as_json and not text.endswith("\ufffd"):  # a letter may be made of several tokens
            _write(text[len(written) :])
            written = text

    ends = ends_of(folder, tokenizer)
    cached = _cached(model, ids, asked, ends, tell)
    if not cached:
        for token in tokens(model, ids, asked, ends):
            tell(token)
    seconds = time.perf_counter() - first
    speed = (len(new) - 1) / seconds if len(new) > 1 else None
    if as_json:
        text = tokenizer.decode(new, skip_special_tokens=True)
        terminal.result({"prompt": asked.prompt, "text": text, "tokens": new, "tokens_per_second": speed}, "")
        return
    _write(tokenizer.decode(new, skip_special_tokens=True)[len(written) :] + "\n")
    said = f", the first after {first - start:.1f} s" if new else ""
    said += f", {speed:.1f} tokens/s with{'' if cached else 'out'} a KV cache" if speed else ""
    terminal.say(f"{len(new)} tokens{said}")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def ends_of(folder: str, tokenizer: Any) -> list[int]:
    """The tokens that end a text: those of generation_config.json, or else the tokenizer's."""
    found = None
    if os.path.exists(os.path.join(folder, GENERATION)):
        found = read_json(folder, GENERATION).get("eos_token_id")
    found = tokenizer.eos_token_id if found is None else found
    return [t for t in (found if isinstance(found, list) else [found]) if type(t) is int and t >= 0]


def _cached(model: nn.Module, ids: Tensor, asked: Asked, ends: list[int], tell: Callable[[int], None]) -> bool:
    """Tells the tokens after ids int64 [1, tokens] until one of ``ends``; False, and none, for a model without a KV cache."""
    device = next((t.device for t in model.parameters()), torch.device("cpu"))
    told = 0

    def see(token: Tensor) -> None:
        nonlocal told
        told += 1
        if int(token) not in ends:
            tell(int(token))

    drawn = {"do_sample": True, "temperature": asked.temperature, "top_k": 0, "top_p": 1.0}
    try:
        sqcompile.generate(
            model,
            ids,
            torch.ones_like(ids),
            max_new_tokens=asked.tokens,
            eos_token_id=ends or None,
            repetition_penalty=1.0,
            generator=torch.Generator(device).manual_seed(asked.seed),
            callback=see,
            **(drawn if asked.temperature > 0 else {"do_sample": False}),
        )
    except GenerationError:  # before the first token
        return False
    except SQCompileError:
        raise
    except (IndexError, TypeError, ValueError) as e:  # of a model that takes no longer text
        raise _ended(ids.shape[1] + told, e) from e
    return True


def _ended(tokens: int, why: Exception) -> CommandError:
    return CommandError(f"the model cannot go on after {tokens} tokens ({words(why)})")


@torch.no_grad()
def tokens(model: nn.Module, ids: Tensor, asked: Asked, ends: list[int]) -> Iterator[int]:
    """The tokens after ids int64 [1, tokens], one by one, until one of ``ends``.

    Raises:
        CommandError: for a model that gives no logits of tokens.
    """
    generator = torch.Generator().manual_seed(asked.seed)
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    masked = _reads_mask(model)
    ids = ids.to(device)
    for _ in range(asked.tokens):
        try:
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids)) if masked else model(input_ids=ids)
        except SQCompileError:
            raise
        except (IndexError, TypeError, ValueError) as e:  # of a model that takes other inputs, or no longer text
            raise _ended(ids.shape[1], e) from e
        logits: Any = getattr(out, "logits", out)
        if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[1] != ids.shape[1]:
            raise CommandError("the model gives no logits [batch, tokens, vocabulary]: generate needs a language model")
        last = logits[0, -1].float().cpu()
        if asked.temperature > 0:
            token = int(torch.multinomial((last / asked.temperature).softmax(-1), 1, generator=generator))
        else:
            token = int(last.argmax())
        if token in ends:
            return
        yield token
        ids = torch.cat([ids, ids.new_tensor([[token]])], 1)


def _reads_mask(model: nn.Module) -> bool:
    """Whether calls have an attention mask: as in the call that a compiled model was captured with."""
    if isinstance(model, CompiledModel):
        return "attention_mask" in model.plan.call["kwargs"]
    return "attention_mask" in inspect.signature(model.forward).parameters
