"""Being told of a model's forward passes, and of no other module's; copies and pickles of the model are not watched."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_compiling = torch.compiler.is_dynamo_compiling


def _nothing(*_: Any) -> None:
    """What a hook of a watched model becomes in a copy."""


class _Hook:
    """A hook that calls a function for one module; a copy of it, or one read from a pickle, does nothing."""

    def __init__(self, model: nn.Module, tell: Callable[[], None]) -> None:
        self.model, self.tell = model, tell

    def __call__(self, module: nn.Module, *_: Any) -> None:
        if not _compiling() and module is self.model:
            self.tell()

    def __reduce__(self) -> Any:
        return functools.partial, (_nothing,)


def told(model: nn.Module, before: Callable[[], None], after: Callable[[], None]) -> Callable[[], None]:
    """Have both called around the model's forward, `after` also when it raises; returns how to undo it."""
    if isinstance(model, nn.TransformerEncoderLayer):  # a hook of its own would close its fast path
        _Around.enter(model, before, after)
        return lambda: _Around.leave(model, before)
    hooks = [
        model.register_forward_pre_hook(_Hook(model, before), prepend=True),
        model.register_forward_hook(_Hook(model, after), always_call=True),
    ]

    def undo() -> None:
        for hook in hooks:
            hook.remove()

    return undo


class _Around:
    """The forward of a class of modules, with calls around that of some modules: one for all who ask."""

    _known: dict[type[nn.Module], _Around] = {}  # noqa: RUF012  of the process
    _lock = threading.Lock()

    def __init__(self, kind: type[nn.Module]) -> None:
        self.kind, self.forward, self.own = kind, kind.forward, "forward" in vars(kind)
        self.told: tuple[tuple[nn.Module, Callable[[], None], Callable[[], None]], ...] = ()

        @functools.wraps(self.forward)
        def forward(module: nn.Module, *args: Any, **options: Any) -> Any:
            mine = () if _compiling() else tuple(one for one in self.told if one[0] is module)
            for _, before, _ in mine:
                before()
            try:
                return self.forward(module, *args, **options)
            finally:
                for _, _, after in reversed(mine):
                    after()

        self.ours = forward
        kind.forward = forward  # type: ignore[method-assign]

    @classmethod
    def enter(cls, model: nn.Module, before: Callable[[], None], after: Callable[[], None]) -> None:
        with cls._lock:
            if type(model) not in cls._known:
                cls._known[type(model)] = cls(type(model))
            around = cls._known[type(model)]
            around.told = (*around.told, (model, before, after))

    @classmethod
    def leave(cls, model: nn.Module, before: Callable[[], None]) -> None:
        with cls._lock:
            around = cls._known[type(model)]
            around.told = tuple(one for one in around.told if one[1] != before)
            if around.told:
                return
            del cls._known[type(model)]
            if vars(around.kind).get("forward") is around.ours:
                if around.own:
                    around.kind.forward = around.forward  # type: ignore[method-assign]
                else:
                    del around.kind.forward
