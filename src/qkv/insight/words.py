"""A mask in words: the sentence that its expression stands for."""

from __future__ import annotations

from typing import Any

from qkv.masks import Mask
from qkv.masks.base import And, Dense, Not, Or


def in_words(mask: Mask | None) -> str:
    """Say which keys a query may attend to.

    >>> import qkv
    >>> in_words(qkv.causal() & (qkv.prefix(4) | qkv.sliding_window(256)))
    'a query sees itself and the keys before it, and of those only the first 4 keys or the last 256 keys up to itself'
    >>> in_words(None)
    'a query sees every key'
    """
    if mask is None:
        return "a query sees every key"
    if isinstance(mask, And):
        return f"a query sees {', and of those only '.join(_phrase(part) for part in mask.parts)}"
    return f"a query sees {_phrase(mask)}"


def _phrase(mask: Any) -> str:
    if isinstance(mask, And):
        return " that are also ".join(_phrase(part) for part in mask.parts)
    if isinstance(mask, Or):
        return " or ".join(_phrase(part) for part in mask.parts)
    if isinstance(mask, Not):
        return f"every key but {_phrase(mask.part)}"
    if isinstance(mask, Dense):
        return f"the keys that a tensor {tuple(mask.t.shape)} allows"
    found = _PHRASES.get(type(mask).__name__)
    return repr(mask) if found is None else found(mask)


def _window(mask: Any) -> str:
    if mask.left is None and mask.right == 0:
        return "itself and the keys before it"
    if mask.right == 0:
        return f"the last {mask.left + 1:,} keys up to itself" if mask.left else "itself alone"
    before = "all keys before" if mask.left is None else f"{mask.left:,} before"
    after = "all keys after" if mask.right is None else f"{mask.right:,} after"
    return f"{before} to {after} its own position"


def _prefix(mask: Any) -> str:
    return f"the first {mask.n:,} keys" if isinstance(mask.n, int) else "the first keys, a number for each batch row"


_PHRASES: dict[str, Any] = {
    "Window": _window,
    "Prefix": _prefix,
    "Padding": lambda mask: "the real keys of its batch row, no padding",
    "Documents": lambda mask: "the keys of its own document",
    "Chunked": lambda mask: f"the keys of its own chunk of {mask.n:,}",
    "Strided": lambda mask: f"every {_ordinal(mask.n)} key, counted from itself",
    "Dilated": lambda mask: f"every {_ordinal(mask.step)} key within {mask.window * mask.step:,} of itself",
    "GlobalTokens": lambda mask: "the global tokens, which see every key in turn",
    "RandomBlocks": lambda mask: "a few blocks of keys drawn at random",
    "Blocks": lambda mask: "the blocks of keys that a map allows",
    "PerHead": lambda mask: "what its head's own mask allows",
    "MaskMod": lambda mask: "the keys that a function allows",
    "Everything": lambda mask: "every key",
}


def _ordinal(n: int) -> str:
    ending = "th" if n % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n:,}{ending}"
