"""Block-sparse masks, a mask for each head, and the published compositions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qkv.checks import Operand, integer, integers, shown
from qkv.errors import ArgumentError, ArgumentTypeError, ShapeError
from qkv.masks.base import Composed, Mask, Or, as_mask, decoded_parts
from qkv.masks.intervals import Cuts, Rows, Spans, column, groups
from qkv.masks.program import Builder
from qkv.masks.rule import Rule
from qkv.masks.shapes import dilated, floor, global_tokens, window as window_mask
from qkv.masks.tile import Sizes, Tile
from qkv.numerics import scrambled, shifted

__all__ = ["bigbird", "blocks", "longformer", "per_head", "random_blocks"]


def _signed(x: int) -> int:
    """The int64 with the bits of x mod 2**64."""
    return (x + 2**63) % 2**64 - 2**63


def mix(seed: int, block: Tensor, draw: int) -> Tensor:
    """64 random-looking bits for (seed, query block, draw), as int64: splitmix64's finaliser, wrapping at 2**64.

    Every kernel computes the same function, so that a mask hides the same keys wherever it runs.
    Source: Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators".
    """
    start = _signed(seed * 0x9E3779B97F4A7C15 + draw * 0x94D049BB133111EB)
    return scrambled(block * _signed(0xBF58476D1CE4E5B9) + start)


def _modulo(x: Tensor, n: int) -> Tensor:
    """x mod n as if x were unsigned."""
    return (shifted(x, 1) % n * 2 + (x & 1)) % n


@dataclass(frozen=True, eq=False, repr=False)
class RandomBlocks(Mask, op=9):
    """j // block is one of the blocks drawn for p // block; made by `random_blocks`."""

    per_row: int
    block: int
    seed: int

    fits_any_length = True

    @property
    def depends_on_position(self) -> bool:
        return self.per_row > 0

    def drawn(self, rows: Tensor, Lk: int) -> Tensor:
        """The key blocks, (..., k), of query blocks `rows`: k distinct ones by Floyd's sampling."""
        blocks = -(-Lk // self.block)
        k = min(self.per_row, blocks)
        chosen = torch.full((*rows.shape, k), -1, dtype=torch.int64, device=rows.device)
        for n, last in enumerate(range(blocks - k, blocks)):
            draw = _modulo(mix(self.seed, rows, last), last + 1)
            taken = (chosen[..., :n] == draw[..., None]).any(-1)
            chosen[..., n] = torch.where(taken, last, draw)
        return chosen

    def words(self) -> str:
        return "a few blocks of keys drawn at random"

    def visible(self, at: Tile, sizes: Sizes) -> Tensor:
        key = floor(at.j, self.block)
        if self.per_row * self.block >= sizes.Lk and self.per_row:
            return torch.ones_like(at.j, dtype=torch.bool)
        seen = torch.zeros(torch.broadcast_shapes(at.p.shape, at.j.shape), dtype=torch.bool, device=at.j.device)
        for chosen in self.drawn(floor(at.p, self.block), sizes.Lk).unbind(-1):
            seen |= chosen == key
        return seen

    def _cuts(self, b: int) -> Cuts | None:
        return Cuts(period=self.block, optional=True)

    def _spans(self, rows: Rows) -> Spans:
        start = self.drawn(floor(rows.p, self.block), rows.Lk).sort(-1).values * self.block
        return Spans(start, start + self.block) if start.shape[1] else Spans(column(0), column(0))

    @classmethod
    def _decode(cls, words: Iterator[int], tensors: Iterator[Tensor]) -> Rule:
        return random_blocks(next(words), next(words), next(words))

    def __repr__(self) -> str:
        return f"random_blocks({self.per_row}, {self.block}, {self.seed})"


def random_blocks(per_row: int, block: int, seed: int) -> RandomBlocks:
    """Each block of queries sees exactly min(per_row, number of key blocks) distinct blocks of keys, drawn at random.

    Parameters
    ----------
    per_row : int >= 0
        Key blocks a query block sees.
    block : int >= 1
        Tokens of a block, for queries and keys.
    seed : int in 0..2**63 - 1
        The blocks drawn depend on seed, p // block and the number of key blocks only: the same on every machine and
        backend.

    Returns
    -------
    Mask

    Raises
    ------
    ArgumentTypeError, ArgumentError
        Other values.

    Notes
    -----
    Cost: Lq per_row block pairs.
    Source: Zaheer et al. 2020, "Big Bird: Transformers for Longer Sequences".

    Examples
    --------
    >>> import qkv
    >>> qkv.random_blocks(2, 4, seed=0).tensor(16, 16).sum(-1).unique()
    tensor([8])
    """
    call = "qkv.random_blocks()"
    return RandomBlocks(
        integer(call, "per_row", per_row, high=2**20),
        integer(call, "block", block, low=1),
        integer(call, "seed", seed, high=2**63 - 1),
    )


@dataclass(frozen=True, eq=False, repr=False)
class Blocks(Mask, op=10):
    """map[..., p // block, j // block]; made by `blocks`."""

    map: Operand  # bool (rows_b, rows_h, nq, nk)
    block: int

    depends_on_position = True

    @property
    def varies_by_batch(self) -> bool:
        return self.map.tensor.shape[0] > 1

    @property
    def varies_by_head(self) -> bool:
        return self.map.tensor.shape[1] > 1

    def check(self, call: str, sizes: Sizes) -> None:
        rows_b, rows_h, nq, nk = self.map.tensor.shape
        given = f"map {tuple(self.map.tensor.shape)} of blocks of {self.block}"
        if rows_b not in (1, sizes.B) or rows_h not in (1, sizes.Hq):
            rule, fix = (
                "blocks: the map must be (B or 1, Hq or 1, nq, nk)",
                "Give it one entry for each, or one for all",
            )
            raise ShapeError.of(call, rule, f"{given}, B={sizes.B} and Hq={sizes.Hq}", fix)
        for name, size, have in (("Lq", sizes.Lq, nq), ("Lk", sizes.Lk, nk)):
            if have * self.block < size:
                need = -(-size // self.block)
                rule = f"blocks: the map must cover {name}"
                fix = f"Pass a map with {'nq' if name == 'Lq' else 'nk'} >= {need}"
                raise ShapeError.of(call, rule, f"{given}, which covers {have * self.block}, and {name}={size}", fix)

    def words(self) -> str:
        return "the blocks of keys that a map allows"

    def visible(self, at: Tile, sizes: Sizes) -> Tensor:
        table = self.map.on(at.j.device)
        rows_b, rows_h, nq, nk = table.shape
        row, key = floor(at.p, self.block), floor(at.j, self.block)
        inside = (row >= 0) & (row < nq) & (key >= 0) & (key < nk)
        if not table.numel():
            return torch.zeros_like(inside)
        at_b, at_h = (x if n > 1 else torch.zeros_like(x) for x, n in ((at.b, rows_b), (at.h, rows_h)))
        return table[at_b, at_h, row.clamp(0, nq - 1), key.clamp(0, nk - 1)] & inside

    def of_heads(self, start: int, stop: int, Hq: int) -> Rule:
        return Blocks(Operand(self.map.tensor[:, start:stop]), self.block) if self.varies_by_head else self

    def _cuts(self, b: int) -> Cuts | None:
        return Cuts(period=self.block, optional=True)

    def _spans(self, rows: Rows) -> Spans:
        shape = self.map.tensor.shape
        nq, runs = shape[2], self._runs(min(rows.b, shape[0] - 1), min(rows.h, shape[1] - 1))
        if runs is None:
            return Spans(column(0), column(0))
        owner, start, stop = runs
        row = floor(rows.p, self.block)
        row = torch.where((row >= 0) & (row < nq), row, nq)  # past the last row nothing is found
        begin, end = (torch.searchsorted(owner, row, right=right) for right in (False, True))
        return groups(start * self.block, stop * self.block, begin, end)

    def _runs(self, b: int, h: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """Runs of blocks: row, first, past the last. A map of few is looked at once, the last one asked for is kept."""
        kept = self.__dict__.get("_found")
        if kept is not None and kept[0] == (b, h):
            found: tuple[Tensor, Tensor, Tensor] = kept[1]
            return found
        if not self.map.tensor.numel():
            return None
        edge = torch.nn.functional.pad(self.map.tensor[b, h], (1, 1)).to(torch.int8).diff(dim=1)
        owner, start = (edge == 1).nonzero(as_tuple=True)
        found = owner, start, (edge == -1).nonzero(as_tuple=True)[1]
        if 24 * owner.numel() <= self.map.tensor[b, h].numel():  # no more memory than the map itself
            object.__setattr__(self, "_found", ((b, h), found))
        return found

    def _lower(self, builder: Builder) -> None:
        table = self.map.tensor
        builder.emit(self.op, builder.operand(table.view(torch.uint8)), *table.shape, self.block)

    @classmethod
    def _decode(cls, words: Iterator[int], tensors: Iterator[Tensor]) -> Rule:
        return blocks(next(tensors), next(words))

    def __repr__(self) -> str:
        return f"blocks(<map {tuple(self.map.tensor.shape)}>, {self.block})"


def blocks(map: Tensor, block: int) -> Blocks:
    """Blocks of queries see blocks of keys by a table: map[..., p // block, j // block].

    Parameters
    ----------
    map : bool tensor (nq, nk) or (B or 1, Hq or 1, nq, nk)
        Copied. It must cover the lengths; queries at positions outside it see nothing.
    block : int >= 1
        Tokens of a block, for queries and keys.

    Returns
    -------
    Mask

    Raises
    ------
    ArgumentTypeError, ArgumentError, ShapeError
        A map or block of another kind; at use a map that does not fit.

    Notes
    -----
    Cost: block * block pairs for each True of the map.

    Examples
    --------
    >>> import torch, qkv
    >>> print(qkv.blocks(torch.tensor([[True, False], [False, True]]), 2).picture(4, 4))
    p/j 0 1 2 3
      0 ■ ■ · ·
      1 ■ ■ · ·
      2 · · ■ ■
      3 · · ■ ■
    """
    call = "qkv.blocks()"
    if not isinstance(map, Tensor) or map.dtype != torch.bool:
        given = shown(map) if isinstance(map, Tensor) else f"{shown(map)} ({type(map).__name__})"
        raise ArgumentTypeError.of(call, "map must be a bool tensor", given, "Pass a bool tensor, e.g. map.bool()")
    if map.ndim not in (2, 4):
        rule = "map must be (nq, nk) or (B or 1, Hq or 1, nq, nk)"
        raise ShapeError.of(call, rule, shown(map), "Add dimensions of size 1 for B and Hq")
    if map.is_meta:
        raise ArgumentError.of(call, "map must have values", "map on the meta device", "Pass a tensor with data")
    block = integer(call, "block", block, low=1)
    return Blocks(Operand(map.detach().reshape((1,) * (4 - map.ndim) + tuple(map.shape))), block)


@dataclass(frozen=True, eq=False, repr=False)
class PerHead(Composed, op=11):
    """Head h sees by parts[h]; made by `per_head`."""

    parts: tuple[Mask, ...]

    @property
    def varies_by_head(self) -> bool:
        return len(set(self.parts)) > 1 or any(part.varies_by_head for part in self.parts)

    def check(self, call: str, sizes: Sizes) -> None:
        if len(self.parts) != sizes.Hq:
            rule, given = "per_head needs one mask for each query head", f"{len(self.parts)} masks and Hq={sizes.Hq}"
            raise ShapeError.of(call, rule, given, f"Pass {sizes.Hq} masks")
        for part in dict.fromkeys(self.parts):
            part.check(call, sizes)

    def words(self) -> str:
        return "what its head's own mask allows"

    def visible(self, at: Tile, sizes: Sizes) -> Tensor:
        heads: dict[Mask, list[int]] = {}
        for head in at.h.unique().tolist():
            heads.setdefault(self.parts[head], []).append(head)
        seen = torch.zeros((1,) * max(at.h.ndim, 1), dtype=torch.bool, device=at.j.device)
        for part, mine in heads.items():
            one = part.visible(at, sizes)
            seen = one if len(heads) == 1 else torch.where(torch.isin(at.h, at.h.new_tensor(mine)), one, seen)
        return seen

    def _leaves(self, h: int) -> list[Rule]:
        return self.parts[h]._leaves(h)

    def _decide(self, h: int, leaves: dict[Rule, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return self.parts[h]._decide(h, leaves)

    def _lower(self, builder: Builder) -> None:
        outer = builder.words
        outer += [self.op, len(self.parts)]
        for head, part in enumerate(self.parts):
            builder.words = []
            part._for_head(head)._lower(builder)
            outer += [len(builder.words), *builder.words]
        builder.words = outer

    @classmethod
    def _decode(cls, words: Iterator[int], tensors: Iterator[Tensor]) -> Rule:
        return per_head(decoded_parts(words, tensors))

    def _for_head(self, h: int) -> Rule:
        return self.parts[h]._for_head(h)

    def of_heads(self, start: int, stop: int, Hq: int) -> Rule:
        return per_head([part.of_heads(start, stop, Hq) for part in self.parts[start:stop]])  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"per_head([{', '.join(map(repr, self.parts))}])"


def per_head(masks: Sequence[Mask | Tensor]) -> PerHead:
    """One mask for each query head; heads that share keys and values may differ.

    Parameters
    ----------
    masks : Hq masks or bool tensors
        In order of the query heads.

    Returns
    -------
    Mask

    Raises
    ------
    ArgumentTypeError
        An entry that is no mask.
    ShapeError
        At use: a number of masks that is not Hq.

    Notes
    -----
    Cost: each head visits what its own mask shows.

    Examples
    --------
    >>> import qkv
    >>> mask = qkv.per_head([qkv.causal(), qkv.sliding_window(1)])
    >>> mask.tensor(2, 2, Hq=2).int()
    tensor([[[[1, 0],
              [1, 1]],
    <BLANKLINE>
             [[1, 0],
              [0, 1]]]], dtype=torch.int32)
    """
    call = "qkv.per_head()"
    if isinstance(masks, (Mask, Tensor, str, dict, set)) or not hasattr(masks, "__iter__"):
        given = f"{shown(masks)} ({type(masks).__name__})"
        raise ArgumentTypeError.of(call, "masks must be a list of masks", given, "Pass one mask a query head")
    parts = []
    for head, mask in enumerate(masks):
        part = as_mask(mask, call)
        if part is None:
            fix = "Use window(None, None) for a head that sees everything"
            raise ArgumentTypeError.of(call, "every head needs a mask", f"None for head {head}", fix)
        parts.append(part)
    return PerHead(tuple(parts))


def bigbird(block: int, window_blocks: int = 3, global_blocks: int = 2, random_blocks: int = 3, seed: int = 0) -> Mask:
    """BigBird: a window, a few global tokens and random blocks, as a composition.

    ``window(w, w) | global_tokens(range(global_blocks * block)) | random_blocks(random_blocks, block, seed)`` with
    w = window_blocks * block // 2; a part of size 0 is left out.

    Parameters
    ----------
    block : int >= 1
        Tokens of a block.
    window_blocks : int >= 1
        Blocks of the whole window, half of it on each side.
    global_blocks, random_blocks : int >= 0
        Blocks.
    seed : int >= 0
        Of the random blocks.

    Returns
    -------
    Mask

    Raises
    ------
    ArgumentTypeError, ArgumentError
        Other values.

    Notes
    -----
    Cost: Lq block times the blocks a row sees.
    Source: Zaheer et al. 2020, "Big Bird: Transformers for Longer Sequences".

    Examples
    --------
    >>> import qkv
    >>> qkv.bigbird(64, global_blocks=0)
    window(96, 96) | random_blocks(3, 64, 0)
    """
    call = "qkv.bigbird()"
    block = integer(call, "block", block, low=1)
    wide = integer(call, "window_blocks", window_blocks, low=1) * block // 2
    front = integer(call, "global_blocks", global_blocks) * block
    drawn = integer(call, "random_blocks", random_blocks, high=2**20)
    seed = integer(call, "seed", seed, high=2**63 - 1)
    if front > 2**24:
        rule = "global_blocks * block must be at most 2**24 tokens"
        given = f"global_blocks={global_blocks}, block={block}"
        raise ArgumentError.of(call, rule, given, "Use window(None, None) to see everything")
    parts: list[Mask] = [window_mask(wide, wide)]
    if front:
        parts.append(global_tokens(torch.arange(front, device="cpu")))
    if drawn:
        parts.append(RandomBlocks(drawn, block, seed))
    return Or(tuple(parts)) if len(parts) > 1 else parts[0]


def longformer(window: int, global_indices: Any = (), dilation: int = 1) -> Mask:
    """Longformer: a window around each token and a few global tokens, as a composition.

    ``window(w, w)``, or ``dilated(w, dilation)`` where dilation > 1, with w = window // 2, ``| global_tokens(...)``.

    Parameters
    ----------
    window : int >= 2 and even
        Keys of the window on both sides together, besides the token itself.
    global_indices : ints >= 0
        Tokens that see everything and are seen by everyone.
    dilation : int >= 1
        Tokens from one key of the window to the next.

    Returns
    -------
    Mask

    Raises
    ------
    ArgumentTypeError, ArgumentError, ShapeError
        Other values.

    Notes
    -----
    Cost: Lq (window + 1) pairs, and 2 Lk for each global token.
    Source: Beltagy et al. 2020, "Longformer: The Long-Document Transformer".

    Examples
    --------
    >>> import qkv
    >>> qkv.longformer(512, [0])
    window(256, 256) | global_tokens([0])
    """
    call = "qkv.longformer()"
    window = integer(call, "window", window, low=2)
    if window % 2:
        fix = f"Pass window={window + 1}, or window(left, right) for uneven sides"
        raise ArgumentError.of(call, "window must be even, half of it on each side", f"window={window}", fix)
    step = integer(call, "dilation", dilation, low=1)
    indices = integers(call, "global_indices", global_indices)
    local = window_mask(window // 2, window // 2) if step == 1 else dilated(window // 2, step)
    return local | global_tokens(indices) if indices.numel() else local
