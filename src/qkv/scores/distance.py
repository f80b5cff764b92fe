"""Score terms of the distance between query and key: ALiBi, and learned tables of relative positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qkv.errors import ArgumentError, ArgumentTypeError, ShapeError
from qkv.masks import Sizes, Tile
from qkv.scores.base import OfTensor, ScoreTerm, check_device, check_parameter


class Alibi(ScoreTerm):
    """-slope_h * |p - j|."""

    __slots__ = ("_slopes",)
    kind = "alibi"

    def __init__(self, slopes: Tensor | tuple[float, ...]) -> None:
        self._slopes = slopes

    def tensors(self) -> tuple[Tensor, ...]:
        slopes = self._slopes
        return (slopes,) if isinstance(slopes, Tensor) else (torch.tensor(slopes, dtype=torch.float64, device="cpu"),)

    def with_tensors(self, tensors: Sequence[Tensor]) -> ScoreTerm:
        return Alibi(tensors[0])

    def lowered(self, device: torch.device) -> ScoreTerm:
        return Alibi(self.tensors()[0].resolve_neg().to(device))

    def check(self, call: str, sizes: Sizes) -> None:
        count = self._slopes.shape[0] if isinstance(self._slopes, Tensor) else len(self._slopes)
        if count != sizes.Hq:
            rule = "alibi takes one slope a query head"
            raise ShapeError.of(call, rule, f"{count} slopes and Hq={sizes.Hq}", "Give slopes of shape (Hq,)")
        if isinstance(self._slopes, Tensor):
            check_device(call, "alibi slopes", self._slopes, sizes)

    def tile(self, at: Tile, dtype: torch.dtype) -> Tensor:
        slopes = self.tensors()[0][at.heads].to(dtype)
        return (at.p - at.j).abs().to(dtype) * -slopes[:, None, None]

    def add_gradients(self, buffers: tuple[Tensor, ...], ds: Tensor, at: Tile) -> None:
        distance = (at.p - at.j).abs().to(buffers[0].dtype)
        buffers[0][at.heads] -= (ds * distance).sum((0, 2, 3))

    def __repr__(self) -> str:
        return "alibi"


class _Table(OfTensor):
    """A table with a row a query head."""

    __slots__ = ()
    kind = "relative"

    def check(self, call: str, sizes: Sizes) -> None:
        table = self._tensor
        if table.shape[0] != sizes.Hq:
            given = f"table {tuple(table.shape)} and Hq={sizes.Hq}"
            rule = "a relative table has one row a query head"
            raise ShapeError.of(call, rule, given, "Give a table of shape (Hq, columns)")
        check_device(call, "relative table", table, sizes)


class Relative(_Table):
    """table[h, clamp(j - p, -R, R) + R]."""

    __slots__ = ()

    def _columns(self, at: Tile) -> Tensor:
        reach = self._tensor.shape[1] // 2
        return (at.j - at.p).clamp(-reach, reach) + reach

    def tile(self, at: Tile, dtype: torch.dtype) -> Tensor:
        return self._tensor.to(dtype)[at.h, self._columns(at)]

    def add_gradients(self, buffers: tuple[Tensor, ...], ds: Tensor, at: Tile) -> None:
        columns = self._columns(at)
        if columns.shape[0] == 1 and ds.shape[0] > 1:
            ds = ds.sum(0, keepdim=True, dtype=buffers[0].dtype)
        for row, c in zip(ds.to(buffers[0].dtype), columns.expand(ds.shape[0], 1, *ds.shape[2:]), strict=True):
            buffers[0][at.heads].index_add_(1, c.reshape(-1), row.flatten(1))

    def __repr__(self) -> str:
        return f"relative {tuple(self._tensor.shape)}"


class T5Buckets(_Table):
    """A (Hq, buckets) table in T5's logarithmic buckets; lowers to `Relative` with R = max_distance."""

    __slots__ = ("_bidirectional", "_max_distance")

    def __init__(self, table: Tensor, max_distance: int, bidirectional: bool) -> None:
        self._tensor, self._max_distance, self._bidirectional = table, max_distance, bidirectional

    def with_tensors(self, tensors: Sequence[Tensor]) -> ScoreTerm:
        return T5Buckets(tensors[0], self._max_distance, self._bidirectional)

    def lowered(self, device: torch.device) -> ScoreTerm:
        reach = torch.arange(-self._max_distance, self._max_distance + 1, device=device)
        return Relative(self._tensor.index_select(1, self.bucket(reach)))

    def bucket(self, relative_position: Tensor) -> Tensor:
        """T5's bucket of j - p: exact up to half the buckets, then logarithmic up to max_distance."""
        buckets = self._tensor.shape[1]
        if self._bidirectional:
            buckets //= 2
            start = (relative_position > 0).long() * buckets
            distance = relative_position.abs()
        else:
            start = torch.zeros_like(relative_position)
            distance = (-relative_position).clamp(min=0)
        exact = buckets // 2
        # float32 on purpose: T5 checkpoints were trained with these roundings at the bucket borders.
        ratio = torch.log(distance.clamp(min=1).to(torch.float32) / exact) / math.log(self._max_distance / exact)
        far = (exact + (ratio * (buckets - exact)).to(torch.int64)).clamp(max=buckets - 1)
        return start + torch.where(distance < exact, distance, far)

    def __repr__(self) -> str:
        return f"T5 relative {tuple(self._tensor.shape)}"


