"""What `qkv.see` returns: a call's statistics as a value that prints, is saved, compared, and looked into."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qkv.call.problem import Options
from qkv.call.statistics import Wanted
from qkv.checks import integer
from qkv.errors import ArgumentError, ArgumentTypeError
from qkv.insight.compare import Comparison, compared
from qkv.insight.held import Held
from qkv.insight.look import look
from qkv.insight.page import document, framed
from qkv.insight.record import Record
from qkv.insight.rectangle import rectangle
from qkv.insight.row import Row, row_of
from qkv.insight.store import load, save
from qkv.insight.text import text_of

LARGEST = 4096
"""Rows and keys of a rectangle of weights, at most."""


@dataclass(frozen=True, eq=False)
class Trace(Record):
    """Statistics of the weights of one call: small, whatever the length. Made by `qkv.see`.

    `print` it, save it with `save`, write it as a page with `html`. Statistics are exact; of the weights themselves
    there are the largest of every row. Any others are computed on demand, by `row` and `weights`, as long as the trace
    holds the tensors of its call.
    """

    # ------------------------------------------------------------------------------------------- what it can look up
    def row(self, i: int, head: int | None = None, batch: int = 0) -> Row:
        """One query in full: every key that it sees, with its score, weight and what it contributes.

        Parameters
        ----------
        i : int
            The query's index, from the end where negative.
        head : int
            One of `heads`; the first by default.
        batch : int

        Returns
        -------
        Row
            Print it.

        Raises
        ------
        ArgumentError
            A row or head that there is not; a trace that was read from a file and holds no tensors; tensors that were
            changed in place since `see`.

        Notes
        -----
        Cost: 2 D FLOPs a key.

        Examples
        --------
        >>> import torch, qkv
        >>> q = k = torch.eye(4)[None, None] * 4
        >>> t = qkv.see(q, k, k, tokens=["the", "cat", "sat", "down"])
        >>> t.row(2).keys[:2].tolist(), round(float(t.row(2).weights[0]), 3)
        ([2, 0], 0.999)
        """
        call = "Trace.row()"
        b, h = self._where(call, batch, head)
        return row_of(self, self._tensors(call), b, h, self._row(call, i, b))

    def weights(
        self, q: slice = slice(None), k: slice = slice(None), *, head: int | None = None, batch: int = 0
    ) -> Tensor:
        """The exact probabilities of a rectangle of queries and keys.

        Parameters
        ----------
        q, k : slice
            Consecutive queries and keys: at most 4,096 of each.
        head : int
            One of `heads`; the first by default.
        batch : int

        Returns
        -------
        p : Tensor, float64, shape (queries, keys)
            A row's weights of all keys sum to 1, or to less with a learned sink; here are those of the keys asked for.

        Raises
        ------
        ArgumentError
            A rectangle that is too large, a head that there is not, tensors that are not held or were changed.

        Notes
        -----
        Cost: 2 D FLOPs a pair of the rectangle: the rows' lse is known. A row whose |lse| exceeds 16 takes 2 D FLOPs
        for each of its keys more.

        Examples
        --------
        >>> import torch, qkv
        >>> q = k = torch.zeros(1, 1, 100_000, 8)
        >>> t = qkv.see(q, k, k, mask=qkv.sliding_window(2), top=0, bins=0)
        >>> t.weights(q=slice(90_000, 90_002), k=slice(89_999, 90_002))
        tensor([[0.5000, 0.5000, 0.0000],
                [0.0000, 0.5000, 0.5000]], dtype=torch.float64)
        """
        call = "Trace.weights()"
        b, h = self._where(call, batch, head)
        held = self._tensors(call)
        Lq, Lk = self.lengths[b]
        rows, keys = _span(call, "q", q, Lq), _span(call, "k", k, Lk)
        sizes = rows.stop - rows.start, keys.stop - keys.start
        if max(sizes) > LARGEST:
            rule = f"a rectangle has at most {LARGEST:,} queries and {LARGEST:,} keys"
            given = f"{sizes[0]:,} queries and {sizes[1]:,} keys: {8 * sizes[0] * sizes[1] / 1e9:,.1f} GB of float64"
            raise ArgumentError.of(
                call, rule, given, "Pass q=slice(0, 256), k=slice(0, 256), or look at .statistics.map"
            )
        part = held.part_of(call, b)
        mine = torch.tensor([self.heads.index(h)], dtype=torch.int64, device="cpu")
        return rectangle(part.problem, part.inputs, self.statistics.lse, b, mine, rows, keys).weights[0]

    def attach(self, q: Tensor, k: Any, v: Tensor | None = None, mask: Any = None, **options: Any) -> Trace:
        """The trace with the tensors of its call, after it was read from a file: `row` and `weights` work again.

        Parameters
        ----------
        q, k, v, mask, **options
            As they were given to `qkv.see`.

        Returns
        -------
        Trace

        Raises
        ------
        ArgumentError
            Tensors whose sizes or lse are not those of this trace.
        """
        call = "Trace.attach()"
        heads = None if len(self.heads) == self.shapes.Hq else list(self.heads)
        backend = options.pop("backend", None)
        again = look(type(self), q, k, v, mask, Options(**options), backend, Wanted(), heads)
        if again.shapes != self.shapes or again.lengths != self.lengths:
            given = f"{tuple(self.shapes)} and {tuple(again.shapes)}"
            raise ArgumentError.of(
                call, "the tensors must have the trace's sizes", given, "Pass those given to qkv.see()"
            )
        here, there = self.statistics.lse.double(), again.statistics.lse.double()
        apart = ((here - there).abs() > 1e-3 * (1 + there.abs())) & ~(here == there)
        if bool(apart.any()):
            given = f"lse that differs by up to {float((here - there).abs().nan_to_num(0).max()):.3g}"
            fix = "Pass the tensors, mask and options that were given to qkv.see()"
            raise ArgumentError.of(call, "the tensors must be those of the trace's call", given, fix)
        return replace(self, held=again.held)

    def compare(self, other: Trace) -> Comparison:
        """Where two traces differ most: two runs, kernels or checkpoints on inputs of one size.

        Parameters
        ----------
        other : Trace

        Returns
        -------
        Comparison
            Print it.

        Raises
        ------
        ArgumentError
            Traces of different sizes.
        """
        return compared(self, other)

    def _tensors(self, call: str) -> Held:
        if self.held is None:
            rule = "a trace that was read from a file holds statistics, not the tensors of its call"
            fix = "Pass them with t = t.attach(q, k, v, mask=...), as they were given to qkv.see()"
            raise ArgumentError.of(call, rule, "no q and k", fix)
        return self.held

    def _where(self, call: str, batch: Any, head: Any) -> tuple[int, int]:
        b = integer(call, "batch", batch, 0, self.shapes.B - 1)
        if head is None:
            head = self.heads[0] if self.heads else 0
        h = integer(call, "head", head)
        if h not in self.heads:
            given = f"head={h} and heads {list(self.heads)[:12]}"
            raise ArgumentError.of(call, "head must be one that was traced", given, "Pass heads= to qkv.see()")
        return b, h

    def _row(self, call: str, i: Any, b: int) -> int:
        Lq = self.lengths[b][0]
        at = integer(call, "i", i, -Lq, Lq - 1)
        return at + Lq if at < 0 else at

    # ------------------------------------------------------------------------------------------------ where it goes
    def __str__(self) -> str:
        return self.text()

    def text(self, *, width: int | None = None, ascii: bool = False) -> str:
        """The trace for a terminal.

        Parameters
        ----------
        width : int
            Columns; the terminal's own unless given, 80 where there is none.
        ascii : bool
            Draw with letters of ASCII alone.

        Returns
        -------
        str
        """
        return text_of(self, width=width, ascii=ascii)

    def html(self, path: str | os.PathLike[str], *, rows: Sequence[int] = ()) -> None:
        """Write it as a page: one file of HTML, opened from disk, which loads nothing and sends nothing.

        Parameters
        ----------
        path : str or PathLike
        rows : sequence of int
            Queries to show in full, number by number, besides the first, the last, the sharpest and the flattest.

        Raises
        ------
        ArgumentError
            A row that there is not; tensors that were changed in place since `see`.

        Notes
        -----
        Under 5 MB at any length: maps are pooled, and weights computed exactly in windows. A trace that holds no
        tensors (`load`, `without_tensors`) has a page without single queries and tiles, which says so.

        Examples
        --------
        >>> import tempfile, torch, qkv
        >>> q = torch.randn(1, 2, 8, 4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     qkv.see(q, q, q, tokens=list("abcdefgh")).html(f"{folder}/page.html", rows=[3])
        """
        call, Lq = "Trace.html()", self.shapes.Lq
        wanted = [integer(call, "rows", i, -Lq, Lq - 1) for i in rows]
        page = document(self, wanted)
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.write(page)

    def _repr_html_(self) -> str:
        """The page in a frame of its own, for notebooks."""
        return framed(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file: .json or .npz, by the name's ending. Tensors of the call are not written.

        Parameters
        ----------
        path : str or PathLike

        Raises
        ------
        ArgumentError
            Another ending.
        """
        save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Read what `save` wrote.

        Parameters
        ----------
        path : str or PathLike

        Returns
        -------
        Trace
            Equal in every bit; `row` and `weights` need `attach` first.

        Raises
        ------
        ArgumentError
            A file that is no trace, or of a later version.

        Examples
        --------
        >>> import tempfile, torch, qkv
        >>> q = torch.randn(1, 2, 8, 4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     qkv.see(q, q, q).save(f"{folder}/trace.json")
        ...     qkv.insight.Trace.load(f"{folder}/trace.json").shapes.Hq
        2
        """
        return load(cls, path)

    def without_tensors(self) -> Trace:
        """The same trace, which keeps no tensor of its call alive.

        Returns
        -------
        Trace
        """
        return replace(self, held=None)


def _span(call: str, name: str, wanted: Any, length: int) -> slice:
    if isinstance(wanted, int) and not isinstance(wanted, bool):
        at = integer(call, name, wanted, -length, length - 1) % length
        return slice(at, at + 1)
    if not isinstance(wanted, slice):
        raise ArgumentTypeError.of(call, f"{name} is a slice", f"{name}={wanted!r}", f"Pass {name}=slice(0, 256)")
    try:
        start, stop, step = wanted.indices(length)
    except TypeError:
        raise ArgumentTypeError.of(
            call, f"{name} is a slice of ints", f"{name}={wanted}", "Use slice(0, 256)"
        ) from None
    if step != 1:
        raise ArgumentError.of(call, f"{name} takes consecutive tokens", f"{name}={wanted}", "Leave the step out")
    return slice(start, max(start, stop))
