"""A mask as a sentence."""

from __future__ import annotations

from qkv.masks import Mask


def in_words(mask: Mask | None) -> str:
    """Say which keys a query may attend to.

    >>> import qkv
    >>> in_words(qkv.sliding_window(256))
    'a query sees the last 256 keys up to itself'
    >>> in_words(None)
    'a query sees every key'
    """
    return f"a query sees {'every key' if mask is None else mask.words()}"
