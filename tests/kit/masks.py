"""The kinds of masks, one row a kind: its definition, written again without qkv, and its random arguments.

The oracle, the generator and the laws (`tests.kit.mask_specs`) read this table. Nothing here imports qkv: the
definitions are written from the table of the design. Most kinds have two, by row with NumPy and by
pair in plain Python.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Rng = np.random.Generator
Array = NDArray[Any]
Spec = tuple[Any, ...]  # a mask or a bias as data: ("and", ("causal",), ("sliding_window", 4))


class Geometry(NamedTuple):
    B: int
    Hq: int
    Lq: int
    Lk: int


# -------------------------------------------------------------------------------------------------- drawing
def pick(rng: Rng, *choices: Any, p: Any = None) -> Any:
    """One of the choices, as it was given (NumPy's own choice would turn them into NumPy scalars)."""
    return choices[int(rng.choice(len(choices), p=p))]


def upto(rng: Rng, high: int, low: int = 0) -> int:
    return int(rng.integers(low, high + 1)) if high >= low else low


def chance(rng: Rng, share: float) -> bool:
    return bool(rng.random() < share)


def split(rng: Rng, total: int, parts: int) -> tuple[int, ...]:
    """`parts` lengths >= 0 that sum to total; some are 0."""
    cuts = np.sort(rng.integers(0, total + 1, max(0, parts - 1)))
    return tuple(int(x) for x in np.diff([0, *cuts, total]))


def _ids(rng: Rng, shape: tuple[int, ...]) -> NDArray[np.int64]:
    return rng.integers(-1, 4, shape).astype(np.int64)


def partition(rng: random.Random, total: int, parts: int) -> list[int]:
    borders = sorted(rng.randint(0, total) for _ in range(parts - 1))
    return [b - a for a, b in zip([0, *borders], [*borders, total], strict=True)]


def document(lengths: list[int], x: int) -> int:
    if x < 0:
        return -1
    for d, n in enumerate(lengths):
        if x < n:
            return d
        x -= n
    return -1


@dataclass
class Sizes:
    B: int
    Hq: int
    Lq: int
    Lk: int


class Small(NamedTuple):
    """Arguments for the laws of `tests.kit.mask_specs`, and what they mean, said again one pair at a time."""

    args: tuple[Any, ...]
    sees: Callable[[int, int, int, int, int], bool]  # b, h, i, p, j
    exact: bool = True  # whether intervals() must be exact


class Draw(NamedTuple):
    """What the random arguments of a mask are drawn from."""

    rng: Rng
    sizes: dict[str, int]
    last: int  # the highest position of a query
    near: int
    indices: tuple[int, ...]

    def pick(self, *choices: Any) -> Any:
        return pick(self.rng, *choices)

    def block(self) -> int:
        return int(self.pick(1, 2, 5, 16, 64))


class Kind(NamedTuple):
    """One kind of mask that is no composition.

    `see` is its definition for the oracle and `draw` its arguments for the generator, which takes it `share` times as
    often as one of share 1. `small` is for the laws; a kind without has its own lines in `tests.kit.mask_specs`.
    `exact`: the intervals of every composition of such kinds are exact.
    """

    name: str
    share: int
    see: Callable[..., Array]
    draw: Callable[[Draw], tuple[Any, ...]]
    small: Callable[[random.Random, Sizes], Small] | None = None
    exact: bool = False


# ------------------------------------------------------------------------------------- definitions: the oracle
class Row(NamedTuple):
    """One query: batch row, head, index and position; and the keys asked about."""

    b: int
    h: int
    i: int
    p: int
    j: Array
    geo: Geometry


def _window(r: Row, left: int | None, right: int | None) -> Array:
    seen = np.ones(r.j.shape, bool)
    if left is not None:
        seen &= r.j >= r.p - left
    if right is not None:
        seen &= r.j <= r.p + right
    return seen


def _prefix(r: Row, n: Any) -> Array:
    return r.j < (n if isinstance(n, int) else n[r.b])


def _padding(r: Row, lengths: Any, side: str) -> Array:
    return r.j < lengths[r.b] if side == "right" else r.j >= r.geo.Lk - lengths[r.b]


def _same_document(r: Row, q_ids: Array, k_ids: Array, at: int) -> Array:
    if not 0 <= at < q_ids.shape[-1]:
        return np.zeros(r.j.shape, bool)
    mine = q_ids[r.b if len(q_ids) > 1 else 0, at]
    theirs = k_ids[r.b if len(k_ids) > 1 else 0, r.j]
    return (theirs == mine) & (theirs >= 0) & bool(mine >= 0)


def _documents(r: Row, lengths: Any, k_lengths: Any) -> Array:
    ids = np.repeat(np.arange(len(lengths)), lengths)[None]
    if k_lengths is None:
        return _same_document(r, ids, ids, r.p)
    return _same_document(r, ids, np.repeat(np.arange(len(k_lengths)), k_lengths)[None], r.i)


def _segments(r: Row, ids: Array, k_ids: Array | None) -> Array:
    if k_ids is None:
        return _same_document(r, np.atleast_2d(ids), np.atleast_2d(ids), r.p)
    return _same_document(r, np.atleast_2d(ids), np.atleast_2d(k_ids), r.i)


def _global(r: Row, indices: Any) -> Array:
    return np.isin(r.j, indices) | (r.p in tuple(indices))


@cache
def random_key_blocks(per_row: int, seed: int, query_block: int, key_blocks: int) -> tuple[int, ...]:
    """Floyd's sample of min(per_row, key_blocks) distinct blocks, drawn with splitmix64."""
    word = (1 << 64) - 1
    chosen: list[int] = []
    for t in range(key_blocks - min(per_row, key_blocks), key_blocks):
        x = (seed * 0x9E3779B97F4A7C15 + query_block * 0xBF58476D1CE4E5B9 + t * 0x94D049BB133111EB) & word
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & word
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & word
        x ^= x >> 31
        chosen.append(t if x % (t + 1) in chosen else x % (t + 1))
    return tuple(chosen)


def _random(r: Row, per_row: int, block: int, seed: int) -> Array:
    return np.isin(r.j // block, random_key_blocks(per_row, seed, r.p // block, -(-r.geo.Lk // block)))


def _blocks(r: Row, table: Array, block: int) -> Array:
    t = table.reshape((1,) * (4 - table.ndim) + table.shape)
    row = r.p // block
    if not 0 <= row < t.shape[2]:
        return np.zeros(r.j.shape, bool)
    return t[r.b if t.shape[0] > 1 else 0, r.h if t.shape[1] > 1 else 0, row][r.j // block]


def _selected(r: Row, lists: Array, block: int, queries: int) -> Array:
    rows_b, heads = lists.shape[:2]
    return np.isin(r.j // block, lists[r.b if rows_b > 1 else 0, r.h // (r.geo.Hq // heads), r.i // queries])


def _dense(r: Row, table: Array) -> Array:
    t = table.reshape((1,) * (4 - table.ndim) + table.shape)
    t = t[r.b if t.shape[0] > 1 else 0, r.h if t.shape[1] > 1 else 0, r.i if t.shape[2] > 1 else 0]
    return t[r.j] if len(t) > 1 else np.broadcast_to(t, r.j.shape)


def _bigbird(r: Row, block: int, window_blocks: int, global_blocks: int, random_blocks: int, seed: int) -> Array:
    half = window_blocks * block // 2
    anchors = (r.j < global_blocks * block) | (0 <= r.p < global_blocks * block)
    return _window(r, half, half) | anchors | _random(r, random_blocks, block, seed)


def _longformer(r: Row, window: int, indices: Any, dilation: int) -> Array:
    return _dilated(r, window // 2, dilation) | _global(r, indices)


def _dilated(r: Row, window: int, step: int) -> Array:
    return (abs(r.p - r.j) <= window * step) & ((r.p - r.j) % step == 0)


# Functions for mask_mod: the same expression serves NumPy here and torch in qkv.
MASK_MODS: dict[str, Callable[[Any, Any, Any, Any], Any]] = {
    "checker": lambda b, h, p, j: (p + j + h + b) % 3 != 0,
    "near_or_even": lambda b, h, p, j: ((p - j) * (p - j) < 50) | (j % 4 == b % 2),
    "hollow": lambda b, h, p, j: (j < p - 3) & (j % 7 != p % 7),
}


def _splitmix(seed: int, row: int, draw: int) -> int:
    word = 2**64
    x = (seed * 0x9E3779B97F4A7C15 + row * 0xBF58476D1CE4E5B9 + draw * 0x94D049BB133111EB) % word
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % word
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % word
    return x ^ (x >> 31)


def drawn_blocks(per_row: int, block: int, seed: int, row: int, Lk: int) -> set[int]:
    blocks = (Lk + block - 1) // block
    chosen: set[int] = set()
    for last in range(blocks - min(per_row, blocks), blocks):
        pick = _splitmix(seed, row, last) % (last + 1)
        chosen.add(last if pick in chosen else pick)
    return chosen


# ------------------------------------------------------------------------------------ random arguments: generator
def _draw_causal(d: Draw) -> tuple[Any, ...]:
    d.block()  # drawn and left, as other kinds draw one: what follows stays what it was
    return ()


def _draw_prefix(d: Draw) -> tuple[Any, ...]:
    Lk = d.sizes["Lk"]
    return (upto(d.rng, Lk + 1) if chance(d.rng, 0.6) else tuple(upto(d.rng, Lk + 1) for _ in range(d.sizes["B"])),)


def _draw_padding(d: Draw) -> tuple[Any, ...]:
    Lk = d.sizes["Lk"]
    lengths = tuple(d.pick(0, Lk, upto(d.rng, Lk), upto(d.rng, Lk)) for _ in range(d.sizes["B"]))
    return lengths, d.pick("right", "left")


def _draw_documents(d: Draw) -> tuple[Any, ...]:
    if chance(d.rng, 0.7):
        return split(d.rng, d.sizes["Lk"], upto(d.rng, 5, 1)), None
    parts = upto(d.rng, 5, 1)
    return split(d.rng, d.sizes["Lq"], parts), split(d.rng, d.sizes["Lk"], parts)


def _draw_segments(d: Draw) -> tuple[Any, ...]:
    Lq, Lk = d.sizes["Lq"], d.sizes["Lk"]
    lead = () if chance(d.rng, 0.5) else (d.sizes["B"],)
    own = chance(d.rng, 0.6)
    return _ids(d.rng, (*lead, Lk if own else Lq)), None if own else _ids(d.rng, (*lead, Lk))


def _draw_random(d: Draw) -> tuple[Any, ...]:
    block = d.block()
    return d.pick(1, 2, 3, 7), block, upto(d.rng, 99)


def _draw_blocks(d: Draw) -> tuple[Any, ...]:
    block, (B, Hq) = d.block(), (d.sizes["B"], d.sizes["Hq"])
    lead = d.pick((), (B, 1), (1, Hq), (B, Hq))
    sides = -(-max(d.last + 1, d.sizes["Lq"]) // block), -(-d.sizes["Lk"] // block)
    if int(np.prod((*lead, *sides))) > 1 << 22:  # blocks of one key for each head of thousands: gigabytes, minutes
        lead = ()
    return d.rng.random((*lead, *sides)) < 0.6, block


def _draw_selected(d: Draw) -> tuple[Any, ...]:
    block, (B, Hq, Lq, Lk) = d.block(), (d.sizes[n] for n in ("B", "Hq", "Lq", "Lk"))
    queries, heads = d.pick(1, 1, 1, 2, 7), d.pick(*(n for n in range(1, Hq + 1) if Hq % n == 0)) if Hq else 1
    blocks, kind = -(-Lk // block), d.pick(np.int32, np.int64)
    shape = (d.pick(1, B), heads, -(-Lq // queries), d.pick(0, 1, 2, 3, 3, max(1, blocks // 2)))
    return d.rng.integers(d.pick(0, 0, -2), blocks + 1, shape).astype(kind), block, queries


def _draw_dense(d: Draw) -> tuple[Any, ...]:
    d.block()
    full = tuple(d.sizes[n] for n in ("B", "Hq", "Lq", "Lk"))
    shape = tuple(1 if chance(d.rng, 0.3) and n else n for n in full) if chance(d.rng, 0.6) else full[2:]
    return (d.rng.random(shape) < d.pick(0.05, 0.5, 0.9),)


def _draw_mask_mod(d: Draw) -> tuple[Any, ...]:
    d.block()
    return (d.pick(*MASK_MODS),)


def _draw_bigbird(d: Draw) -> tuple[Any, ...]:
    d.block()
    return d.pick(1, 4, 16), d.pick(1, 3), d.pick(0, 1, 2), d.pick(1, 2), upto(d.rng, 9)


def _draw_longformer(d: Draw) -> tuple[Any, ...]:
    d.block()
    return 2 * d.pick(1, 3, 8), d.indices, d.pick(1, 1, 2)


# ----------------------------------------------------------------- small arguments and their meaning: mask_specs
def _small_sliding_window(rng: random.Random, s: Sizes) -> Small:
    n = rng.choice([1, 2, 3, 7, 1000])
    return Small((n,), lambda b, h, i, p, j: p - n < j <= p)


def _small_window(rng: random.Random, s: Sizes) -> Small:
    left, right = (rng.choice([None, 0, 1, 3, 9]) for _ in range(2))

    def window(b: int, h: int, i: int, p: int, j: int) -> bool:
        return (left is None or j >= p - left) and (right is None or j <= p + right)

    return Small((left, right), window)


def _small_prefix(rng: random.Random, s: Sizes) -> Small:
    n = rng.randint(0, s.Lk + 2)
    return Small((n,), lambda b, h, i, p, j: j < n)


def _small_padding(rng: random.Random, s: Sizes) -> Small:
    ns, side = [rng.randint(0, s.Lk) for _ in range(s.B)], rng.choice(["right", "left"])

    def padding(b: int, h: int, i: int, p: int, j: int) -> bool:
        return j < ns[b] if side == "right" else j >= s.Lk - ns[b]

    return Small((ns, side), padding)


def _small_documents(rng: random.Random, s: Sizes) -> Small:
    ns = partition(rng, s.Lk, rng.randint(1, 5))
    return Small((ns,), lambda b, h, i, p, j: document(ns, p) == document(ns, j) >= 0)


def _small_chunked(rng: random.Random, s: Sizes) -> Small:
    n = rng.choice([1, 2, 5, 16])
    return Small((n,), lambda b, h, i, p, j: p // n == j // n)


def _small_strided(rng: random.Random, s: Sizes) -> Small:
    n, offset = rng.choice([1, 2, 5]), rng.randint(-3, 6)
    return Small((n, offset), lambda b, h, i, p, j: (p - j - offset) % n == 0, n == 1)


def _small_dilated(rng: random.Random, s: Sizes) -> Small:
    w, step = rng.randint(0, 4), rng.choice([1, 2, 3])
    return Small((w, step), lambda b, h, i, p, j: abs(p - j) <= w * step and (p - j) % step == 0, step == 1)


def _small_global(rng: random.Random, s: Sizes) -> Small:
    at = [rng.randint(0, s.Lk + 3) for _ in range(rng.randint(0, 4))]
    return Small((at,), lambda b, h, i, p, j: p in at or j in at)


def _small_random(rng: random.Random, s: Sizes) -> Small:
    per, block, seed = rng.randint(0, 4), rng.choice([1, 3, 8]), rng.choice([0, 1, 2**63 - 1, rng.getrandbits(40)])

    def random_blocks(b: int, h: int, i: int, p: int, j: int) -> bool:
        return j // block in drawn_blocks(per, block, seed, p // block, s.Lk)

    return Small((per, block, seed), random_blocks)


# -------------------------------------------------------------------------------------------------------- the kinds
KINDS = (
    Kind(
        "causal",
        5,
        lambda r: r.j <= r.p,
        _draw_causal,
        lambda rng, s: Small((), lambda b, h, i, p, j: j <= p),
        exact=True,
    ),
    Kind(
        "sliding_window",
        3,
        lambda r, n: (r.j > r.p - n) & (r.j <= r.p),
        lambda d: (d.near,),
        _small_sliding_window,
        exact=True,
    ),
    Kind(
        "window",
        3,
        _window,
        lambda d: (d.pick(None, 0, d.near - 1, d.near), d.pick(None, 0, 1, d.near)),
        _small_window,
        exact=True,
    ),
    Kind("prefix", 2, _prefix, _draw_prefix, _small_prefix, exact=True),
    Kind("padding", 3, _padding, _draw_padding, _small_padding, exact=True),
    Kind("documents", 3, _documents, _draw_documents, _small_documents, exact=True),
    Kind("segments", 2, _segments, _draw_segments),
    Kind("chunked", 1, lambda r, n: r.j // n == r.p // n, lambda d: (d.near,), _small_chunked, exact=True),
    Kind(
        "strided",
        1,
        lambda r, n, offset: (r.p - r.j - offset) % n == 0,
        lambda d: (d.pick(1, 2, 3, 8), d.pick(0, 1, 5, -2)),
        _small_strided,
    ),
    Kind("dilated", 1, _dilated, lambda d: (d.pick(0, 1, 2, 5), d.pick(1, 2, 3)), _small_dilated),
    Kind("global_tokens", 1, _global, lambda d: (d.indices,), _small_global),
    Kind("random_blocks", 1, _random, _draw_random, _small_random),
    Kind("blocks", 2, _blocks, _draw_blocks),
    Kind("dense", 4, _dense, _draw_dense),
    Kind("selected_blocks", 2, _selected, _draw_selected),
    Kind(
        "mask_mod",
        1,
        lambda r, name: np.broadcast_to(MASK_MODS[name](r.b, r.h, r.p, r.j), r.j.shape),
        _draw_mask_mod,
    ),
    Kind("bigbird", 1, _bigbird, _draw_bigbird),
    Kind("longformer", 1, _longformer, _draw_longformer),
)
