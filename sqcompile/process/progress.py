"""progress: which stage of the pipeline runs, for those who wait for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from tqdm import tqdm

Enter = Callable[[str], None]


def silent(stage: str) -> None:
    """Shows nothing."""


@contextlib.contextmanager
def stages(names: Sequence[str], show: bool) -> Iterator[Enter]:
    """A bar over stages; what it yields is called with the name of each as it begins. Nothing where not ``show``."""
    with tqdm(total=len(names), unit="stage", disable=not show) as bar:

        def enter(stage: str) -> None:
            bar.update(names.index(stage) - bar.n)
            bar.set_description(stage)

        yield enter
        bar.update(len(names) - bar.n)
        bar.set_description({"emit": "compiled", "plan": "planned", "calibrate": "measured"}.get(names[-1], "compared"))
