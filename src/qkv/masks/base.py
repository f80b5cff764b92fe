"""The mask as a value: what all masks share, and the three ways to combine them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from qkv.checks import integer
from qkv.errors import ArgumentError, ArgumentTypeError, describe
from qkv.masks.intervals import Cuts, Intervals, Rows, Spans, anything, compute
from qkv.masks.picture import draw
from qkv.masks.positions import resolve_positions
from qkv.masks.program import Builder, Op, Program

# The most query-key pairs a picture looks at, and the most an error draws.
_PICTURE_PAIRS = 2**28
_ERROR_PAIRS = 2**22


class Mask:
    """Which keys each query may attend to (True = may), for any lengths: an immutable, hashable value.

    Masks combine: ``a & b`` (both allow), ``a | b`` (either allows), ``~a`` (among the keys that exist). A bool tensor
    may stand on either side. One value serves training, prefill, chunks and decode: it speaks of the query's position
    p and the key's position j, and `positions=` says where the queries stand.

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

    @property
    def depends_on_position(self) -> bool:
        """Whether the visible keys depend on where the queries stand."""
        return False

    @property
    def varies_by_batch(self) -> bool:
        """Whether batch rows may differ."""
        return False

    @property
    def varies_by_head(self) -> bool:
        """Whether query heads may differ."""
        return False

    @property
    def fits_any_length(self) -> bool:
        """Whether its check and its program are the same for all numbers of queries and keys."""
        return False

    def check(self, call: str, *, B: int, Hq: int, Lq: int, Lk: int, device: torch.device | str) -> None:
        """Raise a typed error, as of `call`, unless the mask fits these sizes and this device."""

    def visible(
        self, b: Tensor, h: Tensor, i: Tensor, p: Tensor, j: Tensor, *, B: int, Hq: int, Lq: int, Lk: int
    ) -> Tensor:
        """The definition: may query i, at position p, of batch row b and query head h attend to key j?

        All five are int64 tensors that broadcast, with 0 <= j < Lk; p may be any integer. The result is bool and
        broadcasts with them: a mask that does not look at b and h returns a result without these dimensions' sizes.
        """
        raise NotImplementedError

    def intervals(
        self, first: Tensor, last: Tensor, *, b: int = 0, h: int = 0, Lk: int, Lq: int, i_first: Tensor | None = None
    ) -> Intervals:
        """The key ranges that tiles of queries see, for batch row b and query head h.

        Parameters
        ----------
        first, last : int64 (T,), the positions of each tile's first and last query, consecutive in between
        i_first : int64 (T,), the index of each tile's first query; the same as `first` unless given

        Cost: O(T + documents + cuts between tiles) time and memory, never anything a row. Exact for every composition
        of causal, sliding_window, window, prefix, padding, documents and chunked; otherwise the visible ranges may be
        too wide and the full ones too narrow, never the reverse.

        >>> import torch, qkv
        >>> found = qkv.sliding_window(100).intervals(torch.tensor([0, 640]), torch.tensor([63, 703]), Lq=999, Lk=999)
        >>> found.visible_start.tolist(), found.visible_stop.tolist()
        ([[0], [541]], [[64], [704]])
        >>> found.full_start.tolist(), found.full_stop.tolist()
        ([[0], [604]], [[1], [641]])
        """
        first, last = (x.detach().to("cpu", torch.int64) for x in (first, last))
        i_first = first if i_first is None else i_first.detach().to("cpu", torch.int64)
        return compute(self, first, last, i_first, b=b, h=h, Lq=Lq, Lk=Lk)

    def program(self, *, B: int, Hq: int, Lq: int, Lk: int) -> Program | None:
        """The mask lowered for a compiled kernel, or None where it calls a Python function."""
        builder = Builder(B=B, Hq=Hq, Lq=Lq, Lk=Lk)
        self._lower(builder)
        return builder.finish()

    def tensor(self, Lq: int, Lk: int, positions: Any = None, B: int = 1, Hq: int = 1) -> Tensor:
        """The mask as a bool tensor (B, Hq, Lq, Lk), True where the query may attend.

        Parameters
        ----------
        Lq, Lk : the numbers of queries and keys
        positions : "start" (p = i), "end" (p = i + Lk - Lq), an int, B ints, or an integer tensor (B or 1, Lq)
        B, Hq : batch rows and query heads

        Raises ArgumentError where Lq != Lk, the mask depends on position and `positions` is left out.
        Cost: B Hq Lq Lk bytes. Meant for small sizes, tests and other libraries; attention() never needs it.

        >>> import qkv
        >>> qkv.causal().tensor(2, 3, positions="end").int()
        tensor([[[[1, 1, 0],
                  [1, 1, 1]]]], dtype=torch.int32)
        """
        call = "Mask.tensor()"
        Lq, Lk, B, Hq = (integer(call, n, x) for n, x in (("Lq", Lq), ("Lk", Lk), ("B", B), ("Hq", Hq)))
        device = self._device()
        self.check(call, B=B, Hq=Hq, Lq=Lq, Lk=Lk, device=device)
        p = self._positions(call, positions, B=B, Hq=Hq, Lq=Lq, Lk=Lk).to(device)
        b, h, i, j = (torch.arange(n, device=device) for n in (B, Hq, Lq, Lk))
        seen = self.visible(
            b.view(-1, 1, 1, 1), h.view(-1, 1, 1), i.view(-1, 1), p[:, None, :, None], j, B=B, Hq=Hq, Lq=Lq, Lk=Lk
        )
        return seen.expand(B, Hq, Lq, Lk).clone(memory_format=torch.contiguous_format)

    def picture(
        self, Lq: int, Lk: int, positions: Any = None, *, B: int = 1, Hq: int = 1, b: int = 0, h: int = 0
    ) -> str:
        """The mask of one batch row and head as text: ■ visible, · hidden, a row for each query, a column for each key.

        Longer sides than 48 are drawn in blocks, ▒ where only some of a block is visible.
        Parameters as for `tensor`; b and h choose the batch row and query head of B and Hq.

        Cost: looks at every pair of query and key, a block of rows at a time.

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
        if Lq * Lk > _PICTURE_PAIRS:
            fix = "Draw a shorter piece"
            raise ArgumentError(describe(call, f"Lq * Lk must be at most {_PICTURE_PAIRS}", f"Lq={Lq}, Lk={Lk}", fix))
        self.check(call, B=B, Hq=Hq, Lq=Lq, Lk=Lk, device=self._device())
        return self._draw(self._positions(call, positions, B=B, Hq=Hq, Lq=Lq, Lk=Lk), B=B, Hq=Hq, Lk=Lk, b=b, h=h)

    def both_readings(self, Lq: int, Lk: int, *, B: int = 1, Hq: int = 1) -> str:
        """The two pictures an error shows where `positions` was left out and matters."""
        drawn = []
        for name, rule in (("start", "p = i"), ("end", f"p = i {'+' if Lk >= Lq else '-'} {abs(Lk - Lq)}")):
            title = f'positions="{name}" ({rule})'
            if Lq * Lk <= _ERROR_PAIRS:
                p = resolve_positions("", name, B=B, Lq=Lq, Lk=Lk)
                title += ":\n" + self._draw(p, B=B, Hq=Hq, Lk=Lk, b=0, h=0, cells=12)
            drawn.append(title)
        return "\n".join(drawn)

    def _positions(self, call: str, positions: Any, *, B: int, Hq: int, Lq: int, Lk: int) -> Tensor:
        if positions is None and Lq != Lk and self.depends_on_position:
            rule = "positions= must say where the queries stand when Lq != Lk and the mask depends on position"
            fix = 'Pass positions="start" or "end", drawn below, or the positions themselves'
            message = describe(call, rule, f"Lq={Lq}, Lk={Lk} and {self!r}", fix)
            raise ArgumentError(f"{message}\n{self.both_readings(Lq, Lk, B=B, Hq=Hq)}")
        return resolve_positions(call, positions, B=B, Lq=Lq, Lk=Lk)

    def _draw(self, p: Tensor, *, B: int, Hq: int, Lk: int, b: int, h: int, cells: int = 48) -> str:
        device = self._device()
        line = (p[b] if p.shape[0] > 1 else p[0]).to(device)
        j = torch.arange(Lk, device=device)
        at_b, at_h = (torch.full((1, 1), n, dtype=torch.int64, device=device) for n in (b, h))

        def rows(start: int, stop: int) -> Tensor:
            i = torch.arange(start, stop, device=device)[:, None]
            seen = self.visible(at_b, at_h, i, line[start:stop, None], j, B=B, Hq=Hq, Lq=line.numel(), Lk=Lk)
            return seen.expand(stop - start, Lk).cpu()

        return draw(rows, line.tolist(), Lk, cells)

    def _device(self) -> torch.device:
        """Where `tensor` and `picture` compute: the CPU, unless a tensor held by reference is elsewhere."""
        return torch.device("cpu")

    # What a leaf of an expression tells the two lowerings. `_cuts` and `_spans` are explained in intervals.py.
    def _cuts(self, b: int) -> Cuts | None:
        return None

    def _spans(self, rows: Rows) -> Spans:
        return anything()

    def _leaves(self, h: int) -> list[Mask]:
        return [self]

    def _decide(self, h: int, known: dict[Mask, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return known[self]

    def _lower(self, builder: Builder) -> None:
        raise NotImplementedError

    def _for_head(self, h: int) -> Mask:
        """The mask that head h sees, without per_head."""
        return self

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
        raise ArgumentTypeError(describe("bool(mask)", "a mask is neither true nor false", repr(self), fix))

    # A value: equal where constructor and arguments are equal. Subclasses are frozen dataclasses that keep these
    # three methods (eq=False, repr=False); names that begin with _ are caches.
    def _key(self) -> tuple[Any, ...]:
        return tuple(value for name, value in self.__dict__.items() if not name.startswith("_"))

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if type(self) is not type(other) or hash(self) != hash(other):
            return NotImplemented if not isinstance(other, Mask) else False
        return self._key() == other._key()  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        found: int | None = self.__dict__.get("_hash")
        if found is None:
            found = hash((type(self), self._key()))
            object.__setattr__(self, "_hash", found)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __copy__(self) -> Mask:
        return self

    def __deepcopy__(self, memo: Any) -> Mask:
        return self


@dataclass(frozen=True, eq=False, repr=False)
class _Several(Mask):
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

    def check(self, call: str, *, B: int, Hq: int, Lq: int, Lk: int, device: torch.device | str) -> None:
        for part in self.parts:
            part.check(call, B=B, Hq=Hq, Lq=Lq, Lk=Lk, device=device)

    def _device(self) -> torch.device:
        return next((d for d in (part._device() for part in self.parts) if d.type != "cpu"), torch.device("cpu"))

    def _leaves(self, h: int) -> list[Mask]:
        return [leaf for part in self.parts for leaf in part._leaves(h)]

    def _lower_with(self, builder: Builder, op: Op) -> None:
        for index, part in enumerate(self.parts):
            part._lower(builder)
            if index:
                builder.emit(op)

    def _joined(self, sign: str) -> str:
        return sign.join(f"({part!r})" if isinstance(part, _Several) else repr(part) for part in self.parts)


@dataclass(frozen=True, eq=False, repr=False)
class And(_Several):
    """Visible where every part allows it."""

    def visible(
        self, b: Tensor, h: Tensor, i: Tensor, p: Tensor, j: Tensor, *, B: int, Hq: int, Lq: int, Lk: int
    ) -> Tensor:
        return reduce(torch.bitwise_and, (m.visible(b, h, i, p, j, B=B, Hq=Hq, Lq=Lq, Lk=Lk) for m in self.parts))

    def _decide(self, h: int, known: dict[Mask, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        may, must = self.parts[0]._decide(h, known)
        for part in self.parts[1:]:
            more = part._decide(h, known)
            may, must = may & more[0], must & more[1]
        return may, must

    def _lower(self, builder: Builder) -> None:
        self._lower_with(builder, Op.AND)

    def _for_head(self, h: int) -> Mask:
        return And(tuple(part._for_head(h) for part in self.parts))

    def __repr__(self) -> str:
        return self._joined(" & ")


@dataclass(frozen=True, eq=False, repr=False)
class Or(_Several):
    """Visible where any part allows it."""

    def visible(
        self, b: Tensor, h: Tensor, i: Tensor, p: Tensor, j: Tensor, *, B: int, Hq: int, Lq: int, Lk: int
    ) -> Tensor:
        return reduce(torch.bitwise_or, (m.visible(b, h, i, p, j, B=B, Hq=Hq, Lq=Lq, Lk=Lk) for m in self.parts))

    def _decide(self, h: int, known: dict[Mask, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        may, must = self.parts[0]._decide(h, known)
        for part in self.parts[1:]:
            more = part._decide(h, known)
            may, must = may | more[0], must | more[1]
        return may, must

    def _lower(self, builder: Builder) -> None:
        self._lower_with(builder, Op.OR)

    def _for_head(self, h: int) -> Mask:
        return Or(tuple(part._for_head(h) for part in self.parts))

    def __repr__(self) -> str:
        return self._joined(" | ")


@dataclass(frozen=True, eq=False, repr=False)
class Not(Mask):
    """Visible where the part does not allow it, among the keys that exist."""

    part: Mask

    @property
    def depends_on_position(self) -> bool:
        return self.part.depends_on_position

    @property
    def varies_by_batch(self) -> bool:
        return self.part.varies_by_batch

    @property
    def varies_by_head(self) -> bool:
        return self.part.varies_by_head

    @property
    def fits_any_length(self) -> bool:
        return self.part.fits_any_length

    def check(self, call: str, *, B: int, Hq: int, Lq: int, Lk: int, device: torch.device | str) -> None:
        self.part.check(call, B=B, Hq=Hq, Lq=Lq, Lk=Lk, device=device)

    def visible(
        self, b: Tensor, h: Tensor, i: Tensor, p: Tensor, j: Tensor, *, B: int, Hq: int, Lq: int, Lk: int
    ) -> Tensor:
        return ~self.part.visible(b, h, i, p, j, B=B, Hq=Hq, Lq=Lq, Lk=Lk)

    def _device(self) -> torch.device:
        return self.part._device()

    def _leaves(self, h: int) -> list[Mask]:
        return self.part._leaves(h)

    def _decide(self, h: int, known: dict[Mask, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        may, must = self.part._decide(h, known)
        return ~must, ~may

    def _lower(self, builder: Builder) -> None:
        self.part._lower(builder)
        builder.emit(Op.NOT)

    def _for_head(self, h: int) -> Mask:
        return Not(self.part._for_head(h))

    def __repr__(self) -> str:
        return f"~({self.part!r})" if isinstance(self.part, _Several) else f"~{self.part!r}"


_TENSOR_OPERATORS: dict[Any, type[And] | type[Or]] = {
    Tensor.__and__: And,
    Tensor.__or__: Or,
    Tensor.bitwise_and: And,  # as torch.compile names them
    Tensor.bitwise_or: Or,
}


def _combine(combination: type[And] | type[Or], left: Any, right: Any) -> Mask:
    from qkv.masks.tensor import as_mask  # dense masks are masks: their file needs this one

    call = "mask & mask" if combination is And else "mask | mask"
    parts: list[Mask] = []
    for side in (left, right):
        mask = as_mask(side, call)
        if mask is None:
            given = f"None and {right if side is left else left!r}"
            raise ArgumentTypeError(describe(call, "both sides must be masks or bool tensors", given, "Leave it out"))
        # Flat, so that (a & b) & c equals a & (b & c).
        parts += mask.parts if isinstance(mask, combination) else (mask,)
    return combination(tuple(parts))
