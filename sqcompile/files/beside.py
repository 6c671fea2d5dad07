"""beside: what lies beside the weights of a model of transformers: tokenizer, generation config, chat template; and the
configuration of the float model, where that is another one by now."""

from __future__ import annotations

import fnmatch
import os
import shutil

# What is copied of the directory that a model was loaded from; of anything else in it, nothing is known.
COPIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.tiktoken", "*.spm",
    "spiece.model", "sentencepiece*", "chat_template*", "generation_config.json", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json", "*.py", "LICENSE*", "NOTICE*",
)  # fmt: skip
_MOST_BYTES = 2**30  # of a file that is copied
# The configuration of the float model, and its name beside weights that it does not describe: who loads those would take
# them for a float model by it.
_CONFIG, FLOAT_CONFIG = "config.json", "float_config.json"


def copy_beside(source: str, folder: str, config: bool = False) -> list[str]:
    """Copies what belongs to a model beside its weights, and gives the names; with ``config`` its configuration, too."""
    copied = []
    if config and os.path.isfile(os.path.join(source, _CONFIG)):
        shutil.copyfile(os.path.join(source, _CONFIG), os.path.join(folder, FLOAT_CONFIG))
        copied.append(FLOAT_CONFIG)
    for name in sorted(os.listdir(source)):
        path = os.path.join(source, name)
        wanted = any(fnmatch.fnmatchcase(name, pattern) for pattern in COPIED)
        if wanted and not os.path.islink(path) and os.path.isfile(path) and os.path.getsize(path) <= _MOST_BYTES:
            shutil.copyfile(path, os.path.join(folder, name))
            copied.append(name)
    return copied
