"""Which watched models are at work in this thread, and which of their modules a call belongs to.

Modules get no hooks: PyTorch's fused layers take another path, with other bits, where a module has one, and compiled
ones are compiled again. Who called is read from Python's own stack, in steps that are looked at and in no others.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch

from qkv._torch import transformed
from qkv.call.problem import Options
from qkv.insight.watch.calls import Call, Unseen

_MODULE = torch.nn.Module.__call__.__code__


class Step(Protocol):
    """One forward pass of a watched model, while its calls are looked at."""

    def met(self, via: str, make: Callable[[], Call], modules: list[Any]) -> None:
        """A call was made, by the first of these modules that the model has. Raises nothing."""


class _Here(threading.local):
    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.inside = 0  # of how many functions that have been noted, and whose parts are not to be
        self.told: tuple[int, int] | None = None  # a call that is also a node of a graph is met twice


HERE = _Here()


def met(via: str, make: Callable[[], Call]) -> None:
    """Hand a call to all steps of this thread; `make` says which call of `qkv.attention` it is."""
    modules = callers()
    HERE.inside += 1  # what looking computes is no call of the model's
    try:
        for step in tuple(HERE.steps):
            step.met(via, make, modules)
    finally:
        HERE.inside -= 1


def watcher(via: str, q: Any, k: Any, v: Any, mask: Any, options: Options, backend: Any) -> None:
    """What qkv tells of its calls, eager ones and nodes of a graph."""
    if not HERE.steps or HERE.inside:
        return
    node = via.startswith("torch.ops.")
    try:
        mark = (q.data_ptr(), q._version if not q.is_inference() else 0)
        followed = transformed(q)
    except (AttributeError, RuntimeError):
        mark, followed = None, True
    if node and mark is not None and HERE.told == mark:
        HERE.told = None
        return
    HERE.told = None if node else mark
    if followed:
        met(via, _followed)
    else:
        met(via, lambda: Call(via, q, k, v, mask, options, backend))


def _followed() -> Call:
    raise Unseen("torch.func or a tracer follows its tensors")


def callers() -> list[Any]:
    """The modules whose calls are under way, the innermost first, up to the outermost model that is watched."""
    found: list[Any] = []
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _MODULE:
            module = frame.f_locals.get("self")
            if module is not None:
                found.append(module)
        frame = frame.f_back  # type: ignore[assignment]
    return found
