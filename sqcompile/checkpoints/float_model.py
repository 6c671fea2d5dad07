"""float_model: a directory of transformers as a model, and what makes batches for it: tokenizer, image or audio processor.

What a model reads is found from its configuration and class, not from a table of names: a class of transformers says what
its main input is, and whether it generates. A directory of sentence-transformers is the transformer inside it.
"""

from __future__ import annotations

import glob
import json
import os
from dataclasses import dataclass
from typing import Any, Literal

import torch

from sqcompile.checkpoints.open_checkpoint import open_checkpoint
from sqcompile.checkpoints.read_files import CONFIG
from sqcompile.checkpoints.skeleton import DTYPES
from sqcompile.errors import ArtifactError
from sqcompile.files.regular import read_regular, said

Reads = Literal["text", "images", "audio"]
_READS: dict[str, Reads] = {
    "input_ids": "text",
    "pixel_values": "images",
    "input_features": "audio",
    "input_values": "audio",
}
MODULES, _SENTENCES = "modules.json", "sentence_bert_config.json"  # of sentence-transformers
_NO_LIMIT = 2**20  # tokens: what tokenizers say that have none is more
_MOST_BYTES = 2**24


@dataclass(frozen=True)
class Checkpoint:
    """A directory with a float model of transformers.

    Attributes:
        folder: where config.json and the weights are.
        config: of transformers.
        architecture: the class, of transformers.
        reads: what its main input is made from.
        main_input: the name of that input.
    """

    folder: str
    config: Any
    architecture: Any
    reads: Reads
    main_input: str

    @staticmethod
    def open(folder: str) -> Checkpoint:
        """Looks at a directory, and at none of its weights.

        Raises:
            ArtifactError: if it is no checkpoint of a float model that can be run.
        """
        import transformers

        if not os.path.isdir(folder):
            raise ArtifactError(f"{folder} is no directory: pass that of a model that transformers can load")
        inner = _inner(folder)
        if not os.path.exists(os.path.join(inner, CONFIG)):
            raise ArtifactError(f"{folder} has no {CONFIG}: pass the directory of a model that transformers can load")
        config = config_of(inner)
        if "quantization_config" in _json(inner, CONFIG):
            raise ArtifactError(f"{folder} is quantized already: pass the float model that it was made from")
        _check_weights(inner)
        found, name = class_of(config)
        if found is None:
            raise ArtifactError(
                f"the {CONFIG} of {folder} names the class {name!r}, which transformers {transformers.__version__} does not "
                "have, and code in a checkpoint is never run: use sqcompile.compile from Python with the model itself"
            )
        main = str(getattr(found, "main_input_name", "input_ids"))
        if main not in _READS:
            raise ArtifactError(f"{name} reads {main}, for which there are no files: use sqcompile.compile from Python")
        return Checkpoint(inner, config, found, _READS[main], main)

    @property
    def encoder_decoder(self) -> bool:
        """Whether a decoder's tokens are an input, too."""
        return bool(getattr(self.config, "is_encoder_decoder", False)) and self.architecture.can_generate()

    @property
    def causal(self) -> bool:
        """Whether it is a causal language model."""
        return is_causal(self.architecture, self.config)

    @property
    def longest(self) -> int | None:
        """How many tokens a sequence may have at most, as far as the configuration says."""
        return longest_of(self.config)

    def usual(self, tokenizer: Any) -> int | None:
        """How many tokens a sequence has at most in use, as far as its tokenizer says, or sentence-transformers.

        The table of positions may have more, some of which no token has (RoBERTa's).
        """
        found = [getattr(tokenizer, "model_max_length", None)]
        if os.path.exists(os.path.join(self.folder, _SENTENCES)):
            written = _json(self.folder, _SENTENCES)
            found.append(written.get("max_seq_length") if isinstance(written, dict) else None)
        known = [n for n in found if isinstance(n, int) and 1 < n < _NO_LIMIT]
        return min(known, default=None)

    def load(self, dtype: str = "auto") -> Any:
        """The model in eval mode, whose parameters lie in the files until they are looked at (`open_checkpoint`).

        Args:
            dtype: "auto" for that of the files, or "float32", "bfloat16", "float16".

        Raises:
            ArtifactError: if its weights cannot be read.
        """
        model = open_checkpoint(self.folder, self.architecture, dtype=dtype_of(dtype))
        return model.requires_grad_(False)

    def tokenizer(self) -> Any:
        """The tokenizer in the directory.

        Raises:
            ArtifactError: if there is none.
        """
        return load_tokenizer(self.folder)

    def processor(self) -> Any:
        """What makes inputs of images or sound.

        Raises:
            ArtifactError: if there is none.
        """
        import transformers

        kind: Any = transformers.AutoImageProcessor if self.reads == "images" else transformers.AutoFeatureExtractor
        try:
            return kind.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        except Exception as e:
            raise ArtifactError(
                f"{self.folder} has no processor of {self.reads} ({said(e)}): copy its preprocessor_config.json"
            ) from e


