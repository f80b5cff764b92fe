"""A call as data: as it was given (`Options`), checked (`Problem`), its tensors (`Inputs`), its result (`Output`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkv.masks import Mask, Sizes
from qkv.masks.program import Program
from qkv.scores import ScoreTerm, TermSpec

CALL = "qkv.attention()"
"""What messages say was called; `call` is such a name everywhere."""


class Options(NamedTuple):
    """The keyword arguments of attention() and its relatives, as the user gave them."""

    positions: Any = None
    bias: Any = None
    scale: Any = None
    softcap: Any = None
    sinks: Any = None
    dropout_p: Any = 0.0
    return_lse: Any = False


@dataclass(frozen=True)
class Problem:
    """One attention call without its data: everything a backend needs to know to say whether, and how, it will run."""

    call: str  # the public function, for messages
    B: int
    Hq: int
    Hkv: int
    Lq: int
    Lk: int
    D: int
    Dv: int
    dtype: torch.dtype
    device: str  # the device's type, such as "cpu"
    mask: Mask | None
    positions: str | tuple[int, ...]  # "start", "end", the position of query 0 (one, or one a batch row), or "tensor"
    scale: float
    softcap: float | None
    bias: tuple[TermSpec, ...]
    has_sinks: bool
    dropout_p: float
    needs_grad: bool  # a backward pass may follow: what it starts from, lse and state, is wanted too
    needs_lse: bool
    part: bool = False  # its keys are a part of those that rows see: states are joined, and given to gradients

    @cached_property
    def program(self) -> Program | None:
        """The mask lowered for a compiled kernel, once; None without a mask and for one that is a Python function."""
        return None if self.mask is None else self.mask.program()

    @property
    def sizes(self) -> Sizes:
        """What the mask is asked with."""
        return Sizes(self.B, self.Hq, self.Lq, self.Lk, self.dtype)

    @property
    def group(self) -> int:
        """Query heads per key/value head: query head h reads head h // group."""
        return self.Hq // self.Hkv if self.Hkv else 1

    @property
    def accumulate(self) -> torch.dtype:
        """The dtype of scores, sums and lse: float64 for float64, else float32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def varies_by_batch(self) -> bool:
        """Whether two batch rows can see different keys, the data aside."""
        own_positions = self.positions == "tensor" or (isinstance(self.positions, tuple) and len(self.positions) > 1)
        return own_positions or (self.mask is not None and self.mask.varies_by_batch)

    @property
    def varies_by_head(self) -> bool:
        return self.mask is not None and self.mask.varies_by_head

    def offset(self, b: int) -> int:
        """The position of query 0 in batch row b; only where positions are not a tensor."""
        if isinstance(self.positions, tuple):
            return self.positions[b if len(self.positions) > 1 else 0]
        return self.Lk - self.Lq if self.positions == "end" else 0


class Inputs(NamedTuple):
    """The tensors of one call. `bias` is lowered (no T5 buckets), `positions` is (B or 1, Lq) int64 or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    positions: Tensor | None = None
    bias: ScoreTerm | None = None
    sinks: Tensor | None = None
    seed: int = 0


class Output(NamedTuple):
    """out (B, Hq, Lq, Dv) in q's dtype; lse (B, Hq, Lq) in the accumulation dtype, or None where nobody asked.

    `state` is what a backend's own backward pass recomputes weights from: (2, B, Hq, Lq) in the accumulation dtype,
    contiguous. state[0] = m is the largest score of the row, or its sink, if that is larger (-inf where there is
    neither); state[1] = l, the sum of exp(score - m). lse is m + log l, rounded: weights exp(score - m) / l add up to 1
    at any magnitude, exp(score - lse) do not. The backend that made it may keep m in a unit of its own.
    """

    out: Tensor
    lse: Tensor | None
    state: Tensor | None = None

    def rows(self, unit: float) -> Tensor:
        """(2, B, Hq, Lq): m as the definition counts scores, a state's being in `unit`, and l; float64.

        Without a state they are lse and 1."""
        if self.state is not None:
            m, l = self.state.double()
            return torch.stack((m * unit, l))
        assert self.lse is not None
        lse = self.lse.double()
        return torch.stack((lse, (lse != -torch.inf).double()))


def query_positions(problem: Problem, positions: Tensor | None, device: torch.device | str) -> Tensor:
    """The positions of all queries, int64, shape (B or 1, Lq)."""
    if positions is not None:
        return positions
    offsets = problem.positions if isinstance(problem.positions, tuple) else (problem.offset(0),)
    i = torch.arange(problem.Lq, device=device)
    return i + torch.tensor(offsets, dtype=torch.int64, device=device)[:, None]


def join_batch(t: Tensor, mapped: int | None, count: int, batch: int) -> Tensor:
    """A tensor whose mapped dimension, or `count` times the same where none is, has joined its dimension `batch`."""
    if mapped is None:
        return t.unsqueeze(batch).expand(*t.shape[:batch], count, *t.shape[batch:]).flatten(batch, batch + 1)
    return t.movedim(mapped, batch).flatten(batch, batch + 1)


def one_by_one(function: Any, count: int, dims: Sequence[Any], given: Sequence[Any]) -> tuple[Any, Any]:
    """A function over a mapped dimension, sample by sample: its results, stacked, and their mapped dimensions.

    Lists of tensors among what is given or found have lists of dimensions. Of no sample at all only shapes are known:
    those of zeros.
    """

    def sample(x: Any, dim: Any, n: int) -> Any:
        if isinstance(x, (list, tuple)):
            return [sample(t, d, n) for t, d in zip(x, dim or [None] * len(x), strict=True)]
        return x if dim is None else x.select(dim, n) if count else x.new_zeros(x.movedim(dim, 0).shape[1:])

    def stacked(parts: tuple[Any, ...]) -> Any:
        return (
            list(map(stacked, zip(*parts, strict=True))) if isinstance(parts[0], list) else torch.stack(parts)[:count]
        )

    every = range(max(count, 1))
    samples = [function(*(sample(x, dim, n) for x, dim in zip(given, dims, strict=True))) for n in every]
    found = tuple(map(stacked, zip(*samples, strict=True)))
    return found, tuple([0] * len(x) if isinstance(x, list) else 0 for x in found)


def dense_strides(size: Sequence[int], like: Sequence[int]) -> tuple[int, ...]:
    """Strides that store `size` densely, in the order of dimensions that the strides `like` have.

    Dimensions that `like` does not order (stride 0, as after expand) keep their place.
    """
    order = [0]
    for dim in range(1, len(size)):
        place = len(order)
        while place and like[dim] and like[order[place - 1]] and like[dim] > like[order[place - 1]]:
            place -= 1
        order.insert(place, dim)
    strides, step = [0] * len(size), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(size[dim], 1)
    return tuple(strides)


def empty_output(q: Tensor, Dv: int) -> Tensor:
    """An uninitialised (B, Hq, Lq, Dv) tensor in q's dtype and order of dimensions in memory."""
    size = (*q.shape[:3], Dv)
    return torch.empty_strided(size, dense_strides(size, q.stride()), dtype=q.dtype, device=q.device)
