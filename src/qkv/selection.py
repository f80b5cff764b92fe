"""Blocks of keys chosen by what their summaries promise: a mask for each query, in the manner of MoBA and Quest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from qkv.call.keys import KVView
from qkv.call.problem import Options, query_positions
from qkv.call.summaries import Summaries as Summaries, block_summaries as block_summaries, places_of
from qkv.call.validate import validate
from qkv.call.view import check_view, gathered, joined, longest, problem_of
from qkv.checks import flag, given_as, integer, shown
from qkv.errors import ArgumentError, ArgumentTypeError, ShapeError
from qkv.masks import Mask, Sizes, as_mask
from qkv.masks.selected import of_ascending
from qkv.masks.shapes import Window
from qkv.masks.shares import keys_seen

CALL = "qkv.select_blocks()"
How: TypeAlias = 'Literal["mean", "minmax"] | Callable[[Tensor, Summaries], Tensor]'

_SCORES = 1 << 22  # that are made at a time
_HIDDEN = -(2**63)
_PART = (2**31 - 1) << 32  # above the order of every score


def select_blocks(
    q: Tensor,
    k: Tensor | KVView,
    block: int,
    top_k: int,
    how: How = "mean",
    summaries: Summaries | None = None,
    *,
    mask: Mask | Tensor | None = None,
    positions: Any = None,
    per_group: bool = False,
    queries: int = 1,
) -> Mask:
    """The blocks of keys that promise most to each query, as a mask: what it then attends to.

    A block is scored by a summary of its keys, and only where the query sees all of them under `mask`. Blocks of which
    it sees a part, such as its own under `causal()`, are always kept; they come before the others and count towards
    top_k. What `mask` hides stays hidden. Ties go to the lower block; where there are fewer blocks than top_k, all that
    can be seen are kept.

    Parameters
    ----------
    q : Tensor, shape (B, Hq, Lq, D)
    k : Tensor, shape (B, Hkv, Lk, D), or a cache's view
        As `attention` takes them, q for a ragged view among them. A view of a cache with summaries= reads those; of
        another cache, and of tensors, they are made of all keys here.
    block : int >= 1
        Keys of a block. The keys after the last full block of a sequence are one seen in part.
    top_k : int >= 1
        Blocks of a query.
    how : "mean", "minmax" or a function
        The score of a block for a query: "mean", q . mean of its keys, as in MoBA; "minmax", sum over d of
        max(q_d min_d, q_d max_d), the most that any of its keys could score, as in Quest. A function is called with
        some of the queries (B, Hq, rows, D) and the `Summaries`, and returns scores (B, Hq, rows, blocks), the larger
        the better; NaN counts as infinity.
    summaries : Summaries
        What `block_summaries(k, block)` or `cache.summaries(seqs, layer)` gave; made here unless given.
    mask : Mask or bool Tensor (B or 1, Hq or 1, Lq, Lk)
        What may be seen at all, `causal()` above all.
    positions
        As in `attention`, for tensors.
    per_group : bool
        One choice for all query heads of a key/value head, by the sum of their scores: they read the same keys then.
        A block counts as seen whole where all of them see it so.
    queries : int >= 1
        So many consecutive queries share one choice, likewise.

    Returns
    -------
    Mask
        ``selected_blocks(lists, block, queries=queries) & mask``.

    Raises
    ------
    QKVError
        What `attention` would raise for q, k, mask and positions; another block than that of the summaries; arguments
        of other types or values.

    Notes
    -----
    Cost: 2 D Lq / block products a key and head ("minmax": 4 D), of which `per_group` and `queries` save their share,
    and the summaries are read once; nothing is allocated in proportion to Lq Lk. Where a mask has no closed form its
    pairs are looked at, tile by tile. The choice has no gradient; attention through the mask has its own.
    Sources: Lu et al. 2025, "MoBA: Mixture of Block Attention for Long-Context LLMs", arXiv 2502.13189; Tang et al.
    2024, "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", arXiv 2406.10774.

    Examples
    --------
    >>> import torch, qkv
    >>> k = torch.tensor([0.0, 0, 1, 1, 3, 3, 2, 2]).view(1, 1, 8, 1)
    >>> mask = qkv.select_blocks(torch.ones(1, 1, 8, 1), k, 2, 2, mask=qkv.causal())
    >>> print(mask.picture(8, 8))
    p/j 0 1 2 3 4 5 6 7
      0 ■ · · · · · · ·
      1 ■ ■ · · · · · ·
      2 ■ ■ ■ · · · · ·
      3 ■ ■ ■ ■ · · · ·
      4 · · ■ ■ ■ · · ·
      5 · · ■ ■ ■ ■ · ·
      6 · · · · ■ ■ ■ ·
      7 · · · · ■ ■ ■ ■
    """
    block, top_k = integer(CALL, "block", block, low=1), integer(CALL, "top_k", top_k, low=1)
    queries, per_group = integer(CALL, "queries", queries, low=1), flag(CALL, "per_group", per_group)
    if not callable(how) and (not isinstance(how, str) or how not in ("mean", "minmax")):
        kind = ArgumentError if isinstance(how, str) else ArgumentTypeError
        fix = 'Pass "mean", "minmax" or a function of queries and summaries'
        raise kind.of(CALL, 'how must be "mean", "minmax" or a function', given_as("how", how), fix)
    known = as_mask(mask, CALL)
    chosen = _Choice(block, top_k, how, per_group, queries)
    with torch.no_grad():
        if isinstance(k, KVView):
            lists = _of_view(q, k, summaries, joined(CALL, known, k.held), positions, chosen)
        else:
            lists = _of_tensors(q, k, summaries, known, positions, chosen)
    found: Mask = of_ascending(lists, block, queries)
    return found if known is None else found & known


class _Choice(NamedTuple):
    """How blocks are chosen."""

    block: int
    top_k: int
    how: How
    per_group: bool
    queries: int

    def kinds(self, summaries: Any) -> tuple[Tensor, ...]:
        """Those of the blocks' means, minima and maxima that their scores are made of."""
        mean, low, high = summaries[:3]
        return (mean,) if self.how == "mean" else (low, high) if self.how == "minmax" else (mean, low, high)


