"""Score terms: what `bias=` adds to the scaled (and capped) scores before the mask selects.

    qkv.attention(q, k, v, bias=tensor)                        # (B, Hq, Lq, Lk) or anything that broadcasts to it
    qkv.attention(q, k, v, bias=qkv.alibi(slopes))             # -slope_h * |p - j|
    qkv.attention(q, k, v, bias=qkv.relative(table))           # table[h, clamp(j - p, -R, R) + R]
    qkv.attention(q, k, v, bias=qkv.score_mod(fn))             # s becomes fn(s, b, h, p, j)
    qkv.attention(q, k, v, bias=qkv.alibi(slopes) + tensor)    # terms apply from left to right

A term knows how to compute itself on one tile of the score matrix, and how to add a tile of score gradients to its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkv.errors import ArgumentError, ArgumentTypeError, QKVError, ShapeError, describe, from_function
from qkv.masks import Sizes, Tile

_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class TermSpec(NamedTuple):
    """What a backend may know of a term before it runs: the kind, and the tensor's metadata (empty for score_mod)."""

    kind: str  # "tensor", "alibi", "relative" or "score_mod"
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dtype: torch.dtype | None = None


class ScoreTerm:
    """One term, or a sum of terms, of `bias=`. Immutable; `a + b` applies a, then b."""

    __slots__ = ()
    kind = ""
    depends_on_position = True

    @property
    def terms(self) -> tuple[ScoreTerm, ...]:
        return (self,)

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors the term holds, in a fixed order."""
        return ()

    def with_tensors(self, tensors: Sequence[Tensor]) -> ScoreTerm:
        """The same term over other tensors of the same metadata."""
        return self

    def lowered(self, device: torch.device) -> ScoreTerm:
        """The plain form that backends take; differentiable towards the tensors given by the user."""
        return self.with_tensors([t.resolve_neg() for t in self.tensors()])

    def check(self, call: str, sizes: Sizes) -> None:
        """Raise a typed error unless the term fits the call."""

    def specs(self) -> tuple[TermSpec, ...]:
        return tuple(TermSpec(t.kind, *_metadata(t.tensors())) for t in self.terms)

    def tile(self, at: Tile, dtype: torch.dtype) -> Tensor:
        """The additive value on a tile, broadcastable to the tile's 4-D shape."""
        raise NotImplementedError

    def new_gradients(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Zeroed buffers that `add_gradients` adds to, in the shapes of `tensors()`."""
        # Sums over many scores run in float64: a float32 sum of 10^5 terms alone could break the error bound.
        return tuple(torch.zeros(t.shape, dtype=torch.float64, device=t.device) for t in self.tensors())

    def add_gradients(self, buffers: tuple[Tensor, ...], ds: Tensor, at: Tile) -> None:
        """Add a 4-D tile of score gradients."""

    def __add__(self, other: Any) -> ScoreTerm:
        term = as_bias(other, "qkv score terms")
        return self if term is None else Sum((*self.terms, *term.terms))

    def __radd__(self, other: Any) -> ScoreTerm:
        term = as_bias(other, "qkv score terms")
        return self if term is None else Sum((*term.terms, *self.terms))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        # torch.compile asks here where one side of + is a tensor; every other torch function refuses a term.
        if func not in (Tensor.add, torch.add, Tensor.__add__) or len(args) != 2:
            return NotImplemented
        terms = [as_bias(x, "qkv score terms") for x in args]
        return Sum(tuple(part for term in terms if term is not None for part in term.terms))


def _metadata(tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
    return (tuple(tensors[0].shape), tensors[0].stride(), tensors[0].dtype) if tensors else ()


def _select(t: Tensor, dim: int, where: slice | Tensor) -> Tensor:
    if t.shape[dim] == 1:
        return t
    if isinstance(where, slice):
        return t.narrow(dim, where.start, where.stop - where.start)
    return t.index_select(dim, where)


class Sum(ScoreTerm):
    """Several terms, applied from left to right."""

    __slots__ = ("_terms",)
    kind = "sum"

    def __init__(self, terms: tuple[ScoreTerm, ...]) -> None:
        self._terms = terms

    @property
    def terms(self) -> tuple[ScoreTerm, ...]:
        return self._terms

    @property
    def depends_on_position(self) -> bool:  # type: ignore[override]
        return any(t.depends_on_position for t in self._terms)

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(x for t in self._terms for x in t.tensors())

    def with_tensors(self, tensors: Sequence[Tensor]) -> ScoreTerm:
        rest, terms = list(tensors), []
        for term in self._terms:
            count = len(term.tensors())
            terms.append(term.with_tensors(rest[:count]))
            rest = rest[count:]
        return Sum(tuple(terms))

    def lowered(self, device: torch.device) -> ScoreTerm:
        return Sum(tuple(t.lowered(device) for t in self._terms))

    def check(self, call: str, sizes: Sizes) -> None:
        for term in self._terms:
            term.check(call, sizes)

    def __repr__(self) -> str:
        return " + ".join(map(repr, self._terms))


class TensorBias(ScoreTerm):
    """A tensor that broadcasts to (B, Hq, Lq, Lk), indexed by query index. -inf hides."""

    __slots__ = ("_tensor",)
    kind = "tensor"
    depends_on_position = False

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return (self._tensor,)

    def with_tensors(self, tensors: Sequence[Tensor]) -> ScoreTerm:
        return TensorBias(tensors[0])

    def check(self, call: str, sizes: Sizes) -> None:
        t = self._tensor
        if t.dtype not in (sizes.dtype, torch.float32):
            rule = "a bias tensor must have q's dtype or float32"
            raise ArgumentTypeError(
                describe(call, rule, f"bias {_name(t.dtype)} and q {_name(sizes.dtype)}", "Convert it with .to()")
            )
        _check_device(call, "bias", t, sizes)
        full = (sizes.B, sizes.Hq, sizes.Lq, sizes.Lk)
        padded = (1,) * (4 - t.dim()) + tuple(t.shape)
        if t.dim() > 4 or any(size not in (1, whole) for size, whole in zip(padded, full, strict=True)):
            rule = "a bias tensor must broadcast to (B, Hq, Lq, Lk)"
            raise ShapeError(
                describe(call, rule, f"bias {tuple(t.shape)} for {full}", "Give each dimension its size or 1")
            )

    def tile(self, at: Tile, dtype: torch.dtype) -> Tensor:
        t = self._view(self._tensor)
        for dim, where in enumerate((at.batch, at.heads, at.rows, at.keys)):
            t = _select(t, dim, where)
        return t.to(dtype)

    def new_gradients(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        t = self._tensor
        reduced = t.dim() < 4 or 1 in t.shape
        return (torch.zeros(t.shape, dtype=torch.float64 if reduced else dtype, device=t.device),)

    def add_gradients(self, buffers: tuple[Tensor, ...], ds: Tensor, at: Tile) -> None:
        buffer = self._view(buffers[0])
        for dim, where in enumerate((at.batch, at.heads, at.rows, at.keys)):
            buffer = _select(buffer, dim, where)
        shared = [dim for dim in range(4) if buffer.shape[dim] == 1 and ds.shape[dim] != 1]
        buffer += ds.sum(shared, keepdim=True, dtype=buffer.dtype) if shared else ds

    @staticmethod
    def _view(t: Tensor) -> Tensor:
        return t[(None,) * (4 - t.dim())]

    def __repr__(self) -> str:
        return f"tensor {tuple(self._tensor.shape)}"


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
            raise ShapeError(describe(call, rule, f"{count} slopes and Hq={sizes.Hq}", "Give slopes of shape (Hq,)"))
        if isinstance(self._slopes, Tensor):
            _check_device(call, "alibi slopes", self._slopes, sizes)

    def tile(self, at: Tile, dtype: torch.dtype) -> Tensor:
        slopes = self.tensors()[0][at.heads].to(dtype)
        return (at.p - at.j).abs().to(dtype) * -slopes[:, None, None]

    def add_gradients(self, buffers: tuple[Tensor, ...], ds: Tensor, at: Tile) -> None:
        distance = (at.p - at.j).abs().to(buffers[0].dtype)
        buffers[0][at.heads] -= (ds * distance).sum((0, 2, 3))

    def __repr__(self) -> str:
        return "alibi"


class Relative(ScoreTerm):
    """table[h, clamp(j - p, -R, R) + R]."""

    __slots__ = ("_table",)
    kind = "relative"

    def __init__(self, table: Tensor) -> None:
        self._table = table

    def tensors(self) -> tuple[Tensor, ...]:
        return (self._table,)

    def with_tensors(self, tensors: Sequence[Tensor]) -> ScoreTerm:
        return Relative(tensors[0])

    def check(self, call: str, sizes: Sizes) -> None:
        _check_table(call, self._table, sizes)

    def _columns(self, at: Tile) -> Tensor:
        reach = self._table.shape[1] // 2
        return (at.j - at.p).clamp(-reach, reach) + reach

    def tile(self, at: Tile, dtype: torch.dtype) -> Tensor:
        return self._table.to(dtype)[at.h, self._columns(at)]

    def add_gradients(self, buffers: tuple[Tensor, ...], ds: Tensor, at: Tile) -> None:
        columns = self._columns(at)
        if columns.shape[0] == 1 and ds.shape[0] > 1:
            ds = ds.sum(0, keepdim=True, dtype=buffers[0].dtype)
        for row, c in zip(ds.to(buffers[0].dtype), columns.expand(ds.shape[0], 1, *ds.shape[2:]), strict=True):
            buffers[0][at.heads].index_add_(1, c.reshape(-1), row.flatten(1))

    def __repr__(self) -> str:
        return f"relative {tuple(self._table.shape)}"


class T5Buckets(ScoreTerm):
    """A (Hq, buckets) table in T5's logarithmic buckets; lowers to `Relative` with R = max_distance."""

    __slots__ = ("_bidirectional", "_max_distance", "_table")
    kind = "relative"

    def __init__(self, table: Tensor, max_distance: int, bidirectional: bool) -> None:
        self._table, self._max_distance, self._bidirectional = table, max_distance, bidirectional

    def tensors(self) -> tuple[Tensor, ...]:
        return (self._table,)

    def with_tensors(self, tensors: Sequence[Tensor]) -> ScoreTerm:
        return T5Buckets(tensors[0], self._max_distance, self._bidirectional)

    def check(self, call: str, sizes: Sizes) -> None:
        _check_table(call, self._table, sizes)

    def lowered(self, device: torch.device) -> ScoreTerm:
        reach = torch.arange(-self._max_distance, self._max_distance + 1, device=device)
        return Relative(self._table.index_select(1, self.bucket(reach)))

    def bucket(self, relative_position: Tensor) -> Tensor:
        """T5's bucket of j - p: exact up to half the buckets, then logarithmic up to max_distance."""
        buckets = self._table.shape[1]
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
        return f"T5 relative {tuple(self._table.shape)}"


class ScoreMod(ScoreTerm):
    """s becomes fn(s, b, h, p, j)."""

    __slots__ = ("_fn",)
    kind = "score_mod"

    def __init__(self, fn: Callable[..., Tensor]) -> None:
        self._fn = fn

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
            got = f"{_name(result.dtype)} tensor" if isinstance(result, Tensor) else type(result).__name__
            raise ArgumentTypeError(
                describe(call, "fn must return the scores as a floating tensor", got, "Return s or a function of it")
            )
        try:
            return result.to(s.dtype).expand(s.shape)
        except RuntimeError:
            got = f"{tuple(result.shape)} for scores {tuple(s.shape)}"
            raise ShapeError(
                describe(call, "fn must return one score an element", got, "Use elementwise operations")
            ) from None

    def __repr__(self) -> str:
        return f"score_mod({getattr(self._fn, '__name__', 'fn')})"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_device(call: str, name: str, t: Tensor, sizes: Sizes) -> None:
    if t.device != sizes.device:
        given = f"{name} on {t.device} and q on {sizes.device}"
        raise ArgumentTypeError(describe(call, f"{name} must be on q's device", given, "Move it with .to(q.device)"))


def _check_table(call: str, table: Tensor, sizes: Sizes) -> None:
    if table.shape[0] != sizes.Hq:
        given = f"table {tuple(table.shape)} and Hq={sizes.Hq}"
        raise ShapeError(
            describe(call, "a relative table has one row a query head", given, "Give a table of shape (Hq, columns)")
        )
    _check_device(call, "relative table", table, sizes)


def as_bias(x: Any, call: str = "qkv.attention()") -> ScoreTerm | None:
    """`bias=` as a term: None stays None, a floating tensor becomes a TensorBias, a term stays itself."""
    if x is None or isinstance(x, ScoreTerm):
        return x
    if isinstance(x, Tensor):
        if type(x).__name__ == "CausalBias":  # torch.nn.attention.bias has it: it holds no data, memory would be read
            fix = 'Pass mask=qkv.causal(), with positions="start" for the upper left corner, "end" for the lower right'
            raise ArgumentTypeError(describe(call, "bias must hold what is added to the scores", "a CausalBias", fix))
        if x.dtype in _FLOATING:
            return TensorBias(x)
        fix = "Pass a bool tensor as mask= (True = may attend)" if x.dtype == torch.bool else "Convert it to q's dtype"
        raise ArgumentTypeError(
            describe(call, "bias must be a floating tensor or a score term", f"a {_name(x.dtype)} tensor", fix)
        )
    fix = "Pass a tensor, qkv.alibi, qkv.relative, qkv.score_mod or a sum of them"
    if callable(x):
        fix = "Wrap a function as qkv.score_mod(fn)"
    elif hasattr(x, "__array__"):
        fix = "Make a tensor of it with torch.from_numpy(bias)"
    raise ArgumentTypeError(describe(call, "bias must be a floating tensor or a score term", type(x).__name__, fix))


def alibi(slopes: Tensor | Sequence[float]) -> ScoreTerm:
    """Bias each score by -slope_h * |p - j|: a head's linear distaste for distance.

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
        _check_parameter(call, "slopes", slopes, 1, "(Hq,)")
        return Alibi(slopes)
    numbers: tuple[Any, ...]
    try:
        numbers = tuple(slopes)
    except TypeError:
        numbers = (None,)
    if any(isinstance(x, bool) or not hasattr(x, "__float__") for x in numbers):
        raise ArgumentTypeError(
            describe(call, "slopes must be a tensor or numbers", f"{slopes!r}", "Give one number a query head")
        )
    values = tuple(float(x) for x in numbers)
    if not all(map(math.isfinite, values)):
        raise ArgumentError(describe(call, "slopes must be finite", f"{values}", "Give one finite number a query head"))
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
    _check_parameter(call, "table", table, 2, "(Hq, 2R + 1)")
    columns = table.shape[1]
    if buckets is None:
        if bidirectional is not None or max_distance != 128:
            given = f"max_distance={max_distance}, bidirectional={bidirectional} without buckets"
            raise ArgumentError(
                describe(call, "max_distance and bidirectional belong to buckets='t5'", given, "Leave them out")
            )
        if columns % 2 == 0:
            rule = "a relative table has an odd number of columns, 2R + 1"
            raise ShapeError(
                describe(call, rule, f"table {tuple(table.shape)}", "Give columns for -R..R, or buckets='t5'")
            )
        return Relative(table)
    if buckets != "t5":
        raise ArgumentError(describe(call, "buckets is None or 't5'", f"buckets={buckets!r}", "Choose one of them"))
    if not isinstance(bidirectional, (bool, type(None))):  # torch 2.9 cannot trace `bool | None`
        raise ArgumentTypeError(describe(call, "bidirectional is a bool", f"{bidirectional!r}", "Pass True or False"))
    both = bidirectional is not False
    if isinstance(max_distance, bool) or not hasattr(max_distance, "__index__"):
        raise ArgumentTypeError(
            describe(call, "max_distance is an int", f"{max_distance!r}", "Give it in tokens, such as 128")
        )
    exact = columns // 2 // (2 if both else 1)
    if exact < 1 or max_distance.__index__() <= exact or (both and columns % 2):
        rule = "T5 buckets need at least 2 buckets a direction and max_distance beyond the exact half"
        given = f"table {tuple(table.shape)}, max_distance={max_distance}, bidirectional={both}"
        raise ArgumentError(describe(call, rule, given, "T5 itself uses 32 buckets and max_distance=128"))
    return T5Buckets(table, max_distance.__index__(), both)


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
        raise ArgumentTypeError(
            describe("qkv.score_mod()", "fn must be callable", type(fn).__name__, "Give fn(s, b, h, p, j)")
        )
    return ScoreMod(fn)


def _check_parameter(call: str, name: str, t: Any, dims: int, shape: str) -> None:
    if not isinstance(t, Tensor) or t.dtype not in _FLOATING:
        got = f"{_name(t.dtype)} tensor" if isinstance(t, Tensor) else type(t).__name__
        raise ArgumentTypeError(
            describe(call, f"{name} must be a floating tensor", got, f"Give a tensor of shape {shape}")
        )
    if t.dim() != dims:
        raise ShapeError(
            describe(call, f"{name} must have shape {shape}", f"{tuple(t.shape)}", f"Give a tensor of shape {shape}")
        )
