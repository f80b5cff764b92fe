"""Docstrings of everything public: one dialect, numpydoc, with the parameters of the signature."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import qkv
from tests.kit import numpydoc

MODULES = (qkv, qkv.nn, qkv.cache, qkv.compat, qkv.rotary)


def _names(module: ModuleType) -> list[str]:
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        n for n, x in vars(module).items() if not n.startswith("_") and getattr(x, "__module__", "") == module.__name__
    ]


def _own(kind: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that are written in qkv."""
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.startswith("qkv"):
            found |= vars(base)
    for name, x in found.items():
        if not name.startswith("_") and (inspect.isroutine(x) or isinstance(x, (property, functools.cached_property))):
            yield name, x.__func__ if isinstance(x, classmethod) else x


def _public() -> dict[str, Any]:
    """Name of everything public: the value."""
    found: dict[str, Any] = {}
    for module in MODULES:
        for name in _names(module):
            x = getattr(module, name)
            if isinstance(x, ModuleType):
                continue
            full = f"{module.__name__}.{name}"
            found[full] = x
            if isinstance(x, type):
                found |= {f"{full}.{method}": value for method, value in _own(x)}
    return found


PUBLIC = _public()


def _parameters(x: Any) -> list[str]:
    """The names of the signature, without self and without what only catches keywords that do not exist."""
    if isinstance(x, type) and (issubclass(x, (BaseException, tuple)) or x.__init__ is object.__init__):
        return []
    signature = inspect.signature(x)
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [n for n, p in signature.parameters.items() if n not in ("self", "cls") and p.kind not in kinds]


def _text(name: str, x: Any) -> str | None:
    """The docstring; a method that has none has that of the method it overrides, as in `help`."""
    if not isinstance(x, (property, functools.cached_property)):
        return inspect.getdoc(getattr(x, "__func__", x))
    owner, _, attribute = name.rpartition(".")
    found = (vars(base).get(attribute) for base in PUBLIC[owner].__mro__)
    text = next((y.__doc__ for y in found if getattr(y, "__doc__", None)), None)
    return None if text is None else inspect.cleandoc(text)


def faults_of(name: str) -> list[str]:
    x = PUBLIC[name]
    if isinstance(x, (property, functools.cached_property)):
        return numpydoc.check(_text(name, x), [], returns=False)
    returns = not isinstance(x, type) and inspect.signature(x).return_annotation not in (None, "None")
    return numpydoc.check(_text(name, x), _parameters(getattr(x, "__func__", x)), returns)


@pytest.mark.parametrize("name", list(PUBLIC))
def test_it_is_numpydoc_and_has_the_signatures_parameters(name: str) -> None:
    assert not faults_of(name), "\n".join([name, *faults_of(name)])