class _Part(NamedTuple):
    """Batch rows whose sequences have one number of keys, with the summaries of their full blocks where they lie."""

    q: Tensor  # (rows_b, Hq, Lq, D)
    p: Tensor  # int64 (rows_b or 1, Lq): positions, on the CPU
    first: int  # the number of the first batch row, for the mask
    sizes: Sizes  # of the whole call, with this part's lengths
    kinds: tuple[Tensor, ...]  # (rows_b, Hkv, places, D): of mean, minimum and maximum those that are looked at
    places: Tensor | None  # int64 (blocks,): where those of the blocks are; None: in order from the first on


def _of_tensors(
    q: Any, k: Any, summaries: Summaries | None, mask: Mask | None, positions: Any, choice: _Choice
) -> Tensor:
    problem, inputs = validate(CALL, q, k, k, mask, Options(positions=positions))
    q, k = inputs.q.detach(), inputs.k.detach()
    if summaries is None:
        summaries = block_summaries(k, choice.block)
    B, Hkv, Lk, D = k.shape
    _check_summaries(summaries, choice.block, (B, Hkv, Lk // choice.block, D))
    p = query_positions(problem, inputs.positions, "cpu").cpu()
    sizes = Sizes(B, q.shape[1], q.shape[2], Lk, q.dtype, q.device)
    return _lists(_Part(q, p, 0, sizes, choice.kinds(summaries), None), mask, choice)


def _of_view(
    q: Any, view: KVView, summaries: Summaries | None, mask: Mask | None, positions: Any, choice: _Choice
) -> Tensor:
    check_view(CALL, q, view, None, Options(positions=positions))
    problem_of(CALL, q, view, mask if mask is None or mask.fits_any_length else None, Options(), longest(q, view))
    q, layout, block = q.detach(), view.layout, choice.block
    n = len(layout.lengths)
    if summaries is None and view.summaries is not None and view.summaries.block != block:
        given, fix = f"block={block}, and a cache with summaries={view.summaries.block}", "Pass the cache's block"
        raise ArgumentError.of(CALL, "blocks must be those that the cache summarises", given, fix)
    if summaries is None and view.summaries is None:  # in what attention computes with
        wide = view if view.k_scale is None else view._replace(dtype=torch.float32)
        summaries = block_summaries(gathered(wide._replace(v=view.k[..., :0], v_scale=view.k_scale))[0], block)
    if summaries is not None:
        most = max(layout.lengths, default=0) // block
        _check_summaries(summaries, block, (n, view.k.shape[1], most, view.k.shape[3]))
    found, start = [], 0
    for i, Lk in enumerate(layout.lengths):
        Lq = q.shape[2] if layout.queries is None else layout.queries[i]
        own = q[i : i + 1] if layout.queries is None else q[:, :, start : start + Lq]
        start += Lq
        sizes = Sizes(n, q.shape[1], Lq, Lk, q.dtype, q.device)
        if mask is not None and not mask.fits_any_length:
            mask.check(CALL, sizes)
        p = torch.arange(Lk - Lq, Lk, dtype=torch.int64, device="cpu")[None]
        if summaries is not None:
            kinds, places = tuple([x[i : i + 1, :, : Lk // block] for x in choice.kinds(summaries)]), None
        else:
            kinds, places = _kept(view, i, choice)
        found.append(_lists(_Part(own, p, i, sizes, kinds, places), mask, choice))
    return _stacked(found, q)


def _kept(view: KVView, i: int, choice: _Choice) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """What a cache keeps for sequence i: all of the pool where most of it is the sequence's, else its own part."""
    assert view.summaries is not None
    places, first = places_of(view, i, choice.block)
    n = places.numel()
    pool = [x.flatten(1, 2)[None] for x in choice.kinds(view.summaries)]
    if first >= 0:
        return tuple([x[:, :, first : first + n] for x in pool]), None
    places = places.clamp(min=0).to(view.k.device)
    if pool[0].shape[2] <= 2 * n:
        return tuple(pool), places
    return tuple([x.index_select(2, places) for x in pool]), None


def _stacked(found: list[Tensor], q: Tensor) -> Tensor:
    """The lists of all sequences as one tensor; -1 where one has fewer or shorter ones."""
    if len(found) == 1:
        return found[0]
    if not found:
        return torch.zeros((0, 1, 0, 0), dtype=torch.int32, device=q.device)
    rows, wide = (max(x.shape[dim] for x in found) for dim in (2, 3))
    pad = torch.nn.functional.pad
    return torch.cat([pad(x, (wide - x.shape[3], 0, 0, rows - x.shape[2]), value=-1) for x in found])


def _check_summaries(summaries: Any, block: int, size: tuple[int, int, int, int]) -> None:
    if not isinstance(summaries, Summaries):
        given, fix = given_as("summaries", summaries), "Pass what block_summaries(k, block) returns"
        raise ArgumentTypeError.of(CALL, "summaries must be Summaries", given, fix)
    if summaries.block != block:
        given = f"block={block}, and summaries of blocks of {summaries.block}"
        raise ArgumentError.of(CALL, "blocks must be those of the summaries", given, "Pass the same block")
    have = tuple(summaries.mean.shape)
    if have[:2] != size[:2] or have[2] < size[2] or have[3] != size[3]:
        given = f"summaries {have}, and {size} is needed"
        raise ShapeError.of(CALL, "summaries must be of these keys", given, "Make them of the keys that are passed")


# ------------------------------------------------------------------------------------------------------ one part
def _lists(part: _Part, mask: Mask | None, choice: _Choice) -> Tensor:
    """The chosen blocks, int32 (rows_b, H, lists, n), ascending, -1 for none."""
    q, sizes = part.q, part.sizes
    (rows_b, Hq, Lq, _), Hkv = q.shape, part.kinds[0].shape[1]
    H = (Hkv if choice.per_group else Hq) or 1
    blocks = -(-sizes.Lk // choice.block)
    if not (rows_b and Hq and Lq and blocks):
        return torch.full((rows_b, H, -(-Lq // choice.queries), 0), -1, dtype=torch.int32, device=q.device)
    if Lq == 1 and len(part.p) == 1 and (mask is None or (isinstance(mask, Window) and mask.left is None)):
        seen = sizes.Lk if mask is None or mask.right is None else int(part.p) + mask.right + 1
        return _leading(_scores(part, choice, slice(0, 1)), max(0, min(seen, sizes.Lk)), choice)
    found = []
    each = max(1, _SCORES // (rows_b * Hq * blocks)) * choice.queries
    for first in range(0, Lq, each):
        rows = slice(first, min(first + each, Lq))
        kind = _kinds(part, mask, choice, rows).to(q.device)
        found.append(_chosen(_scores(part, choice, rows), kind, choice.top_k))
    return found[0] if len(found) == 1 else _side_by_side(found)


def _side_by_side(found: list[Tensor]) -> Tensor:
    wide = max(x.shape[3] for x in found)
    return torch.cat([torch.nn.functional.pad(x, (wide - x.shape[3], 0), value=-1) for x in found], 2)


def _kinds(part: _Part, mask: Mask | None, choice: _Choice, rows: slice) -> Tensor:
    """int8 (rows_b or 1, H or 1, lists, blocks): 0 hidden, 1 seen whole and scored, 2 seen in part and kept."""
    block, sizes, q = choice.block, part.sizes, part.q
    i = torch.arange(rows.start, rows.stop, dtype=torch.int64, device="cpu")
    own = len(part.p) > 1 or (mask is not None and mask.varies_by_batch)
    heads = q.shape[1] if mask is not None and mask.varies_by_head else 1
    full = torch.arange(-(-sizes.Lk // block), dtype=torch.int64, device="cpu") < sizes.Lk // block
    found = []
    for b in range(q.shape[0] if own else 1):
        p = part.p[b if len(part.p) > 1 else 0, rows]
        for h in range(heads):
            seen = keys_seen(mask, i, p, block, sizes, part.first + b, h)
            found.append(_joint(((seen == block) & full)[None], (seen > 0)[None], choice.queries))
    whole, some = (torch.stack(x).unflatten(0, (-1, heads)).flatten(2, 3) for x in zip(*found, strict=True))
    if choice.per_group and heads > 1:
        groups = (part.kinds[0].shape[1], -1)
        whole, some = whole.unflatten(1, groups).all(2), some.unflatten(1, groups).any(2)
    return torch.where(whole, 1, torch.where(some, 2, 0)).to(torch.int8)


def _joint(whole: Tensor, some: Tensor, queries: int) -> tuple[Tensor, Tensor]:
    """What queries that share a list see together: (1, rows, blocks) to (1, lists, blocks)."""
    if queries == 1:
        return whole, some
    short = -whole.shape[1] % queries
    pad = torch.nn.functional.pad
    whole, some = pad(whole, (0, 0, 0, short), value=True), pad(some, (0, 0, 0, short))
    return whole.unflatten(1, (-1, queries)).all(2), some.unflatten(1, (-1, queries)).any(2)


def _scores(part: _Part, choice: _Choice, rows: slice) -> Tensor:
    """(rows_b, H, lists, full blocks): the sums of the scores of heads and queries that share a list."""
    q, how, Hkv = part.q[:, :, rows], choice.how, part.kinds[0].shape[1]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    if callable(how):
        return _asked(part, choice, q, how).to(wide)
    q = q.to(wide)
    if how == "mean":
        found = _product(_summed(q, Hkv, choice), part.kinds[0])
    else:
        low, high = part.kinds
        found = _product(_summed(q.clamp(min=0), Hkv, choice), high)
        found += _product(_summed(q.clamp(max=0), Hkv, choice), low)
    found = found if part.places is None else found.index_select(-1, part.places)
    return _by_list(found, q, choice)


def _by_list(found: Tensor, q: Tensor, choice: _Choice) -> Tensor:
    """(rows_b, Hkv, heads x lists, n) to (rows_b, H, lists, n)."""
    lists = -(-q.shape[2] // choice.queries)
    if found.shape[2] == lists:
        return found
    by_head: Tensor = found.unflatten(2, (-1, lists))
    return by_head.flatten(1, 2)


def _product(left: Tensor, right: Tensor) -> Tensor:
    found: Tensor = left @ right.to(left.dtype).mT
    return found


def _summed(x: Tensor, Hkv: int, choice: _Choice) -> Tensor:
    """(rows_b, Hq, rows, n) to (rows_b, Hkv, heads x lists, n): both scores are linear in what is summed here."""
    if choice.queries > 1:
        x = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % choice.queries))
        x = x.unflatten(2, (-1, choice.queries)).sum(3)
    x = x.unflatten(1, (Hkv, -1))
    return x.sum(2) if choice.per_group else x.flatten(2, 3)


def _asked(part: _Part, choice: _Choice, q: Tensor, how: Callable[[Tensor, Summaries], Tensor]) -> Tensor:
    """The scores of a function of the user's."""
    kinds, places = part.kinds, part.places
    if places is not None:
        kinds = tuple([x.index_select(2, places) for x in kinds])  # type: ignore[assignment]
    blocks = part.sizes.Lk // choice.block
    mean, low, high = (x[:, :, :blocks] for x in kinds)
    found = how(q, Summaries(mean, low, high, choice.block, (blocks,) * len(q)))
    size = (*q.shape[:3], blocks)
    if not isinstance(found, Tensor) or not found.is_floating_point() or tuple(found.shape) != size:
        fix = f"Return floating-point scores of shape {size}"
        raise ShapeError.of(CALL, "how must return a score for each query and block", shown(found), fix)
    return _by_list(_summed(found, kinds[0].shape[1], choice), q, choice)


# ------------------------------------------------------------------------------------------------------ the choice
def _chosen(scores: Tensor, kind: Tensor, top_k: int) -> Tensor:
    """int32 (rows_b, H, lists, n): of each list the parts, and the best others up to top_k; ascending, -1 for none."""
    blocks = kind.shape[-1]
    scores = scores[..., :blocks]
    if scores.shape[-1] < blocks:  # the keys after the last full block
        scores = torch.nn.functional.pad(scores, (0, blocks - scores.shape[-1]))
    parts = kind.eq(2).sum(-1)
    wide = min(blocks, max(top_k, int(parts.max())))
    if scores.dtype == torch.float64:
        order = _in_order(scores, kind)[..., :wide]
        rank = torch.arange(wide, device=order.device)
        none = kind.expand(scores.shape).gather(-1, order) == 0
    else:
        packed = torch.where(kind == 2, _PART | _later(blocks, kind.device), _packed(scores))
        packed.masked_fill_(kind == 0, _HIDDEN)
        best = packed.topk(wide, dim=-1, sorted=wide > top_k).values
        order, none = _blocks_of(best, blocks), best == _HIDDEN
        rank = torch.arange(wide, device=order.device)
    if wide > top_k:
        none = none | (rank >= torch.clamp(parts, min=top_k)[..., None])
    return order.to(torch.int32).masked_fill_(none, -1).sort(-1).values


def _leading(scores: Tensor, seen: int, choice: _Choice) -> Tensor:
    """The lists of one query that sees the first `seen` keys: what a step of decode asks for, in fewer steps."""
    whole, rest = divmod(seen, choice.block)
    wide = min(whole, max(choice.top_k - (rest > 0), 0))
    scores = scores[..., :whole]
    least = scores.topk(wide, dim=-1, sorted=False).values.amin(-1, keepdim=True) if wide else scores
    best = scores >= least
    if wide and bool((best.sum(-1) == wide).all()):  # no ties with the last one, and no NaN
        lists = best.nonzero()[:, -1].view(*best.shape[:-1], wide).to(torch.int32)
        return torch.nn.functional.pad(lists, (0, 1), value=whole) if rest else lists
    if scores.dtype == torch.float64:
        lists = _in_order(scores, torch.ones_like(scores, dtype=torch.int8))[..., :wide]
    else:
        lists = _blocks_of(_packed(scores).topk(wide, dim=-1, sorted=False).values, whole)
    lists = lists.to(torch.int32).sort(-1).values
    return torch.nn.functional.pad(lists, (0, 1), value=whole) if rest else lists


def _packed(scores: Tensor) -> Tensor:
    """Integers in the order of choice: float32 scores in the upper half, the lower block first in the lower half."""
    scores = torch.nan_to_num(scores, nan=torch.inf, posinf=torch.inf, neginf=-torch.inf).add_(0.0)  # one zero
    bits = scores.view(torch.int32)
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64).bitwise_left_shift_(32)
    return order.bitwise_or_(_later(scores.shape[-1], scores.device))


def _later(blocks: int, device: torch.device) -> Tensor:
    """The lower halves: how many blocks come after each."""
    return torch.arange(blocks - 1, -1, -1, dtype=torch.int64, device=device)


def _blocks_of(packed: Tensor, blocks: int) -> Tensor:
    return blocks - 1 - (packed & 0xFFFFFFFF)


def _in_order(scores: Tensor, kind: Tensor) -> Tensor:
    """The blocks in the order of choice, by sorting: for float64, which leaves no bits for the block's number."""
    kind = kind.expand(scores.shape)
    scores = torch.where(kind == 1, torch.nan_to_num(scores, nan=torch.inf, posinf=torch.inf, neginf=-torch.inf), 0)
    first = scores.sort(dim=-1, descending=True, stable=True).indices
    return first.gather(-1, kind.gather(-1, first).sort(dim=-1, descending=True, stable=True).indices)
