"""A call is bound as Python binds it, whichever call of its form came before."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import sqcompile
from sqcompile.capture.inputs import Forward


def as_python_binds(forward, args, kwargs):
    """What each name stands for, by `inspect`, and what ``*args`` holds."""
    bound = forward.signature.bind(*args, **kwargs).arguments
    kinds = {n: p.kind.name for n, p in forward.signature.parameters.items()}
    named = {n: v for n, v in bound.items() if not kinds[n].startswith("VAR_")}
    for n, v in bound.items():
        named |= v if kinds[n] == "VAR_KEYWORD" else {}
    return named, next((v for n, v in bound.items() if kinds[n] == "VAR_POSITIONAL"), ())


@pytest.mark.parametrize(
    "forward", [lambda a, b, c=None: a, lambda a, *rest, d=None: a, lambda a, /, b=1, *, d=None, **more: a], ids="012"
)
def test_calls_of_one_form_are_bound_alike(forward):
    """How a call of so many arguments and these keywords is bound is looked up once; its values are its own."""
    module = nn.Module()
    module.forward = forward
    of = Forward.of(module)
    for turn in range(2):
        for count, keywords in itertools.product(range(4), ([], ["b"], ["d"], ["d", "b"], ["e", "c"], ["a"])):
            args, kwargs = [10 * turn + i for i in range(count)], {k: f"{k}{turn}" for k in keywords}
            try:
                named, rest = as_python_binds(of, args, kwargs)
            except TypeError as e:
                with pytest.raises(TypeError) as found:
                    of.bind(tuple(args), kwargs)
                assert str(found.value) == str(e)
                continue
            call = of.bind(tuple(args), kwargs)
            said = {n: v for n, v in named.items() if not (type(v) is int and v == of.implied.get(n))}
            if rest:
                assert call.args == tuple(args) and call.positional == () and call.kwargs == kwargs
            else:
                assert (call.args, call.kwargs) == ((), said) and list(call.kwargs) == list(said)
                assert call.positional == tuple(named)[:count]


def test_a_pair_is_not_two_arguments():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, *x):
            return self.fc(x[0][0] + x[0][1])

    x = torch.randn(3, 16)
    net = sqcompile.compile(Pair().eval(), [((x, x),)], backend="eager", progress=False)
    assert net((x, x)).shape == (3, 16)
    with pytest.raises(sqcompile.CaptureError):
        net(x, x)
