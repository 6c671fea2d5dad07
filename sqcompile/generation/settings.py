"""settings: what a GenerationConfig of transformers asks for, checked: every field is honoured, or refused by its name."""

from __future__ import annotations

import numbers
import reprlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sqcompile.errors import GenerationError

HONOURED: dict[str, Any] = {  # and what holds where nobody says anything
    "max_length": None,
    "max_new_tokens": None,
    "min_length": 0,
    "min_new_tokens": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "max_cache_len": None,
}
# The id that a text starts with where there is no prompt; what compiles transformers' own loop; the file's version.
WITHOUT_EFFECT = ("bos_token_id", "disable_compile", "transformers_version")
# Values that change nothing, None beside them.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "early_stopping": (False,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "diversity_penalty": (0.0,),
    "length_penalty": (1.0,),
    "use_mtp": (False,),
    "use_cache": (True,),
    "cache_implementation": ("static",),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "renormalize_logits": (False,),
    "remove_invalid_values": (False,),
    "token_healing": (False,),
    "guidance_scale": (1.0,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "output_scores": (False,),
    "output_logits": (False,),
    "return_dict_in_generate": (False,),
    "is_assistant": (False,),
    "num_assistant_tokens": (20,),
    "num_assistant_tokens_schedule": ("constant",),
    "assistant_confidence_threshold": (0.4,),
    "assistant_lookbehind": (10,),
    "target_lookbehind": (10,),
    "low_memory": (False,),
}
SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
_DEFAULT_NEW = 20  # as in transformers
_INSTEAD = {
    "streamer": "pass callback=, a function of each token",
    "assistant_model": "model.generate of the compiled model takes it",
    "past_key_values": "sqcompile.generate keeps a cache of its own",
    "cache": "sqcompile.generate keeps a cache of its own",
}


@dataclass(frozen=True)
class Kind:
    """What a step does; another one is another recorded graph. The values beside it may change from call to call.

    Attributes:
        sample: whether tokens are drawn.
        temperature, top_p, penalty: whether there is one.
        top_k: how many logits are kept, 0 for all.
        minimum: whether the text may not end at first.
        ends: how many ids end a text.
    """

    sample: bool
    temperature: bool
    top_k: int
    top_p: bool
    penalty: bool
    minimum: bool
    ends: int


@dataclass(frozen=True)
class Settings:
    """What to write.

    Attributes:
        new: tokens at most.
        minimum: tokens of prompt and text before which no text may end.
        eos: ids that end a text.
        pad: what follows an ended text.
        pads_prompts: whether it stands for padding in prompts without an attention mask, too.
        sample, temperature, top_k, top_p, penalty: as in a GenerationConfig; top_k is 0 for all.
        cache: tokens that the cache must hold at least.
    """

    new: int
    minimum: int
    eos: tuple[int, ...]
    pad: int
    pads_prompts: bool
    sample: bool
    temperature: float
    top_k: int
    top_p: float
    penalty: float
    cache: int

    def kind(self, prompt: int) -> Kind:
        """For prompts of so many tokens."""
        return Kind(
            sample=self.sample,
            temperature=self.sample and self.temperature != 1.0,
            top_k=self.top_k if self.sample else 0,
            top_p=self.sample and self.top_p < 1.0,
            penalty=self.penalty != 1.0,
            minimum=bool(self.eos) and self.minimum > prompt,
            ends=len(self.eos),
        )


