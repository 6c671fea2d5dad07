"""The messages of the troubleshooting page are those of the sources, word by word."""

from __future__ import annotations

import re

import pytest
from pages import ROOT
from sources import said

MESSAGES = re.findall(r"^### `(.+)`$", (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), re.M)


def test_there_are_the_likeliest_thirty():
    assert len(MESSAGES) >= 30 and len(set(MESSAGES)) == len(MESSAGES)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_in_the_sources(message):
    assert said(message)


def test_other_words_are_not():
    assert not said("the model is in training mood (… at …): call model.eval() first")
    assert not said("call model.eval() first … the model is in training mode")