def class_of(config: Any) -> tuple[Any, Any]:
    """The class of transformers that a configuration names, None if there is none such, and its name."""
    import transformers

    classes = getattr(config, "architectures", None)
    name = classes[0] if isinstance(classes, list) and classes else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    known = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if known else None, name


def is_causal(architecture: Any, config: Any) -> bool:
    """Whether a model is a causal language model: one that reads windows of text, and gives logits of the next token."""
    text = str(getattr(architecture, "main_input_name", "input_ids")) == "input_ids"
    return text and architecture.can_generate() and not getattr(config, "is_encoder_decoder", False)


def dtype_of(name: str) -> torch.dtype | None:
    """The dtype of a name; None for "auto", that of the files.

    Raises:
        ArtifactError: for another name.
    """
    if name not in ("auto", *DTYPES):
        raise ArtifactError(f"the dtype {name!r} is none: choose auto, {', '.join(DTYPES)}")
    return DTYPES.get(name)


def config_of(folder: str) -> Any:
    """The configuration in a directory, as transformers has it.

    Raises:
        ArtifactError: if it cannot be read.
    """
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as e:
        raise ArtifactError(f"the {CONFIG} of {folder} cannot be read ({said(e)}): copy the model again") from e


def longest_of(config: Any) -> int | None:
    """How many tokens a sequence may have at most, as far as a configuration says."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def load_tokenizer(folder: str) -> Any:
    """The tokenizer in a directory.

    Raises:
        ArtifactError: if there is none.
    """
    import transformers

    if not os.path.isdir(folder):
        raise ArtifactError(f"--tokenizer {folder}: there is no such directory")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as e:
        raise ArtifactError(
            f"{folder} has no tokenizer that can be read ({said(e)}): pass the directory of one with --tokenizer"
        ) from e


def _inner(folder: str) -> str:
    """The directory of the transformer in one of sentence-transformers; any other as it is."""
    path = os.path.join(folder, MODULES)
    if not os.path.exists(path):
        return folder
    try:
        parts = _json(folder, MODULES)
        first = next(p["path"] for p in parts if str(p["type"]).endswith(".Transformer"))
        inner = os.path.realpath(os.path.join(folder, first))
    except (OSError, StopIteration, KeyError, TypeError, ValueError) as e:
        raise ArtifactError(f"the {MODULES} of {folder} names no transformer ({said(e)}): copy the model again") from e
    if os.path.commonpath([inner, os.path.realpath(folder)]) != os.path.realpath(folder):
        raise ArtifactError(f"the {MODULES} of {folder} leads out of it, to {first!r}: copy the model again")
    return inner


def _json(folder: str, name: str) -> Any:
    return json.loads(read_regular(os.path.join(folder, name), _MOST_BYTES, "a configuration"))


def _check_weights(folder: str) -> None:
    if glob.glob(os.path.join(glob.escape(folder), "*.safetensors")):
        return
    if glob.glob(os.path.join(glob.escape(folder), "*.bin")):
        raise ArtifactError(
            f"{folder} has its weights in .bin files, which are pickles that can run code: convert a model that you trust "
            "with transformers, AutoModel.from_pretrained(old).save_pretrained(new), which writes safetensors"
        )
    raise ArtifactError(f"{folder} has no .safetensors file: copy the model again, whole")
