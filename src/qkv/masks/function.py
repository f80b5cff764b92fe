"""A Python function as a mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from qkv.checks import shown
from qkv.errors import ArgumentTypeError, QKVError, ShapeError, from_function
from qkv.masks.base import Mask
from qkv.masks.program import Builder
from qkv.masks.rule import Rule
from qkv.masks.tile import Sizes, Tile

__all__ = ["mask_mod"]


@dataclass(frozen=True, eq=False, repr=False)
class MaskMod(Mask):
    """A Python function as a mask; made by `mask_mod`."""

    fn: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

    depends_on_position = True
    varies_by_batch = True
    varies_by_head = True

    def words(self) -> str:
        return "the keys that a function allows"

    def visible(self, at: Tile, sizes: Sizes) -> Tensor:
        call, b, h, p, j = repr(self), at.b, at.h, at.p, at.j
        try:
            seen = self.fn(b, h, p, j)
        except (QKVError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise from_function(call, "fn(b, h, p, j)", error) from error
        if not isinstance(seen, Tensor) or seen.dtype != torch.bool:
            fix = "Return a comparison of its arguments, e.g. j <= p"
            raise ArgumentTypeError.of(call, "the function must return a bool tensor", shown(seen), fix)
        shape = torch.broadcast_shapes(b.shape, h.shape, p.shape, j.shape)
        if seen.ndim > len(shape) or any(
            n not in (1, m) for n, m in zip(reversed(seen.shape), reversed(shape), strict=False)
        ):
            rule = "the function's result must broadcast to its arguments"
            given = f"a result {tuple(seen.shape)} for arguments that broadcast to {tuple(shape)}"
            raise ShapeError.of(call, rule, given, "Compute it elementwise from b, h, p and j")
        return seen

    def of_heads(self, start: int, stop: int, Hq: int) -> Rule:
        fn = self.fn

        @wraps(fn)
        def moved(b: Tensor, h: Tensor, p: Tensor, j: Tensor) -> Tensor:
            return fn(b, h + start, p, j)

        return MaskMod(moved) if start else self

    def _lower(self, builder: Builder) -> None:
        builder.supported = False

    def _key(self) -> tuple[Any, ...]:
        return (id(self.fn),)

    def __repr__(self) -> str:
        return f"mask_mod({getattr(self.fn, '__name__', type(self.fn).__name__)})"


def mask_mod(fn: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> MaskMod:
    """A function as a mask: key j is visible where fn(b, h, p, j) is True.

    Parameters
    ----------
    fn : callable
        Called with int64 tensors that broadcast (batch row, query head, query position, key position), once a tile;
        returns a bool tensor that broadcasts with them. It must depend on its arguments only. Two masks are equal
        where the function is the same object.

    Returns
    -------
    Mask

    Raises
    ------
    ArgumentTypeError
        fn cannot be called; at use its result is not a bool tensor.

    Notes
    -----
    Cost: fn runs in PyTorch on every tile that other masks leave; compiled kernels do not take it.

    Examples
    --------
    >>> import qkv
    >>> def even_keys(b, h, p, j):
    ...     return j % 2 == 0
    >>> print((qkv.mask_mod(even_keys) & qkv.causal()).picture(3, 3))
    p/j 0 1 2
      0 ■ · ·
      1 ■ · ·
      2 ■ · ■
    """
    if not callable(fn):
        fix = "Pass a function of four tensors, e.g. lambda b, h, p, j: j <= p"
        given = f"{shown(fn)} ({type(fn).__name__})"
        raise ArgumentTypeError.of("qkv.mask_mod()", "fn must be a function fn(b, h, p, j)", given, fix)
    return MaskMod(fn)
