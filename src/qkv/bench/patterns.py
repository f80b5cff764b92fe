"""The masks that `qkv bench --sparse` times, and what each shows once more as a rule of two positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

import qkv

SEED = 20260714  # of the blocks that are drawn

Rule = Callable[[Tensor, Tensor], Tensor]  # of query and key positions: visible


@dataclass(frozen=True)
class Pattern:
    """A mask, and the same as a rule."""

    name: str
    mask: Callable[[int], qkv.Mask]  # of the length
    rule: Callable[[int], Rule]
    cover: Callable[[int], qkv.Mask] | None = None  # the tiles that a scattered pattern touches, as a mask
    held: bool = True  # to its share of the pairs, or to its cover, and raced with FlexAttention
    tile: int = 128  # of FlexAttention's block mask: the pattern's own blocks where it has some

    def share(self, L: int) -> float:
        """The visible part of all pairs."""
        rule, j = self.rule(L), torch.arange(L)
        return sum(int(rule(p[:, None], j).sum()) for p in torch.arange(L).split(512)) / L**2


@cache
def chosen(L: int, block: int, count: int) -> Tensor:
    """Block rows and the blocks that each sees: its own and `count` - 1 at random among those before."""
    n = -(-L // block)
    g = torch.Generator().manual_seed(SEED)
    scores = torch.rand(n, n, generator=g).tril(-1) + torch.eye(n) * 2
    picked = torch.zeros(n, n, dtype=torch.bool).scatter_(1, scores.topk(min(count, n), 1).indices, True)
    return picked.tril()


@cache
def _drawn(L: int) -> Tensor:
    n = -(-L // 64)
    return qkv.random_blocks(3, 1, 0).tensor(n, n)[0, 0]  # what is drawn for a row of blocks knows no block size


def _block(table: Tensor, block: int) -> Rule:
    return lambda p, j: table[p // block, j // block]


def _bigbird(L: int) -> Rule:
    drawn = _drawn(L)
    return lambda p, j: ((p - j).abs() <= 96) | (p < 128) | (j < 128) | drawn[p // 64, j // 64]


def _documents(L: int) -> qkv.Mask:
    return qkv.documents([512] * (L // 512) + [L % 512] * (L % 512 > 0))


def _selected(L: int) -> Rule:
    table = chosen(L, 64, 16)
    return lambda p, j: table[p // 64, j // 64] & (j <= p)


PATTERNS = (
    Pattern("window 256", lambda L: qkv.sliding_window(256), lambda L: lambda p, j: (j <= p) & (p - j < 256)),
    Pattern("window 1,024", lambda L: qkv.sliding_window(1024), lambda L: lambda p, j: (j <= p) & (p - j < 1024)),
    Pattern("documents 512", _documents, lambda L: lambda p, j: p // 512 == j // 512),
    Pattern(
        "documents 512 causal",
        lambda L: _documents(L) & qkv.causal(),
        lambda L: lambda p, j: (p // 512 == j // 512) & (j <= p),
    ),
    Pattern("BigBird 64", lambda L: qkv.bigbird(64), _bigbird, tile=64),
    Pattern(
        "Longformer 512",
        lambda L: qkv.longformer(512, [0]),
        lambda L: lambda p, j: ((p - j).abs() <= 256) | (p == 0) | (j == 0),
    ),
    Pattern("blocks of 64", lambda L: qkv.blocks(chosen(L, 64, 16), 64) & qkv.causal(), _selected, tile=64),
    Pattern(
        "strided 16",
        lambda L: qkv.strided(16) & qkv.causal(),
        lambda L: lambda p, j: ((p - j) % 16 == 0) & (j <= p),
        lambda L: qkv.causal(),
    ),
    Pattern(
        "dilated 64 by 16",
        lambda L: qkv.dilated(64, 16),
        lambda L: lambda p, j: ((p - j).abs() <= 1024) & ((p - j) % 16 == 0),
        lambda L: qkv.window(1024, 1024),
    ),
    Pattern(
        "blocks of 8",
        lambda L: qkv.blocks(chosen(L, 8, 32), 8),
        lambda L: _block(chosen(L, 8, 32), 8),
        held=False,
    ),
)
