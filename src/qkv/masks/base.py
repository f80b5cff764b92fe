"""The mask as a value that combines: & | ~, with bool tensors too, drawn and written out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar

import torch
from torch import Tensor

from qkv.checks import integer, readable, shown
from qkv.errors import ArgumentError, ArgumentTypeError, ShapeError
from qkv.masks.picture import counted, looked_at
from qkv.masks.positions import resolve_positions
from qkv.masks.program import Builder
from qkv.masks.rule import CPU, Rule, remade
from qkv.masks.tile import Sizes, Tile

__all__ = ["dense"]

# The most query-key pairs a picture looks at, those up to which it always does, and the most an error draws.
_PICTURE_PAIRS = 2**28
_LOOKED_AT = 2**22
_ERROR_PAIRS = 2**22


class Mask(Rule):
    """Which keys each query may attend to (True = may), for any lengths: an immutable, hashable value.

    Masks combine: ``a & b`` (both allow), ``a | b`` (either allows), ``~a`` (among the keys that exist). A bool tensor
    may stand on either side. One value serves training, prefill, chunks and decode: it speaks of the query's position
    p and the key's position j, and `positions=` says where the queries stand.

    Examples
    --------
    >>> import qkv
    >>> mask = qkv.causal() & (qkv.prefix(1) | qkv.sliding_window(2))
    >>> mask
    causal() & (prefix(1) | sliding_window(2))
    >>> print(mask.picture(4, 4))
    p/j 0 1 2 3
      0 ■ · · ·
      1 ■ ■ · ·
      2 ■ ■ ■ ·
      3 ■ · ■ ■
    """

    def tensor(self, Lq: int, Lk: int, positions: Any = None, B: int = 1, Hq: int = 1) -> Tensor:
        """The mask as a bool tensor, True where the query may attend.

        Parameters
        ----------
        Lq, Lk : int
            The numbers of queries and keys.
        positions : "start", "end", int, B ints or int Tensor (B or 1, Lq)
            "start" is p = i, "end" p = i + Lk - Lq, an int the position of query 0.
        B, Hq : int
            Batch rows and query heads.

        Returns
        -------
        Tensor, bool, shape (B, Hq, Lq, Lk)

        Raises
        ------
        ArgumentError
            Lq != Lk, the mask depends on position and `positions` is left out.

        Notes
        -----
        Cost: B Hq Lq Lk bytes. Meant for small sizes, tests and other libraries; attention() never needs it.

        Examples
        --------
        >>> import qkv
        >>> qkv.causal().tensor(2, 3, positions="end").int()
        tensor([[[[1, 1, 0],
                  [1, 1, 1]]]], dtype=torch.int32)
        """
        call, device = "Mask.tensor()", self._device()
        Lq, Lk, B, Hq = (integer(call, n, x) for n, x in (("Lq", Lq), ("Lk", Lk), ("B", B), ("Hq", Hq)))
        sizes = Sizes(B, Hq, Lq, Lk, device=device)
        self.check(call, sizes)
        p = self._positions(call, positions, sizes).to(device)
        b, h, i, j = (torch.arange(n, device=device) for n in sizes[:4])
        at = Tile.pairs(b.view(-1, 1, 1, 1), h.view(-1, 1, 1), i.view(-1, 1), p[:, None, :, None], j)
        return self.visible(at, sizes).expand(sizes[:4]).clone(memory_format=torch.contiguous_format)

    def picture(
        self, Lq: int, Lk: int, positions: Any = None, *, B: int = 1, Hq: int = 1, b: int = 0, h: int = 0
    ) -> str:
        """The mask of one batch row and head as text: ■ visible, · hidden, a row for each query, a column for each key.

        Parameters
        ----------
        Lq, Lk, positions, B, Hq
            As for `tensor`.
        b, h : int
            Which batch row and query head of B and Hq is drawn.

        Returns
        -------
        str
            Longer sides than 48 are drawn in blocks, ▒ where only some of a block is visible.

        Raises
        ------
        ArgumentError
            As `tensor`, and for more than 2**28 pairs of a mask that is a tensor or a function.

        Notes
        -----
        Cost: looks at every pair of query and key, a block of rows at a time; beyond 2**22 pairs it counts what each
        block holds instead, from the ranges of keys: a million tokens of most masks take well under a second.

        Examples
        --------
        >>> import qkv
        >>> print(qkv.sliding_window(2).picture(2, 4, positions="end"))
        p/j 0 1 2 3
          2 · ■ ■ ·
          3 · · ■ ■
        """
        call = "Mask.picture()"
        Lq, Lk = integer(call, "Lq", Lq), integer(call, "Lk", Lk)
        B, Hq = integer(call, "B", B, low=1), integer(call, "Hq", Hq, low=1)
        b, h = integer(call, "b", b, 0, B - 1), integer(call, "h", h, 0, Hq - 1)
        sizes = Sizes(B, Hq, Lq, Lk, device=self._device())
        self.check(call, sizes)
        p = self._positions(call, positions, sizes)
        if Lq * Lk > _LOOKED_AT and (drawn := counted(self, p, sizes, b, h)) is not None:
            return drawn
        if Lq * Lk > _PICTURE_PAIRS:
            rule = f"Lq * Lk must be at most {_PICTURE_PAIRS} where a mask is a tensor or a function"
            raise ArgumentError.of(call, rule, f"Lq={Lq}, Lk={Lk}", "Draw a shorter piece")
        return looked_at(self, p, sizes, b, h)

    def both_readings(self, sizes: Sizes) -> str:
        """The two pictures an error shows where `positions` was left out and matters.

        Parameters
        ----------
        sizes : Sizes

        Returns
        -------
        str
        """
        Lq, Lk = sizes.Lq, sizes.Lk
        drawn = []
        for name, rule in (("start", "p = i"), ("end", f"p = i {'+' if Lk >= Lq else '-'} {abs(Lk - Lq)}")):
            title = f'positions="{name}" ({rule})'
            if Lq * Lk <= _ERROR_PAIRS:
                p = resolve_positions("", name, B=sizes.B, Lq=Lq, Lk=Lk)
                title += ":\n" + looked_at(self, p, sizes, 0, 0, cells=12)
            drawn.append(title)
        return "\n".join(drawn)

    def _positions(self, call: str, positions: Any, sizes: Sizes) -> Tensor:
        B, _, Lq, Lk = sizes[:4]
        if positions is None and Lq != Lk and self.depends_on_position:
            rule = "positions= must say where the queries stand when Lq != Lk and the mask depends on position"
            fix = 'Pass positions="start" or "end", drawn below, or the positions themselves'
            told = ArgumentError.of(call, rule, f"Lq={Lq}, Lk={Lk} and {self!r}", fix)
            raise ArgumentError(f"{told}\n{self.both_readings(sizes)}")
        return resolve_positions(call, positions, B=B, Lq=Lq, Lk=Lk)

    # Composition. A bool tensor may stand on either side.
    def __and__(self, other: Any) -> Mask:
        return _combine(And, self, other)

    def __rand__(self, other: Any) -> Mask:
        return _combine(And, other, self)

    def __or__(self, other: Any) -> Mask:
        return _combine(Or, self, other)

    def __ror__(self, other: Any) -> Mask:
        return _combine(Or, other, self)

    def __invert__(self) -> Mask:
        return self.part if isinstance(self, Not) else Not(self)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # A tensor on the left of & or | asks here before it gives up; every other torch function refuses a mask.
        combination = _TENSOR_OPERATORS.get(func)
        if combination is None or len(args) != 2:
            return NotImplemented
        return _combine(combination, *args)

    def __bool__(self) -> bool:
        fix = "Write & | ~ where you wrote and, or, not; test for a mask with `is None`"
        raise ArgumentTypeError.of("bool(mask)", "a mask is neither true nor false", repr(self), fix)


class Composed(Mask):
    """A mask made of other masks, `parts`."""

    parts: tuple[Mask, ...]

    @property
    def depends_on_position(self) -> bool:
        return any(part.depends_on_position for part in self.parts)

    @property
    def varies_by_batch(self) -> bool:
        return any(part.varies_by_batch for part in self.parts)

    @property
    def varies_by_head(self) -> bool:
        return any(part.varies_by_head for part in self.parts)

    @property
    def fits_any_length(self) -> bool:
        return all(part.fits_any_length for part in self.parts)

    @property
    def _reads_position(self) -> bool:
        return any(part._reads_position for part in self.parts)

    @property
    def _by_distance(self) -> bool:
        return all(part._by_distance for part in self.parts)

    def check(self, call: str, sizes: Sizes) -> None:
        for part in self.parts:
            part.check(call, sizes)

    def _device(self) -> torch.device:
        return next((d for d in (part._device() for part in self.parts) if d.type != "cpu"), CPU)

    def _leaves(self, h: int) -> list[Rule]:
        return [leaf for part in self.parts for leaf in part._leaves(h)]

    def _numbers(self) -> tuple[int, ...]:
        return (len(self.parts),)

    def _encode(self, call: str, words: list[int], tensors: list[Tensor]) -> None:
        super()._encode(call, words, tensors)
        for part in self.parts:
            part._encode(call, words, tensors)

    def _for_head(self, h: int) -> Rule:
        return remade(self, [part._for_head(h) for part in self.parts])

    def of_heads(self, start: int, stop: int, Hq: int) -> Rule:
        return remade(self, [part.of_heads(start, stop, Hq) for part in self.parts])


@dataclass(frozen=True, eq=False, repr=False)
class _Joined(Composed):
    """Parts joined by a sign."""

    parts: tuple[Mask, ...]

    sign: ClassVar[str]
    word: ClassVar[str]
    join: ClassVar[Callable[[Tensor, Tensor], Tensor]]

    def words(self) -> str:
        return self.word.join(part.words() for part in self.parts)

    def visible(self, at: Tile, sizes: Sizes) -> Tensor:
        return reduce(type(self).join, (part.visible(at, sizes) for part in self.parts))

    def _decide(self, h: int, leaves: dict[Rule, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        may, must = zip(*(part._decide(h, leaves) for part in self.parts), strict=True)
        return reduce(type(self).join, may), reduce(type(self).join, must)

    def _lower(self, builder: Builder) -> None:
        for index, part in enumerate(self.parts):
            part._lower(builder)
            if index:
                builder.emit(self.op)

    @classmethod
    def _decode(cls, words: Iterator[int], tensors: Iterator[Tensor]) -> Rule:
        return cls(decoded_parts(words, tensors))

    def __repr__(self) -> str:
        return self.sign.join(f"({part!r})" if isinstance(part, _Joined) else repr(part) for part in self.parts)


@dataclass(frozen=True, eq=False, repr=False)
class And(_Joined, op=13):
    """Visible where every part allows it."""

    sign = " & "
    join = torch.bitwise_and
    word = " and of those only "


@dataclass(frozen=True, eq=False, repr=False)
class Or(_Joined, op=14):
    """Visible where any part allows it."""

    sign = " | "
    join = torch.bitwise_or
    word = " or "


@dataclass(frozen=True, eq=False, repr=False)
class Not(Composed, op=15):
    """Visible where the part does not allow it, among the keys that exist."""

    part: Mask

    @property
    def parts(self) -> tuple[Mask, ...]:  # type: ignore[override]
        return (self.part,)

    def words(self) -> str:
        return f"every key but {self.part.words()}"

    def visible(self, at: Tile, sizes: Sizes) -> Tensor:
        return ~self.part.visible(at, sizes)

    def _decide(self, h: int, leaves: dict[Rule, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        may, must = self.part._decide(h, leaves)
        return ~must, ~may

    def _lower(self, builder: Builder) -> None:
        self.part._lower(builder)
        builder.emit(self.op)

    def _numbers(self) -> tuple[int, ...]:
        return ()

    @classmethod
    def _decode(cls, words: Iterator[int], tensors: Iterator[Tensor]) -> Rule:
        return ~decoded(words, tensors)

    def __repr__(self) -> str:
        return f"~({self.part!r})" if isinstance(self.part, _Joined) else f"~{self.part!r}"


def decoded(words: Iterator[int], tensors: Iterator[Tensor]) -> Mask:
    """The next mask of a graph form."""
    mask = Rule.kinds[next(words)]._decode(words, tensors)
    assert isinstance(mask, Mask)
    return mask


def decoded_parts(words: Iterator[int], tensors: Iterator[Tensor]) -> tuple[Mask, ...]:
    """The next number, and as many masks."""
    return tuple(decoded(words, tensors) for _ in range(next(words)))


_TENSOR_OPERATORS: dict[Any, type[And] | type[Or]] = {
    Tensor.__and__: And,
    Tensor.__or__: Or,
    Tensor.bitwise_and: And,  # as torch.compile names them
    Tensor.bitwise_or: Or,
}


def _combine(combination: type[And] | type[Or], left: Any, right: Any) -> Mask:
    call = "mask & mask" if combination is And else "mask | mask"
    parts: list[Mask] = []
    for side in (left, right):
        mask = as_mask(side, call)
        if mask is None:
            given = f"None and {right if side is left else left!r}"
            raise ArgumentTypeError.of(call, "both sides must be masks or bool tensors", given, "Leave it out")
        # Flat, so that (a & b) & c equals a & (b & c).
        parts += mask.parts if isinstance(mask, combination) else (mask,)
    return combination(tuple(parts))


class ByReference(Mask):
    """A mask that holds a tensor of the user's own, `t`, by reference: to change it in place is an error."""

    t: Tensor
    version: int | None

    made_by: ClassVar[str]
    noun: ClassVar[str]

    def check(self, call: str, sizes: Sizes) -> None:
        self._unchanged(call)
        device, mine = sizes.device, self.t.device
        if mine.type != device.type or (None not in (mine.index, device.index) and mine.index != device.index):
            rule = f"{self.noun} must be on the device of the queries"
            raise ArgumentError.of(call, rule, f"a mask on {mine} and queries on {device}", "Move it with .to()")

    def _unchanged(self, call: str) -> None:
        if self.version is not None and self.t._version != self.version:
            rule = f"{self.noun} must not be changed in place after the mask was made"
            given = f"{self!r} changed {self.t._version - self.version} time(s)"
            fix = f"Make a new mask from it with {self.made_by}(t), or pass a copy"
            raise ArgumentError.of(call, rule, given, fix)

    def _device(self) -> torch.device:
        return self.t.device

    def _numbers(self) -> tuple[int, ...]:
        return ()

    def _tensors(self) -> tuple[Tensor, ...]:
        return (self.t,)

    def _key(self) -> tuple[Any, ...]:
        # The tensor is held, so its id is not given to another one while this mask lives.
        return id(self.t), self.version, self._numbers()


