"""Where the native kernels put what a call's weights come to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from qkv.call.statistics import Statistics, Wanted

MOST_TOP = 64
"""Keys of a row that the kernels rank (csrc/attention.h)."""

_CPU = torch.device("cpu")
_OPEN = -1.0  # an entropy or a distance that is not known yet
_SAMPLED = 4096  # rows that are looked at for progress
_SECONDS = 0.2  # between two looks


class Places:
    """The tensors of one call's statistics, and their addresses.

    rows: (B, H, Lq) of lse and the like. sequences, keys: of `mass` and `map`, which sum over rows. What sums is 0, for
    kernels to add to.
    """

    def __init__(
        self, rows: tuple[int, int, int], sequences: int, keys: int, kind: torch.dtype, wanted: Wanted
    ) -> None:
        self.keys = keys

        def new(*size: int, dtype: torch.dtype = kind) -> Tensor:
            return torch.empty(size, dtype=dtype, device=_CPU)

        self.lse, self.softmax = new(*rows), new(3, *rows)
        # Rows' states are what the second pass makes weights of.
        self.state = new(2, *rows) if wanted.weights else None
        self.distance = new(*rows) if wanted.distance else None
        self.top_keys = new(*rows, wanted.top, dtype=torch.int64) if wanted.top else None
        self.top_weights = new(*rows, wanted.top) if wanted.top else None
        exact, heads = torch.float64, rows[1]
        self.mass = torch.zeros(sequences, heads, keys, dtype=exact, device=_CPU) if wanted.mass else None
        bins = wanted.bins
        self.map = None if bins is None else torch.zeros(sequences, heads, *bins, dtype=exact, device=_CPU)

    @contextmanager
    def telling(self, progress: Callable[[float], None] | None) -> Iterator[None]:
        """Tells how many of the rows are there, while kernels write them."""
        if progress is None:
            yield
            return
        ends = [self.softmax[2], *([] if self.distance is None else [self.distance])]
        samples = [t.fill_(_OPEN).flatten()[:: max(1, t.numel() // _SAMPLED)] for t in ends]
        over = threading.Event()

        def look() -> None:
            while not over.wait(_SECONDS):
                progress(sum(float((x != _OPEN).double().mean()) for x in samples) / len(samples))

        looker = threading.Thread(target=look, daemon=True)
        looker.start()
        try:
            yield
        finally:
            over.set()
            looker.join()

    def of_rows(self) -> list[int]:
        return [self.lse.data_ptr(), 0 if self.state is None else self.state.data_ptr(), self.softmax.data_ptr()]

    def of_weights(self) -> list[int]:
        """As csrc/bindings.cpp has them; a tensor without elements has no address and is not wanted."""
        keys, pooled = self.top_keys, self.map
        return [
            0 if keys is None or not keys.numel() else keys.shape[-1], _address(keys), _address(self.top_weights),
            _address(self.distance), _address(self.mass), self.keys, _address(pooled),
            *((0, 0) if pooled is None else pooled.shape[2:]),
        ]  # fmt: skip

    def statistics(self, queries: Sequence[int] | None = None) -> Statistics:
        """What was found; queries: of the sequences whose rows follow each other, which then stand side by side."""

        def placed(t: Tensor) -> Tensor:
            return t if queries is None else _side_by_side(t, queries)

        def where_wanted(t: Tensor | None) -> Tensor | None:
            return None if t is None else placed(t)

        score, weight, entropy = map(placed, self.softmax)
        return Statistics(
            placed(self.lse), score, weight, entropy, where_wanted(self.distance), where_wanted(self.top_keys),
            where_wanted(self.top_weights), self.mass, self.map,
        )  # fmt: skip


def _address(t: Tensor | None) -> int:
    return 0 if t is None or not t.numel() else t.data_ptr()


def _side_by_side(packed: Tensor, queries: Sequence[int]) -> Tensor:
    """(1, H, all rows, ...) as (sequences, H, most rows, ...); past a sequence's rows there is NaN, in keys -1."""
    nothing = torch.nan if packed.is_floating_point() else -1
    to = packed.new_full((len(queries), packed.shape[1], max(queries, default=0), *packed.shape[3:]), nothing)
    first = 0
    for i, count in enumerate(queries):
        to[i, :, :count] = packed[0, :, first : first + count]
        first += count
    return to
