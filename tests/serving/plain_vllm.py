"""vLLM's command line, run by the Python of its environment, with the same INT8 kernel on every processor.

    plain_vllm.py serve DIRECTORY ...

Where there is AMX, vLLM 0.32 takes another kernel, which wants bfloat16 activations and leaves static scales unread. What a
checkpoint says is compared in float32, so that kernel is turned off here. Processes that vLLM spawns run this file, too.
"""

from __future__ import annotations

import torch

torch.cpu._is_amx_tile_supported = lambda: False

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main  # of the environment that runs this

    main()
