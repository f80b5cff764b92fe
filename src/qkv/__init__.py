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
    ArgumentError as ArgumentError,
    ArgumentTypeError as ArgumentTypeError,
    PagesExhausted as PagesExhausted,
    QKVError as QKVError,
    RankError as RankError,
    ShapeError as ShapeError,
    UnsupportedError as UnsupportedError,
    VersionError as VersionError,
)
from qkv.functional import attention as attention
from qkv.masks import Mask as Mask, constructors as _constructors
from qkv.masks.constructors import *
from qkv.merging import merge as merge
from qkv.plans import plan as plan
from qkv.probabilities import weights as weights
from qkv.scores import alibi as alibi, relative as relative, score_mod as score_mod

if TYPE_CHECKING:  # what `__getattr__` below gives, so that type checkers and editors know it
    from qkv import (
        cache as cache,
        compat as compat,
        distributed as distributed,
        insight as insight,
        integrations as integrations,
        nn as nn,
        rotary as rotary,
    )
    from qkv.indexing import index_scores as index_scores, select_tokens as select_tokens
    from qkv.insight.see import see as see
    from qkv.insight.watch import watch as watch
    from qkv.insight.why import why as why
    from qkv.nn.nsa import native_sparse_attention as native_sparse_attention
    from qkv.selection import Summaries as Summaries, block_summaries as block_summaries, select_blocks as select_blocks

__version__ = "0.1.0"

# Sub-packages and functions that are not needed to compute attention load on first use.
_LAZY = {
    "watch": ("qkv.insight.watch", "watch"),
    "see": ("qkv.insight.see", "see"),
    "why": ("qkv.insight.why", "why"),
    "index_scores": ("qkv.indexing", "index_scores"),
    "select_tokens": ("qkv.indexing", "select_tokens"),
    "select_blocks": ("qkv.selection", "select_blocks"),
    "block_summaries": ("qkv.selection", "block_summaries"),
    "Summaries": ("qkv.selection", "Summaries"),
    "native_sparse_attention": ("qkv.nn.nsa", "native_sparse_attention"),
    "cache": ("qkv.cache", None),
    "nn": ("qkv.nn", None),
    "rotary": ("qkv.rotary", None),
    "compat": ("qkv.compat", None),
    "distributed": ("qkv.distributed", None),
    "integrations": ("qkv.integrations", None),
    "insight": ("qkv.insight", None),
}

if not TYPE_CHECKING:  # a checker takes what is written "as" above, and would take every misspelt name for Any
    __all__ = [
        *("ArgumentError", "ArgumentTypeError", "PagesExhausted", "QKVError", "RankError", "ShapeError"),
        "UnsupportedError",
        *(
            "VersionError",
            "Mask",
            "alibi",
            "attention",
            "cache",
            "compat",
            "distributed",
            "integrations",
            "merge",
            "nn",
            "plan",
        ),
        *(
            "native_sparse_attention",
            "relative",
            "rotary",
            "index_scores",
            "score_mod",
            "select_blocks",
            "block_summaries",
            "Summaries",
            "see",
            "select_tokens",
            "weights",
            "watch",
            "why",
            *(name for name in vars(_constructors) if not name.startswith("_")),
        ),
    ]
    __all__.sort()

    def __getattr__(name: str) -> Any:
        if name in _LAZY:
            module, attribute = _LAZY[name]
            value = import_module(module)
            if attribute is not None:
                value = getattr(value, attribute)
            globals()[name] = value
            return value
        raise AttributeError(f"module 'qkv' has no attribute {name!r}")

    def __dir__() -> list[str]:  # what a user may use; insight holds what `why` is made of
        return [*__all__, "__version__"]