def version_of(t: Tensor) -> int | None:
    """How often a tensor was changed; None for one made in inference mode, whose changes cannot be noticed."""
    return None if not readable(t) or t.is_inference() else t._version


@dataclass(frozen=True, eq=False, repr=False)
class Dense(ByReference, op=12):
    """A bool tensor as a mask; made by `dense`."""

    t: Tensor
    version: int | None

    made_by = "dense"
    noun = "a mask tensor"

    @property
    def varies_by_batch(self) -> bool:
        return self.t.ndim == 4 and self.t.shape[0] > 1

    @property
    def varies_by_head(self) -> bool:
        return self.t.ndim == 4 and self.t.shape[1] > 1

    def check(self, call: str, sizes: Sizes) -> None:
        full = sizes[:4][-self.t.ndim :]
        if any(have not in (1, want) for have, want in zip(self.t.shape, full, strict=True)):
            names = ("B", "Hq", "Lq", "Lk")[-self.t.ndim :]
            want = ", ".join(f"{name}={size}" for name, size in zip(names, full, strict=True))
            rule = f"a mask tensor must broadcast to ({', '.join(names)})"
            fix = f"Pass a bool tensor of shape {full}, with 1 where it is shared"
            raise ShapeError.of(call, rule, f"mask {tuple(self.t.shape)} and {want}", fix)
        super().check(call, sizes)

    def words(self) -> str:
        return f"the keys that a tensor {tuple(self.t.shape)} allows"

    def visible(self, at: Tile, sizes: Sizes) -> Tensor:
        self._unchanged("dense()")
        index = (at.b, at.h, at.i, at.j)[-self.t.ndim :]
        if self.t.numel() == 0:
            shape = torch.broadcast_shapes(*(x.shape for x in index))
            return torch.zeros(shape, dtype=torch.bool, device=self.t.device)
        return self.t[tuple(torch.zeros_like(x) if n == 1 else x for x, n in zip(index, self.t.shape, strict=True))]

    def of_heads(self, start: int, stop: int, Hq: int) -> Rule:
        return dense(self.t[:, start:stop]) if self.varies_by_head else self

    def _lower(self, builder: Builder) -> None:
        self._unchanged("dense()")
        strides = [0 if n == 1 else s for n, s in zip(self.t.shape, self.t.stride(), strict=True)]
        builder.emit(self.op, builder.operand(self.t), *([0] * (4 - self.t.ndim)), *strides)

    @classmethod
    def _decode(cls, words: Iterator[int], tensors: Iterator[Tensor]) -> Rule:
        return dense(next(tensors))

    def __reduce__(self) -> tuple[Any, ...]:
        return dense, (self.t,)

    def __repr__(self) -> str:
        return f"dense({shown(self.t).split(' ', 1)[1]})"


