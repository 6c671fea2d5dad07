"""version: the package's own, for pyproject.toml and for what is written into files, installed or not."""

VERSION = "0.1.0"
