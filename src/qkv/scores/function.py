"""A Python function as a score term."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from qkv.checks import short
from qkv.errors import ArgumentTypeError, QKVError, ShapeError, from_function
from qkv.masks import Tile
from qkv.scores.base import ScoreTerm


class ScoreMod(ScoreTerm):
    """s becomes fn(s, b, h, p, j)."""

    __slots__ = ("_fn",)
    kind = "score_mod"

    def __init__(self, fn: Callable[..., Tensor]) -> None:
        self._fn = fn

    def cut(self, rows: slice, keys: slice) -> ScoreTerm:
        fn, first = self._fn, keys.start

        @wraps(fn)
        def moved(s: Tensor, b: Tensor, h: Tensor, p: Tensor, j: Tensor) -> Tensor:
            return fn(s, b, h, p + first, j + first)

        return ScoreMod(moved) if first else self

    def of_heads(self, heads: slice) -> ScoreTerm:
        fn, first = self._fn, heads.start

        @wraps(fn)
        def moved(s: Tensor, b: Tensor, h: Tensor, p: Tensor, j: Tensor) -> Tensor:
            return fn(s, b, h + first, p, j)

        return ScoreMod(moved) if first else self

    def apply(self, s: Tensor, at: Tile) -> Tensor:
        """The replaced scores, in the dtype and shape of s."""
        call = "qkv.score_mod(fn)"
        try:
            result = self._fn(s, at.b, at.h, at.p, at.j)
        except (QKVError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise from_function(repr(self), "fn(s, b, h, p, j)", error) from error
        if not isinstance(result, Tensor) or not result.is_floating_point():
            got = f"{short(result.dtype)} tensor" if isinstance(result, Tensor) else type(result).__name__
            rule = "fn must return the scores as a floating tensor"
            raise ArgumentTypeError.of(call, rule, got, "Return s or a function of it")
        try:
            return result.to(s.dtype).expand(s.shape)
        except RuntimeError:
            got = f"{tuple(result.shape)} for scores {tuple(s.shape)}"
            rule = "fn must return one score an element"
            raise ShapeError.of(call, rule, got, "Use elementwise operations") from None

    def __repr__(self) -> str:
        return f"score_mod({getattr(self._fn, '__name__', 'fn')})"


def score_mod(fn: Callable[..., Tensor]) -> ScoreTerm:
    """Replace each score by ``fn(s, b, h, p, j)``, after softcap and before the mask.

    Parameters
    ----------
    fn : callable
        Takes the scores s (floating) and int64 tensors b, h (query head), p (query position), j (key position), all
        broadcastable 4-D tiles; returns scores of s's shape by elementwise operations. Differentiated with respect to
        s only.

    Returns
    -------
    ScoreTerm
        A value for `bias=`; terms apply from left to right.

    Raises
    ------
    ArgumentTypeError
        fn is not callable, or returns something else than scores.

    Notes
    -----
    Cost: fn runs once a tile of scores in plain PyTorch (backend "tiled"). Source: FlexAttention (Dong et al. 2024).

    Examples
    --------
    >>> import torch, qkv
    >>> q = k = v = torch.zeros(1, 1, 3, 2)
    >>> near = qkv.score_mod(lambda s, b, h, p, j: s - (p - j) ** 2)
    >>> qkv.weights(q, k, bias=near)[0, 0].argmax(-1)
    tensor([0, 1, 2])
    """
    if not callable(fn):
        rule = "fn must be callable"
        raise ArgumentTypeError.of("qkv.score_mod()", rule, type(fn).__name__, "Give fn(s, b, h, p, j)")
    return ScoreMod(fn)
