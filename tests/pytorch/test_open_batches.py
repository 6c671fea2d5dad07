"""open_batches: PyTorch's own function is back afterwards, whoever else compiles meanwhile."""

from __future__ import annotations

import threading

import pytest
import torch

from sqcompile.pytorch.inductor import open_batches


def test_threads_and_errors_leave_pytorch_as_it_was():
    before, inside, errors = torch._C._select_conv_backend, threading.Barrier(2), []

    def other():
        inside.wait()
        with open_batches():
            if torch._C._select_conv_backend is before:
                errors.append("not in place")

    thread = threading.Thread(target=other)
    with pytest.raises(ZeroDivisionError), open_batches(), open_batches():
        thread.start()
        inside.wait()  # the other one begins before this one ends
        raise ZeroDivisionError
    thread.join()
    assert not errors and torch._C._select_conv_backend is before
