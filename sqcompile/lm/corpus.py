"""Python source text from the running interpreter's own standard library.

It needs no network and no data set. The split is by module name, so it is the same on every machine: the modules in
``HELD_OUT`` and their test files never reach training, and the modules in ``CALIBRATION`` always do.
"""

from __future__ import annotations

import functools
import sysconfig
from collections.abc import Iterable
from pathlib import Path, PurePath

# All of these exist, under these names, in CPython 3.10 to 3.14.
HELD_OUT: tuple[str, ...] = (
    "argparse.py",
    "calendar.py",
    "configparser.py",
    "dataclasses.py",
    "difflib.py",
    "fractions.py",
    "heapq.py",
    "ipaddress.py",
    "json/decoder.py",
    "logging/__init__.py",
    "shlex.py",
    "smtplib.py",
    "statistics.py",
    "subprocess.py",
    "tarfile.py",
    "textwrap.py",
    "threading.py",
)

CALIBRATION: tuple[str, ...] = (
    "ast.py",
    "asyncio/base_events.py",
    "collections/__init__.py",
    "email/message.py",
    "enum.py",
    "functools.py",
    "http/client.py",
    "optparse.py",
    "pickle.py",
    "random.py",
    "shutil.py",
    "socket.py",
    "traceback.py",
    "typing.py",
    "unittest/case.py",
    "xml/dom/minidom.py",
)

# Third-party code, old demos, and generated tables (character maps, help topics): little in them is ordinary code.
_SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "encodings",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "turtledemo",
    }
)


def _test_prefixes() -> tuple[str, ...]:
    names = {part for module in HELD_OUT for part in PurePath(module).with_suffix("").parts} - {"__init__"}
    # Helper files of held-out modules' tests that do not follow the test_<module> naming.
    return (*sorted(f"test_{name}" for name in names), "dataclass_", "subprocessdata")


_TEST_PREFIXES = _test_prefixes()


def is_held_out(path: PurePath) -> bool:
    """Whether ``path``, relative to the standard library, is a held-out module or belongs to the tests of one."""
    return path.as_posix() in HELD_OUT or any(part.startswith(_TEST_PREFIXES) for part in path.parts)


def stdlib_root() -> Path:
    """The folder with the standard library's ``.py`` files.

    Raises:
        FileNotFoundError: the interpreter has no sources on disk, as with a zipped or bytecode-only library.
    """
    root = Path(sysconfig.get_path("stdlib"))
    missing = [name for name in HELD_OUT if not (root / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"standard library sources not found: {root} lacks {', '.join(missing)}. The corpus needs an interpreter "
            "whose library is a folder of .py files (not a zip archive, and not compiled files only)."
        )
    return root


@functools.lru_cache(maxsize=1)
def training_files() -> tuple[PurePath, ...]:
    """Paths of all training files, relative to :func:`stdlib_root`, sorted; none of them is held out.

    Raises:
        FileNotFoundError: see :func:`stdlib_root`.
    """
    root = stdlib_root()
    files = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        # _sysconfigdata_* records the build machine's own paths and flags.
        if _SKIPPED_FOLDERS.intersection(relative.parts) or relative.name.startswith("_sysconfigdata"):
            continue
        if not is_held_out(relative):
            files.append(relative)
    return tuple(sorted(files, key=lambda file: file.as_posix()))


def read_texts(files: Iterable[PurePath | str]) -> list[str]:
    """Contents of ``files`` (relative to :func:`stdlib_root`), leaving out those that are missing, empty or not UTF-8.

    Raises:
        FileNotFoundError: see :func:`stdlib_root`.
    """
    root = stdlib_root()
    texts = []
    for file in files:
        try:
            text = (root / file).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):
            # The library tests its own decoding with deliberately broken files, and modules move between versions.
            continue
        if text.strip():
            texts.append(text)
    return texts


def calibration_texts() -> list[str]:
    """Texts of the ``CALIBRATION`` modules: part of the training data, for observing activations.

    Raises:
        FileNotFoundError: see :func:`stdlib_root`.
    """
    return read_texts(CALIBRATION)


def evaluation_texts() -> list[str]:
    """Texts of the ``HELD_OUT`` modules, which the shipped model has not seen, in the order of that tuple.

    Raises:
        FileNotFoundError: see :func:`stdlib_root`.
    """
    return read_texts(HELD_OUT)
