"""What tests of the page share: the scripts of vega take seconds to be put together, and only a browser needs them."""

from __future__ import annotations

import pytest

from sqcompile.page import html


@pytest.fixture(scope="module")
def without_vega():
    """Pages without the scripts of vega."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html, "_bundle", lambda module: "no vega")
        yield