def dense(t: Tensor) -> Dense:
    """A bool tensor as a mask: query i sees key j where t[b, h, i, j], by index and whatever the positions.

    Parameters
    ----------
    t : bool tensor of shape (Lq, Lk) or (B, Hq, Lq, Lk)
        Each size 1 or the full one. It is held by reference and not copied: changing it in place afterwards is an
        error at the next use.

    Returns
    -------
    Mask

    Raises
    ------
    ArgumentTypeError
        A tensor of another dtype (a float mask is a `bias=`), or no tensor.
    ShapeError
        Another number of dimensions; at use sizes that do not broadcast.

    Notes
    -----
    Cost: Lq Lk bytes are read; nothing is skipped unless another mask says so.

    Examples
    --------
    >>> import torch, qkv
    >>> t = torch.eye(3, dtype=torch.bool)
    >>> print((qkv.dense(t) | qkv.prefix(1)).picture(3, 3))
    p/j 0 1 2
      0 ■ · ·
      1 ■ ■ ·
      2 ■ · ■
    """
    call = "qkv.dense()"
    if not isinstance(t, Tensor) or t.dtype != torch.bool:
        given = shown(t) if isinstance(t, Tensor) else f"{shown(t)} ({type(t).__name__})"
        fix = "Write t != 0 or t.bool(); a float mask that is added to the scores is bias="
        raise ArgumentTypeError.of(call, "a mask tensor must be a bool tensor, True = may attend", given, fix)
    if t.ndim not in (2, 4):
        rule = "a mask tensor must be (Lq, Lk) or (B, Hq, Lq, Lk)"
        raise ShapeError.of(call, rule, shown(t), "Add dimensions of size 1, e.g. t[:, None] for (B, Lq, Lk)")
    if t.is_meta or t.layout != torch.strided:
        given = f"{shown(t)} on {t.device}, {t.layout}"
        raise ArgumentError.of(call, "a mask tensor must hold its values in a strided tensor", given, "Fill it")
    return Dense(t, version_of(t))


