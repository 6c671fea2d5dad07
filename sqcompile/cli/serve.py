"""serve: how a directory is served. sqcompile serves nothing itself: vLLM does."""

from __future__ import annotations

import json
import os
import shlex

from sqcompile.checkpoints.float_model import class_of, config_of, is_causal
from sqcompile.cli.saved import is_int8
from sqcompile.cli.terminal import CommandError, Terminal
from sqcompile.files.directory import MANIFEST, SHARDED


def serve(folder: str, port: int, terminal: Terminal) -> None:
    """Prints the command that serves a directory.

    Raises:
        CommandError: if none does, with what to do.
    """
    int8 = is_int8(folder)
    if os.path.lexists(os.path.join(folder, SHARDED)):
        raise CommandError(
            f"{folder} has shards of a model in sqcompile's own format, which vLLM does not read: write the whole model, "
            "sqcompile quantize MODEL_DIR --format compressed-tensors -o OUT"
        )
    if os.path.lexists(os.path.join(folder, MANIFEST)):
        raise CommandError(
            f"{folder} is sqcompile's own format, which vLLM does not read: write another one, sqcompile quantize MODEL_DIR "
            f"--plan {shlex.quote(os.path.join(folder, 'plan.safetensors'))} --format compressed-tensors -o OUT"
        )
    config = config_of(folder)
    architecture, written = class_of(config)
    if architecture is not None and not is_causal(architecture, config):
        raise CommandError(
            f"{written} is no causal language model, which is what this command knows to serve: vLLM's documentation says which "
            "others it serves, and how"
        )
    name = os.path.basename(os.path.realpath(folder))
    line = f"vllm serve {shlex.quote(os.path.realpath(folder))} --served-model-name {shlex.quote(name)} --port {port}"
    kind = "quantized weights" if int8 else "float weights"
    body = shlex.quote(json.dumps({"model": name, "prompt": "def ", "max_tokens": 32}))
    ask = f"curl http://localhost:{port}/v1/completions -H 'Content-Type: application/json' -d {body}"
    terminal.result({"command": line, "weights": kind, "request": ask}, f"{line}\n\n# {kind}; a request:\n{ask}")
