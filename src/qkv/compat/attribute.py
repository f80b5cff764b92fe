"""The attribute `torch.nn.functional.scaled_dot_product_attention`: the one place that assigns it and gives it back."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.backends.mha
from torch import Tensor

import qkv.backends.sdpa  # noqa: F401  it binds PyTorch's function when it loads: that must be before any patch of ours
from qkv._torch import builtin_sdpa

# The builtin itself and not the attribute: that one may be patched, by us or by others.
torch_sdpa = builtin_sdpa


class _Level:
    """One assignment of ours: what was there before, and how many blocks rely on it."""

    def __init__(self, before: Any) -> None:
        self.before, self.fast_path, self.users = before, torch.backends.mha.get_fastpath_enabled(), 1


_levels: list[_Level] = []
_lock = threading.Lock()
_aside = 0  # how many calls need the attribute to be PyTorch's, right now
_owed = False  # whether it becomes ours when the last of them is through


def put(ours: Callable[..., Tensor]) -> None:
    """Make the attribute ours, and close the fast path of PyTorch's layers, which never looks at it."""
    global _owed
    with _lock:
        found = ours if _owed else torch.nn.functional.scaled_dot_product_attention
        if _levels and found is ours:
            _levels[-1].users += 1
            return
        _levels.append(_Level(found))
        torch.backends.mha.set_fastpath_enabled(False)
        if _aside:
            _owed = True
        else:
            torch.nn.functional.scaled_dot_product_attention = ours  # type: ignore[assignment]


def take_back(ours: Callable[..., Tensor]) -> None:
    """Leave a block: the last one to leave a level restores what was there before it."""
    global _owed
    with _lock:
        level = _levels[-1]
        level.users -= 1
        if level.users:
            return
        _levels.pop()
        # What someone else assigned or switched on inside of the block is not ours to undo.
        if _owed or torch.nn.functional.scaled_dot_product_attention is ours:
            _owed = False
            torch.nn.functional.scaled_dot_product_attention = level.before
        if not torch.backends.mha.get_fastpath_enabled():
            torch.backends.mha.set_fastpath_enabled(level.fast_path)


@contextlib.contextmanager
def aside(ours: Callable[..., Tensor]) -> Iterator[None]:
    """While it lasts, the attribute is PyTorch's function where it was ours.

    A class with `__torch_function__` is told which function was called, and may compare it with the attribute. Other
    threads run PyTorch's function meanwhile: slower, and right.
    """
    global _aside, _owed
    with _lock:
        _aside += 1
        if torch.nn.functional.scaled_dot_product_attention is ours:
            _owed = True
            torch.nn.functional.scaled_dot_product_attention = torch_sdpa
    try:
        yield
    finally:
        with _lock:
            _aside -= 1
            if _owed and not _aside:
                _owed = False
                if torch.nn.functional.scaled_dot_product_attention is torch_sdpa:
                    torch.nn.functional.scaled_dot_product_attention = ours  # type: ignore[assignment]