def as_mask(x: Any, call: str = "qkv.attention()") -> Mask | None:
    """What a user may write for `mask=` as a mask: a mask, a bool tensor, or None for none.

    >>> import torch
    >>> as_mask(torch.ones(2, 2, dtype=torch.bool))
    dense(bool tensor of shape (2, 2))
    """
    if x is None or isinstance(x, Mask):
        return x
    rule = "a mask must be a qkv mask or a bool tensor, True = may attend"
    if isinstance(x, Tensor):
        if x.dtype == torch.bool:
            return dense(x)
        if x.is_floating_point():
            fix = "Pass it as bias=, which is added to the scores; or write t == 0 if it holds 0 and -inf"
        else:
            fix = "Write t != 0 if 1 means may attend"
        raise ArgumentTypeError.of(call, rule, shown(x), fix)
    fix = "Write qkv.causal(), qkv.sliding_window(n), ...; make an array a tensor with torch.from_numpy(x)"
    if callable(x):
        fix = "Wrap the function: qkv.mask_mod(fn), or call the constructor: qkv.causal()"
    elif isinstance(x, str):
        fix = f"Write it as a call, e.g. qkv.{x}()" if x.isidentifier() else "Write qkv.causal(), ..."
    raise ArgumentTypeError.of(call, rule, f"{shown(x)} ({type(x).__name__})", fix)