def alibi(slopes: Tensor | Sequence[float]) -> ScoreTerm:
    """Bias each score by -slope_h * |p - j|: the farther the key, the lower its score.

    Parameters
    ----------
    slopes : Tensor or sequence of numbers, shape (Hq,)
        One slope a query head; a tensor of any floating dtype on q's device gets its gradient.

    Returns
    -------
    ScoreTerm
        A value for `bias=`; terms add with `+`.

    Raises
    ------
    ArgumentTypeError, ShapeError, ArgumentError
        Not one finite number a head.

    Notes
    -----
    Cost: nothing stored, 3 FLOPs a score. Source: Press, Smith and Lewis, "Train Short, Test Long" (2021).

    Examples
    --------
    >>> import torch, qkv
    >>> q = k = v = torch.ones(1, 1, 4, 2)
    >>> p = qkv.weights(q, k, bias=qkv.alibi([1.0]), mask=qkv.causal())
    >>> [round(x, 3) for x in p[0, 0, 3].tolist()]
    [0.032, 0.087, 0.237, 0.644]
    """
    call = "qkv.alibi()"
    if isinstance(slopes, Tensor):
        check_parameter(call, "slopes", slopes, 1, "(Hq,)")
        return Alibi(slopes)
    numbers: tuple[Any, ...]
    try:
        numbers = tuple(slopes)
    except TypeError:
        numbers = (None,)
    if any(isinstance(x, bool) or not hasattr(x, "__float__") for x in numbers):
        rule = "slopes must be a tensor or numbers"
        raise ArgumentTypeError.of(call, rule, f"{slopes!r}", "Give one number a query head")
    values = tuple(float(x) for x in numbers)
    if not all(map(math.isfinite, values)):
        raise ArgumentError.of(call, "slopes must be finite", f"{values}", "Give one finite number a query head")
    return Alibi(values)


def relative(
    table: Tensor, *, buckets: str | None = None, max_distance: int = 128, bidirectional: bool | None = None
) -> ScoreTerm:
    """Bias each score by a learned number for its head and relative position.

    Plain: ``table[h, clamp(j - p, -R, R) + R]`` with 2R + 1 columns. With ``buckets="t5"``: T5's logarithmic buckets.

    Parameters
    ----------
    table : Tensor, shape (Hq, 2R + 1), or (Hq, buckets) with buckets="t5"
        Any floating dtype, on q's device; gets its gradient.
    buckets : "t5" or None
        How relative positions map to columns.
    max_distance : int
        T5 only: the distance in tokens from which all keys share the last bucket.
    bidirectional : bool
        T5 only (default True): whether keys after the query have buckets of their own (an encoder) or share bucket 0 (a
        decoder).

    Returns
    -------
    ScoreTerm
        A value for `bias=`; terms add with `+`.

    Raises
    ------
    ArgumentTypeError, ShapeError, ArgumentError
        A table that is no floating 2-D tensor, an even number of columns without buckets, or too few buckets.

    Notes
    -----
    Cost: one table read a score. Sources: Shaw, Uszkoreit and Vaswani (2018); Raffel et al., "T5" (2020).

    Examples
    --------
    >>> import torch, qkv
    >>> q = k = v = torch.zeros(1, 1, 3, 2)
    >>> table = torch.tensor([[0.0, 5.0, 0.0]])              # prefers its own position
    >>> qkv.weights(q, k, bias=qkv.relative(table))[0, 0].argmax(-1)
    tensor([0, 1, 2])
    """
    call = "qkv.relative()"
    check_parameter(call, "table", table, 2, "(Hq, 2R + 1)")
    columns = table.shape[1]
    if buckets is None:
        if bidirectional is not None or max_distance != 128:
            given = f"max_distance={max_distance}, bidirectional={bidirectional} without buckets"
            rule = "max_distance and bidirectional belong to buckets='t5'"
            raise ArgumentError.of(call, rule, given, "Leave them out")
        if columns % 2 == 0:
            rule = "a relative table has an odd number of columns, 2R + 1"
            raise ShapeError.of(call, rule, f"table {tuple(table.shape)}", "Give columns for -R..R, or buckets='t5'")
        return Relative(table)
    if buckets != "t5":
        raise ArgumentError.of(call, "buckets is None or 't5'", f"buckets={buckets!r}", "Choose one of them")
    if not isinstance(bidirectional, (bool, type(None))):  # torch 2.9 cannot trace `bool | None`
        raise ArgumentTypeError.of(call, "bidirectional is a bool", f"{bidirectional!r}", "Pass True or False")
    both = bidirectional is not False
    if isinstance(max_distance, bool) or not hasattr(max_distance, "__index__"):
        rule = "max_distance is an int"
        raise ArgumentTypeError.of(call, rule, f"{max_distance!r}", "Give it in tokens, such as 128")
    exact = columns // 2 // (2 if both else 1)
    if exact < 1 or max_distance.__index__() <= exact or (both and columns % 2):
        rule = "T5 buckets need at least 2 buckets a direction and max_distance beyond the exact half"
        given = f"table {tuple(table.shape)}, max_distance={max_distance}, bidirectional={both}"
        raise ArgumentError.of(call, rule, given, "T5 itself uses 32 buckets and max_distance=128")
    return T5Buckets(table, max_distance.__index__(), both)
