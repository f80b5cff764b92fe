"""What every kind of mask says of itself: its definition, its key ranges, its two lowered forms, its value."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from qkv.checks import Operand
from qkv.errors import UnsupportedError
from qkv.masks.intervals import Cuts, Intervals, Rows, Spans, anything, compute
from qkv.masks.program import Builder, Program
from qkv.masks.tile import Sizes, Tile

CPU = torch.device("cpu")


class Rule:
    """Which keys each query may attend to: what a kind of mask defines, and what follows from it."""

    op: ClassVar[int] = -1  # its number in both lowered forms, that of csrc/mask/kinds.h; saved graphs hold it
    kinds: ClassVar[dict[int, type[Rule]]] = {}  # opcode -> class

    def __init_subclass__(cls, op: int | None = None) -> None:
        if op is not None:
            cls.op = op
            cls.kinds[op] = cls

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
        """Whether its check is the same for all numbers of queries and keys."""
        return False

    def check(self, call: str, sizes: Sizes) -> None:
        """Raise a typed error unless the mask fits a call.

        Parameters
        ----------
        call : str
            The public function, for messages.
        sizes : Sizes
            Of the call, and its device.
        """

    def visible(self, at: Tile, sizes: Sizes) -> Tensor:
        """May query i, at position p, of batch row b and query head h attend to key j? The definition.

        Parameters
        ----------
        at : Tile
            Of its members only b, h, i, p and j are looked at: int64 tensors that broadcast, with 0 <= j < Lk; p may be
            any integer.
        sizes : Sizes
            Of the whole call.

        Returns
        -------
        Tensor, bool
            Broadcasts with the five: a mask that does not look at b and h returns one without these dimensions' sizes.
        """
        raise NotImplementedError

    def intervals(
        self,
        first: Tensor,
        last: Tensor,
        *,
        b: int = 0,
        h: int = 0,
        Lk: int,
        Lq: int,
        i_first: Tensor | None = None,
        Hq: int | None = None,
    ) -> Intervals:
        """The key ranges that tiles of queries see, for batch row b and query head h.

        Parameters
        ----------
        first, last : Tensor, int64, shape (T,)
            The positions of each tile's first and last query, consecutive in between.
        b, h : int
        Lk, Lq : int
            The numbers of keys and queries.
        i_first : Tensor, int64, shape (T,)
            The index of each tile's first query; the same as `first` unless given.
        Hq : int
            The number of query heads: `selected_blocks`, whose lists heads share, is conservative without it.

        Returns
        -------
        Intervals
            Exact for every composition of causal, sliding_window, window, prefix, padding, documents and chunked;
            otherwise the visible ranges may be too wide and the full ones too narrow, never the reverse.

        Notes
        -----
        Cost: O(T + documents + cuts between tiles) time and memory, never anything a row.

        Examples
        --------
        >>> import torch, qkv
        >>> ranges = qkv.sliding_window(100).intervals(torch.tensor([0, 640]), torch.tensor([63, 703]), Lq=999, Lk=999)
        >>> ranges.visible_start.tolist(), ranges.visible_stop.tolist()
        ([[0], [541]], [[64], [704]])
        >>> ranges.full_start.tolist(), ranges.full_stop.tolist()
        ([[0], [604]], [[1], [641]])
        """
        first, last = (x.detach().to("cpu", torch.int64) for x in (first, last))
        i_first = first if i_first is None else i_first.detach().to("cpu", torch.int64)
        return compute(self, first, last, i_first, b=b, h=h, Lq=Lq, Lk=Lk, Hq=Hq)

    def words(self) -> str:
        """Which keys a query sees, as the end of a sentence.

        Returns
        -------
        str

        Examples
        --------
        >>> import qkv
        >>> (qkv.causal() & (qkv.prefix(4) | qkv.sliding_window(256))).words()
        'itself and the keys before it and of those only the first 4 keys or the last 256 keys up to itself'
        """
        return repr(self)

    def program(self) -> Program | None:
        """The mask lowered for a compiled kernel, for calls of any sizes; None where it calls a Python function."""
        builder = Builder()
        self._lower(builder)
        return builder.finish()

    def _device(self) -> torch.device:
        """Where `tensor` and `picture` compute: the CPU, unless a tensor held by reference is elsewhere."""
        return CPU

    # What a leaf of an expression tells to `intervals`; `_cuts` and `_spans` are explained in intervals.py.
    def _cuts(self, b: int) -> Cuts | None:
        return None

    def _spans(self, rows: Rows) -> Spans:
        return anything()

    def _period(self) -> tuple[int, int] | None:
        """(n, r), where it sees of its ranges exactly the keys with (p - j) % n == r."""
        return None

    @property
    def _has_ranges(self) -> bool:
        """Whether it knows any ranges at all."""
        return type(self)._spans is not Rule._spans

    def _leaves(self, h: int) -> list[Rule]:
        return [self]

    def _decide(self, h: int, leaves: dict[Rule, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return leaves[self]

    def _for_head(self, h: int) -> Rule:
        """The mask that head h sees, without per_head."""
        return self

    def of_heads(self, start: int, stop: int, Hq: int) -> Rule:
        """The mask for a call that has some of the query heads alone.

        Parameters
        ----------
        start, stop : int
            Which: 0 <= start < stop <= Hq.
        Hq : int
            Query heads of the whole.

        Returns
        -------
        Mask

        Examples
        --------
        >>> import qkv
        >>> qkv.per_head([qkv.causal(), qkv.prefix(3), qkv.prefix(5)]).of_heads(1, 3, 3)
        per_head([prefix(3), prefix(5)])
        """
        return self

    # The two lowered forms. The graph form is the opcode, some integers and some tensors; a mask without tensors is the
    # same for a kernel.
    def _numbers(self) -> tuple[int, ...]:
        """The numbers of the lowered forms: those among the fields, in their order, unless a class says otherwise."""
        return tuple([x for x in self._fields() if isinstance(x, int)])

    def _tensors(self) -> tuple[Tensor, ...]:
        """The tensors of the form for graphs, likewise."""
        return tuple([x.tensor for x in self._fields() if isinstance(x, Operand)])

    def _fields(self) -> list[Any]:
        # Not by __dict__: torch.compile would guard how much is remembered in it.
        return [getattr(self, name) for name in type(self).__match_args__]  # type: ignore[attr-defined]

    def _lower(self, builder: Builder) -> None:
        builder.emit(self.op, *self._numbers())

    def _encode(self, call: str, words: list[int], tensors: list[Tensor]) -> None:
        """Append the graph form. Tracers follow this: plain branches, and no look into a tensor."""
        if self.op < 0:
            rule = "a mask that is a Python function cannot be part of a graph"
            fix = "Build it from qkv's masks, pass a bool tensor, or call attention outside of the traced function"
            raise UnsupportedError.of(call, rule, f"{type(self).__name__} while tracing", fix)
        words += [self.op, *self._numbers()]
        tensors += self._tensors()

    @classmethod
    def _decode(cls, words: Iterator[int], tensors: Iterator[Tensor]) -> Rule:
        """The mask whose opcode was read from `words`, made of what follows it."""
        raise NotImplementedError

    @property
    def _reads_position(self) -> bool:
        """`depends_on_position`, as far as that can be told without looking into tensors."""
        return self.depends_on_position

    @property
    def _by_distance(self) -> bool:
        """Whether it looks at p - j alone."""
        return False

    # A value: equal where constructor and arguments are equal. Subclasses are frozen dataclasses that keep these
    # methods (eq=False, repr=False); names that begin with _ are caches.
    def _key(self) -> tuple[Any, ...]:
        return tuple(value for name, value in self.__dict__.items() if not name.startswith("_"))

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if type(self) is not type(other) or hash(self) != hash(other):
            return NotImplemented if not isinstance(other, Rule) else False
        return self._key() == other._key()  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        value: int | None = self.__dict__.get("_hash")
        if value is None:
            value = hash((type(self), self._key()))
            object.__setattr__(self, "_hash", value)
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __copy__(self) -> Rule:
        return self

    def __deepcopy__(self, memo: Any) -> Rule:
        return self


def remade(mask: Any, parts: Sequence[Rule]) -> Rule:
    """A composition with other parts."""
    own = {"part": parts[0]} if hasattr(mask, "part") else {"parts": tuple(parts)}
    made: Rule = replace(mask, **own)
    return made
