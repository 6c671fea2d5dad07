"""methods: ``torch.compile(model).generate(...)`` calls the compiled model.

``torch.compile`` gives a module that stands before the model. Other methods than ``forward`` are the model's own, and
what they call is the model itself, not the compiled one: ``generate`` would run in float. While such a method runs, the
model's calls go to the compiled code, as after ``model.compile()``.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

from sqcompile.pytorch.core import WeakIdKeyDictionary, call_impl, compiled_call, set_compiled_call
from sqcompile.pytorch.dynamo import OptimizedModule, backend_of, compiled_form, original


def follow_methods(backend: Callable[..., Any]) -> None:
    """Makes methods of modules compiled by a backend call the compiled code. For other backends nothing changes."""
    before = OptimizedModule.__getattr__

    @functools.wraps(before)
    def getattr_(self: OptimizedModule, name: str) -> Any:
        found = before(self, name)
        model = original(self)
        is_method = isinstance(found, types.MethodType) and found.__self__ is model and not name.startswith("_")
        if not is_method or backend_of(self) is not backend:
            return found

        return _within(found, lambda: _calls(model, self))

    OptimizedModule.__getattr__ = getattr_  # type: ignore[method-assign]


def _within(found: Callable[..., Any], context: Callable[[], Any]) -> Callable[..., Any]:
    """The method with its body, of whatever kind, run in a context; a generator leaves it while it is suspended."""
    if inspect.isgeneratorfunction(found):

        @functools.wraps(found)
        def method(*args: Any, **kwargs: Any) -> Any:
            running, sent = found(*args, **kwargs), None
            try:
                while True:
                    with context():
                        try:
                            item = running.send(sent)
                        except StopIteration as e:
                            return e.value
                    sent = yield item
            finally:
                running.close()

    elif inspect.isasyncgenfunction(found):

        @functools.wraps(found)
        async def method(*args: Any, **kwargs: Any) -> Any:
            running = found(*args, **kwargs)
            try:
                while True:
                    with context():
                        try:
                            item = await anext(running)
                        except StopAsyncIteration:
                            return
                    yield item
            finally:
                await running.aclose()

    elif inspect.iscoroutinefunction(found):

        @functools.wraps(found)
        async def method(*args: Any, **kwargs: Any) -> Any:
            with context():
                return await found(*args, **kwargs)

    else:

        @functools.wraps(found)
        def method(*args: Any, **kwargs: Any) -> Any:
            with context():
                return found(*args, **kwargs)

    return method


_running: Any = WeakIdKeyDictionary()  # of a model: how many methods run, and how the model was called before the first
_lock = threading.Lock()


@contextlib.contextmanager
def _calls(model: Any, compiled: OptimizedModule) -> Iterator[None]:
    """While this lasts, calls of the model run the compiled code, and transformers compiles nothing on top of it.

    Threads may be in several methods of one model: the first to enter puts the compiled code in, the last takes it out.
    """
    own = {"get_compiled_call": lambda config: model.__call__} if hasattr(model, "get_compiled_call") else {}
    with _lock:
        count, before = _running.get(model, (0, compiled_call(model)))
        _running[model] = count + 1, before
        set_compiled_call(model, compiled_form(compiled, call_impl.__get__(model)))
        model.__dict__.update(own)
    try:
        yield
    finally:
        with _lock:
            count, before = _running.pop(model)
            if count > 1:
                _running[model] = count - 1, before
            else:
                set_compiled_call(model, before)
                for name in own:
                    model.__dict__.pop(name, None)
