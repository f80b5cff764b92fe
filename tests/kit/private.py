"""Every reach of the tests into private state of qkv: what it keeps of calls, and the backends and kernels it loads.

A change of where qkv keeps these is a change of this file alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from qkv import execute, plans
from qkv.backends import registry
from qkv.backends.base import PreparedView
from qkv.execute import Remembered

CPU = importlib.import_module("qkv.backends.cpu")


def ready() -> Remembered:
    """Everything that is kept of calls between calls: those that are prepared, on tensors and on views."""
    return execute.PREPARED


def ready_views() -> list[Any]:
    """The prepared calls on views."""
    return [kept.value for kept in execute.PREPARED.values() if isinstance(kept.value, PreparedView)]


def forget() -> None:
    """Forget every prepared call, as in a new process."""
    execute.PREPARED.clear()


def use_backend(monkeypatch: pytest.MonkeyPatch, name: str, backend: Any) -> None:
    """Let `backend` answer for `name` until the test ends; an exception is raised instead. Nothing planned is kept.

    The test needs the fixture `nothing_kept`, so that the plans made with it are forgotten as well.
    """
    real = registry.load

    def load(asked: str) -> Any:
        if asked.partition(":")[0] != name:
            return real(asked)
        if isinstance(backend, Exception):
            raise backend
        return backend

    monkeypatch.setattr(registry, "load", load)
    forget()


def warn_again(monkeypatch: pytest.MonkeyPatch, *, never: bool = False) -> None:
    """As in a new process, say once more that there is no native extension; or never."""
    monkeypatch.setattr(plans, "_warned", never)


def count_plans(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list that grows by one with each call on tensors that is planned."""
    made: list[Any] = []
    real = execute.choose
    monkeypatch.setattr(execute, "choose", lambda *given, **more: made.append(given) or real(*given, **more))
    return made


@contextmanager
def native_kernels(module: Any) -> Iterator[None]:
    """Let the "cpu" backends run another build of the kernels. What was prepared with the old one is forgotten."""

    def swap(find: Any) -> None:
        CPU._module = find
        forget()
        registry.load.cache_clear()

    shipped = CPU._module
    try:
        swap(lambda: module)
        yield
    finally:
        swap(shipped)
