"""Which blocks of keys each query of native sparse attention reads: the importance of blocks, and the best of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv._torch import stands_in
from qkv.checks import integer
from qkv.errors import ArgumentError

_NUMBERS = 1 << 19  # scores that are held at a time, 2 MiB in float32: what caches hold
_ROWS = 16  # and at least so many queries: a product of fewer reads all keys for little
_LOW = 31  # bits of a rank that tell the block
_LAST = (1 << _LOW) - 1


class Pattern(NamedTuple):
    """The sizes of native sparse attention, under their names in the paper."""

    block: int = 32  # l, tokens of a compressed block
    stride: int = 16  # d, from one compressed block to the next
    selected_block: int = 64  # l'
    top_k: int = 16  # n, selected blocks a query, the next two among them
    initial: int = 1  # first blocks that are always selected
    local: int = 2  # last blocks that are always selected, the query's own among them
    window: int = 512  # w

    def compressed(self, length: int) -> int:
        """How many compressed blocks so many tokens have."""
        return (length - self.block) // self.stride + 1 if length >= self.block else 0

    def newest(self, places: Tensor) -> Tensor:
        """The last compressed block that lies wholly at or before each place; negative where there is none."""
        return (places + (1 - self.block)).div(self.stride, rounding_mode="floor")


def checked(call: str, pattern: Pattern) -> Pattern:
    """The pattern with each size an integer; an error where they do not fit each other."""
    low = {"initial": 0, "local": 0}
    found = Pattern(*(integer(call, n, x, low=low.get(n, 1)) for n, x in pattern._asdict().items()))
    for name in ("block", "selected_block"):
        size = getattr(found, name)
        if size % found.stride:
            rule, given = f"stride must divide {name}", f"{name}={size} and stride={found.stride}"
            fix = f"Use a {name} that is a multiple of {found.stride}"
            raise ArgumentError.of(call, rule, given, fix)
    if found.initial + found.local > found.top_k:
        rule = "the blocks that are always selected count towards top_k"
        given = f"initial={found.initial}, local={found.local} and top_k={found.top_k}"
        raise ArgumentError.of(call, rule, given, f"Use top_k >= {found.initial + found.local}")
    return found


def chosen_blocks(
    q: Tensor, k_cmp: Tensor, lse: Tensor, places: Tensor, pattern: Pattern, scale: float, Lk: int
) -> Tensor:
    """The blocks that queries select: the most important ones, one list for all query heads of a key/value head.

    ::

        p_hic = exp(scale q_hi . k_c - lse_hi)                       of the compressed blocks c that i sees
        importance of block b  = sum over the group's heads h, and over c, of p_hic |c and b in strides|

    |c and b in strides| counts the strides of tokens that lie in both: eq. 9 of the paper, whose indices begin at 1.

    Parameters
    ----------
    q : Tensor, shape (B, Hq, Lq, D)
    k_cmp : Tensor, shape (B, Hkv, Lc, D)
    lse : Tensor, shape (B, Hq, Lq)
        Of q's attention to k_cmp.
    places : int64 Tensor (B or 1, Lq)
        Where the queries stand among the keys.
    pattern : Pattern
    scale : float
    Lk : int
        Tokens in all.

    Returns
    -------
    Tensor, int32, shape (B, Hkv, Lq, top_k)
        In ascending order, -1 in front where a query sees fewer blocks than top_k.

    Notes
    -----
    First the `initial` and `local` blocks, then as `qkv.native_sparse_attention` says. Cost: 2 D FLOPs a pair of a
    query and a compressed block that it sees; memory for 2**19 scores, or for those of 16 queries.
    """
    if torch.compiler.is_dynamo_compiling() or stands_in(q):
        found: Tensor = torch.ops.qkv.native_sparse_blocks(q, k_cmp, lse, places, list(pattern), scale, Lk)
        return found
    return _chosen(q, k_cmp, lse, places, pattern, scale, Lk)


def _chosen(q: Tensor, k_cmp: Tensor, lse: Tensor, places: Tensor, pattern: Pattern, scale: float, Lk: int) -> Tensor:
    B, Hq, Lq, _ = q.shape
    Hkv, Lc = k_cmp.shape[1:3]
    found = q.new_full((B, Hkv, Lq, pattern.top_k), -1, dtype=torch.int32)
    if not found.numel():
        return found
    wide, blocks = torch.promote_types(q.dtype, torch.float32), -(-Lk // pattern.selected_block)
    keys = k_cmp.to(wide).flatten(0, 1).mT  # (B Hkv, D, Lc)
    # exp(score - lse), which is 0 - 0 where nothing is seen: such rows are filled below.
    less = torch.where(lse > -torch.inf, -lse, 0).to(wide)
    newest = pattern.newest(places)
    rows = max(_NUMBERS // max(B * (Hq * Lc + 4 * Hkv * blocks), 1), _ROWS)
    for start in range(0, Lq, rows):
        part = slice(start, min(start + rows, Lq))
        at, last = places[:, part], newest[:, part]
        all_see, seen = (min(max(n + 1, 0), Lc) for n in map(int, torch.aminmax(last)))
        mine = q[:, :, part].to(wide).unflatten(1, (Hkv, -1)).flatten(2, 3).flatten(0, 1)  # (B Hkv, group rows, D)
        first = less[:, :, part].unflatten(1, (Hkv, -1)).flatten(2, 3).flatten(0, 1)[..., None]
        weights = torch.baddbmm(first, mine, keys[..., :seen], alpha=scale).exp_()
        weights = weights.view(B, Hkv, Hq // Hkv, last.shape[1], seen).sum(2)
        if all_see < seen:
            hidden = torch.arange(all_see, seen, device=q.device) > last[:, None, :, None]
            weights[..., all_see:].masked_fill_(hidden, 0)
        some = max(min(int(at.max()) // pattern.selected_block + 1, blocks), 0)
        rank = _ranked(_importance(weights, some, pattern), at[:, None, :, None], pattern)
        best = rank.topk(min(pattern.top_k, some)).values
        chosen = torch.where(best < 0, -1, _LAST - (best & _LAST)).sort(-1).values
        found[:, :, part, pattern.top_k - chosen.shape[-1] :] = chosen.to(torch.int32)
    return found


def _importance(weights: Tensor, blocks: int, pattern: Pattern) -> Tensor:
    """Of weights (..., compressed blocks) the sums (..., blocks) over what each block shares with them."""
    strides, each = pattern.block // pattern.stride, pattern.selected_block // pattern.stride
    # A stride of tokens s lies in the compressed blocks s - strides + 1 .. s.
    padded = F.pad(weights, (strides - 1, max(blocks * each - weights.shape[-1], 0)))
    shared = padded[..., : blocks * each]
    for n in range(1, strides):
        shared = shared + padded[..., n : n + blocks * each]
    summed: Tensor = shared.unflatten(-1, (blocks, each)).sum(-1)
    return summed


def _ranked(importance: Tensor, at: Tensor, pattern: Pattern) -> Tensor:
    """A different integer for each block, larger for one that goes before; negative for one that cannot be chosen.

    torch.topk leaves open which of equal numbers it takes, so the block's number stands below its importance: the bits
    of floats that are not negative are in the order of the floats.
    """
    block = torch.arange(importance.shape[-1], device=at.device)
    own = at // pattern.selected_block
    bits = importance.to(torch.float32).view(torch.int32).to(torch.int64).clamp_(min=0)
    always = (block < pattern.initial) | (block > own - pattern.local)
    rank = torch.where(always, _LAST + 1, bits) * (_LAST + 1) + (_LAST - block)
    return torch.where(block <= own, rank, -1)


# The choice as a node of somebody's graph: how many rows are taken at a time depends on sizes, how far on positions.
_library = torch.library.Library("qkv", "FRAGMENT")
_library.define(
    "native_sparse_blocks(Tensor q, Tensor k_cmp, Tensor lse, Tensor places, SymInt[] pattern, float scale, SymInt Lk) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _node(
    q: Tensor, k_cmp: Tensor, lse: Tensor, places: Tensor, pattern: Sequence[int], scale: float, Lk: int
) -> Tensor:
    with torch.no_grad():
        return _chosen(q, k_cmp, lse, places, Pattern(*pattern), scale, Lk)


def _fake(q: Tensor, k_cmp: Tensor, lse: Tensor, places: Tensor, pattern: Sequence[int], *_: Any) -> Tensor:
    size = (q.shape[0], k_cmp.shape[1], q.shape[2], Pattern(*pattern).top_k)
    return torch.empty(size, dtype=torch.int32, device=q.device)


_library.impl("native_sparse_blocks", _node, "CompositeExplicitAutograd")
torch.library.register_fake("qkv::native_sparse_blocks", _fake, lib=_library)