def read_settings(own: Any, given: Any, overrides: Mapping[str, Any], prompt: int, longest: int | None) -> Settings:
    """The settings of one call.

    Args:
        own: the model's GenerationConfig.
        given: the caller's, or None.
        overrides: fields, before both; a None among them counts.
        prompt: tokens of the prompts.
        longest: positions that the model has, None if it does not say: where no length is set, text ends there.

    Raises:
        GenerationError: for a setting that is not honoured, or a value that is none.
    """
    fields = {name for config in (own, given) if config is not None for name in vars(config)} | set(HONOURED)
    for name, value in overrides.items():
        if name not in fields and value is not None:
            raise GenerationError(f"{name} is no setting of sqcompile.generate: {_INSTEAD.get(name, _ELSE)}")
    said: dict[str, Any] = {}
    for config in (own, given):
        if config is not None:
            said |= {name: value for name, value in vars(config).items() if value is not None}
    said |= {name: value for name, value in overrides.items() if name in fields}
    for name, value in said.items():
        _check_neutral(name, value)
    asked = {**({} if given is None else vars(given)), **overrides}
    values = {**HONOURED, **{name: value for name, value in said.items() if name in HONOURED}}
    sample = values["do_sample"] or False
    if not isinstance(sample, bool):
        raise GenerationError(f"do_sample={reprlib.repr(sample)}: pass True or False")
    for name, neutral in SAMPLING.items():
        if not sample and asked.get(name) is not None and asked[name] != neutral:
            warnings.warn(f"{name}={asked[name]!r} has no effect without do_sample=True", stacklevel=4)
    eos = _ids("eos_token_id", values["eos_token_id"])
    pad = _ids("pad_token_id", values["pad_token_id"])
    if len(pad) > 1:
        raise GenerationError(f"pad_token_id={values['pad_token_id']!r}: pass one id")
    new = _new_tokens(values, prompt, longest)
    least = _whole("min_new_tokens", values["min_new_tokens"], 0)
    return Settings(
        new=new,
        minimum=_whole("min_length", values["min_length"], 0) or 0 if least is None else prompt + least,
        eos=eos,
        pad=pad[0] if pad else eos[0] if eos else 0,
        pads_prompts=bool(pad) and pad[0] not in eos,
        sample=sample,
        temperature=_number("temperature", values["temperature"], above=0.0) if sample else 1.0,
        top_k=_whole("top_k", values["top_k"], 0) or 0,
        top_p=_number("top_p", values["top_p"], above=None, most=1.0) if sample else 1.0,
        penalty=_number("repetition_penalty", values["repetition_penalty"], above=0.0),
        cache=max(prompt + new, _whole("max_cache_len", values["max_cache_len"], 1) or 0),
    )


_ELSE = "leave it out, or use model.generate"


def _check_neutral(name: str, value: Any) -> None:
    if name in HONOURED or name in WITHOUT_EFFECT or name.startswith("_") or value is None:
        return
    plain = isinstance(value, (bool, numbers.Number, str))
    if not plain or value not in NEUTRAL.get(name, ()):
        raise GenerationError(f"sqcompile.generate does not do {name}={reprlib.repr(value)}: {_ELSE}")


def _new_tokens(values: Mapping[str, Any], prompt: int, longest: int | None) -> int:
    new, length = _whole("max_new_tokens", values["max_new_tokens"], 1), _whole("max_length", values["max_length"], 1)
    if new is not None:
        return new
    if length is None:
        length = prompt + _DEFAULT_NEW if longest is None else min(prompt + _DEFAULT_NEW, longest)
    if length <= prompt:
        raise GenerationError(
            f"the prompts have {prompt} tokens, and max_length is {length}: pass max_new_tokens, or a larger max_length"
        )
    return length - prompt


def _ids(name: str, value: Any) -> tuple[int, ...]:
    """Ids of tokens, given as one, as several, or as a tensor of them."""
    if isinstance(value, Tensor):
        value = value.tolist()
    ids = [] if value is None else value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise GenerationError(f"{name}={reprlib.repr(value)}: pass an id of a token, or a list of them")
    return tuple(dict.fromkeys(ids))


def _whole(name: str, value: Any, least: int) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
        raise GenerationError(f"{name}={reprlib.repr(value)}: pass a whole number of at least {least}")
    return value


def _number(name: str, value: Any, above: float | None, most: float | None = None) -> float:
    """A number, 1.0 for None; above the one bound, or else at least 0, and at most the other."""
    if value is None:
        return 1.0
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not (value > above if above is not None else value >= 0) or not value <= (most or float("inf")):
        bounds = f"above {above:g}" if above is not None else f"from 0 to {most:g}"
        raise GenerationError(f"{name}={reprlib.repr(value)}: pass a number {bounds}")
    return float(value)
