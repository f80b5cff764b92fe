"""qkv: exact attention for PyTorch, with one function and one mask algebra.

>>> import torch, qkv
>>> q = k = v = torch.randn(1, 8, 32, 64)
>>> qkv.attention(q, k, v, mask=qkv.causal()).shape
torch.Size([1, 8, 32, 64])
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qkv import _torch  # noqa: F401  first: it says which torch is needed, before anything fails for want of it
from qkv.errors import (
    ArgumentError,
    ArgumentTypeError,
    PagesExhausted,
    QKVError,
    ShapeError,
    UnsupportedError,
    VersionError,
)
from qkv.functional import attention, weights
from qkv.masks import (
    Mask,
    bigbird,
    blocks,
    causal,
    chunked,
    dense,
    dilated,
    documents,
    global_tokens,
    longformer,
    mask_mod,
    padding,
    per_head,
    prefix,
    random_blocks,
    sliding_window,
    strided,
    window,
)
from qkv.merging import merge
from qkv.plans import plan
from qkv.scores import alibi, relative, score_mod

if TYPE_CHECKING:  # what `__getattr__` below gives, so that type checkers and editors know it
    from qkv import cache as cache
    from qkv import compat as compat
    from qkv import insight as insight
    from qkv import integrations as integrations
    from qkv import nn as nn
    from qkv import rotary as rotary
    from qkv.insight.why import why as why

__version__ = "0.1.0"

# Sub-packages and functions that are not needed to compute attention load on first use.
_LAZY = {
    "why": ("qkv.insight.why", "why"),
    "cache": ("qkv.cache", None),
    "nn": ("qkv.nn", None),
    "rotary": ("qkv.rotary", None),
    "compat": ("qkv.compat", None),
    "integrations": ("qkv.integrations", None),
    "insight": ("qkv.insight", None),
}

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "Mask",
    "PagesExhausted",
    "QKVError",
    "ShapeError",
    "UnsupportedError",
    "VersionError",
    "alibi",
    "attention",
    "bigbird",
    "blocks",
    "cache",
    "causal",
    "chunked",
    "compat",
    "dense",
    "dilated",
    "documents",
    "global_tokens",
    "longformer",
    "mask_mod",
    "merge",
    "nn",
    "padding",
    "per_head",
    "plan",
    "prefix",
    "random_blocks",
    "relative",
    "rotary",
    "score_mod",
    "sliding_window",
    "strided",
    "weights",
    "why",
    "window",
]


if not TYPE_CHECKING:  # a checker that saw it would take every misspelt name for Any

    def __getattr__(name: str) -> Any:
        if name in _LAZY:
            module, attribute = _LAZY[name]
            value = import_module(module)
            if attribute is not None:
                value = getattr(value, attribute)
            globals()[name] = value
            return value
        raise AttributeError(f"module 'qkv' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_LAZY, "__version__"})
