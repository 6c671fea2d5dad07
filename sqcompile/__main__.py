"""The ``sqcompile`` command, also as ``python -m sqcompile``."""

from __future__ import annotations


def main() -> None:
    """The command line: see `sqcompile.cli.app`."""
    from sqcompile.cli.app import app

    app()


if __name__ == "__main__":
    main()
