"""Who is told of the calls that are made: `qkv.watch`, while it watches a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qkv.call.problem import Options

Watcher = Callable[[str, Any, Any, Any, Any, Options, Any], None]
"""Called with how the call was made, and with q, k (or a view), v, mask, options and backend as they were given."""

WATCHERS: list[Watcher] = []
"""Empty: a call asks no more than that."""


def tell(via: str, q: Any, k: Any, v: Any, mask: Any, options: Options, backend: Any) -> None:
    """Tell all of one call, before it is computed. A watcher raises nothing and changes nothing."""
    for watcher in tuple(WATCHERS):
        watcher(via, q, k, v, mask, options, backend)
